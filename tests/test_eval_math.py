"""Evaluation: sampling in batches, resuming, comparing. The toy's models stand in for real ones."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval_math
from rollout import Rollout
from support import cli, data

ROOT = Path(eval_math.__file__).parent

FLAGS = ["--max-new-tokens", "128", "--instruction", "", "--dtype", "float32"]


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval_math.py", *map(str, flags)])
    return eval_math.main()


def test_two_models_are_compared_on_the_same_problems(world, tmp_path, monkeypatch, capsys):
    models = ["--model", world / "student", "--model", world / "teacher", "--limit", 30]
    main(monkeypatch, *models, "--data", world / "test.jsonl", *FLAGS, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    a, b = found["scores"]["A-student test"], found["scores"]["B-teacher test"]
    assert b["accuracy"] > a["accuracy"] and a["n"] == b["n"] == 30
    gap = found["differences"]["B-teacher - A-student, test"]
    assert gap["difference"] == pytest.approx(b["accuracy"] - a["accuracy"]) and gap["p"] < 0.01
    assert "sign test" in capsys.readouterr().out
    records = data.read_jsonl(tmp_path / "out" / "B-teacher-test.jsonl")
    problems = {p.question: p.answer for p in data.read_problems(str(world / "test.jsonl"), "test")}
    assert all(problems[r["problem"]] == r["gold"] for r in records)
    main(monkeypatch, "--regrade", tmp_path / "out" / "B-teacher-test.jsonl")
    assert "0 of 30 verdicts differ" in capsys.readouterr().out


def test_a_stopped_run_resumes_to_the_same_scores(world, tmp_path, monkeypatch, request):
    """Real kills at random moments, and an incomplete line. Sampled, so the noise must be the same too."""
    flags = ["--model", world / "teacher", "--data", world / "test.jsonl", "--limit", 60, "--samples", 2]
    flags += ["--temperature", 1, "--top-p", 0.9, "--batch-size", 10, *FLAGS]
    main(monkeypatch, *flags, "--out", tmp_path / "whole")
    out = tmp_path / "stopped"
    answers = out / "A-teacher-test.jsonl"
    rng, command = random.Random(0), [sys.executable, str(ROOT / "eval_math.py")]
    given = [*map(str, flags), "--out", str(out)]
    for _ in range(request.config.getoption("--kills")):
        process = subprocess.Popen([*command, *given], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not answers.exists():  # a slow machine takes long to get there
            time.sleep(0.05)
        try:
            process.wait(timeout=3 * rng.random())
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        given = ["--resume", str(out)]
    answers.write_bytes(answers.read_bytes()[:-30])
    main(monkeypatch, *given)
    stopped, whole = data.read_jsonl(answers), data.read_jsonl(tmp_path / "whole" / answers.name)
    for record in stopped + whole:
        del record["seconds"]
    assert stopped == whole


def test_an_answer_does_not_depend_on_its_batch(world, tmp_path, monkeypatch):
    """The sampling noise belongs to problem and sample; so a smaller batch gives the same answers."""
    texts = []
    for size in (7, 16):
        flags = ["--model", world / "student", "--data", world / "test.jsonl", "--limit", 8, "--samples", 2]
        flags += ["--temperature", 1, "--batch-size", size, *FLAGS, "--out", tmp_path / str(size)]
        main(monkeypatch, *flags)
        records = data.read_jsonl(tmp_path / str(size) / "A-student-test.jsonl")
        texts.append([record["response"] for record in records])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_base_models_get_examples_and_end_at_the_next_question():
    class Tokenizer:
        chat_template, name_or_path = None, "base"

        def __call__(self, text):
            return {"input_ids": list(text.encode())}

        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens.tolist()).decode()

    prompt = data.render(Tokenizer(), [data.Problem("2 + 2?", "4")], "ignored", few_shot=eval_math.FEW_SHOT)[
        0
    ]
    assert bytes(prompt).decode().endswith("\n\nQuestion: 2 + 2?\nAnswer:")
    with pytest.raises(cli.BadInput, match="no chat template"):
        data.render(Tokenizer(), [data.Problem("2 + 2?", "4")], "")

    tokens = torch.tensor([list(b"4.\nQuestion: 3?")])
    unfinished = torch.tensor([False])
    rollouts = Rollout([[1]], tokens, torch.ones_like(tokens, dtype=torch.bool), tokens.float(), unfinished)
    answer = {"response": "4.", "length": 15, "finished": True}
    assert eval_math.decode_answers(rollouts, Tokenizer()) == [answer]
