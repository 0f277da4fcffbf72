"""Evaluation: sampling in batches, statistics, resuming, comparing. The toy's models stand for real ones."""

import json
import math
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import END, tiny

import cli
import data
import eval_math
import memory
from rollout import sample
from scores import difference, is_repeating, score, summarize, tell, wilson

ROOT = Path(eval_math.__file__).parent


def record(index=0, correct=True, extracted="1", **changes):
    usual = {
        "index": index,
        "correct": correct,
        "correct_strict": correct,
        "correct_last": correct,
        "gold": "1",
    }
    usual |= {
        "extracted": extracted,
        "verdict": "right" if correct else "wrong",
        "response": "x",
        "length": 4,
    }
    return usual | {"finished": True, "seconds": 0.5, "batch_size": 2} | changes


def test_score_of_one_answer_each():
    s = score([record(0), record(1), record(2, False, None, finished=False, length=40, gold="?")])
    assert s["accuracy"] == pytest.approx(2 / 3) and s["n"] == 3
    assert s["se"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert s["truncated"] == s["no_answer"] == pytest.approx(1 / 3)
    assert (s["mean_length"], s["p95_length"], s["tokens_per_second"]) == (16, 40, 32)
    assert score([]) is None


def test_standard_error_is_clustered_by_problem():
    """Four answers to each of two problems, all alike within one: two observations, not eight."""
    s = score([record(i, correct=i == 0) for i in (0, 1) for _ in range(4)])
    assert s["n"] == 2 and s["se"] == pytest.approx(statistics.stdev([1, 0]) / 2**0.5) == pytest.approx(0.5)


def test_pass_at_k_is_unbiased():
    """Against the mean over every subset of k of the K answers, by enumeration."""
    from itertools import combinations

    right = {0: [True, False, False, True, False], 1: [False] * 5, 2: [True] * 5}
    s = score([record(i, c, "1" if c else "2") for i, answers in right.items() for c in answers])
    for k in (1, 2, 4, 5):
        each = [statistics.fmean(any(pick) for pick in combinations(a, k)) for a in right.values()]
        assert s["pass_at"][k] == pytest.approx(statistics.fmean(each))
    assert s["majority"] == pytest.approx(1 / 3)  # problem 0: three say 2, two say 1


def test_majority_counts_answers_alike_in_text():
    group = [
        record(0, True, r"\dfrac12"),
        record(0, True, r"\frac{1}{2}"),
        record(0, False, "3"),
        record(0, False, None),
    ]
    assert score(group)["majority"] == 1 and score([record(0, False, None)] * 2)["majority"] == 0


def test_interval_holds_the_truth_95_times_of_100():
    """Simulated; and it is no point where every answer is right, as the usual +- 1.96 se would be."""
    rng, inside = random.Random(0), 0
    for _ in range(2000):
        low, high = score([record(i, rng.random() < 0.3) for i in range(60)])["interval"]
        inside += low <= 0.3 <= high
    assert 0.93 <= inside / 2000 <= 0.975
    assert wilson(1.0, 20)[0] == pytest.approx(0.8389, abs=1e-4) and wilson(1.0, 20)[1] == pytest.approx(1.0)


def test_difference_is_paired():
    """On the same problems most luck cancels: here B is A and one more, and that is what it says."""
    a = [record(i, i < 50) for i in range(100)]
    b = [record(i, i < 58) for i in range(100)]
    d = difference(a, b)
    assert d["difference"] == pytest.approx(0.08) and (d["better"], d["worse"]) == (8, 0)
    assert d["p"] == pytest.approx(2 / 2**8) and d["interval"][0] > 0
    assert difference(a, a) | {"interval": None} == {
        "difference": 0, "se": 0, "interval": None, "better": 0, "worse": 0, "p": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    "better, worse, p", [(8, 2, 0.109375), (5, 5, 1.0), (1, 0, 1.0), (10, 0, 0.001953125)]
)
def test_sign_test(better, worse, p):
    first = [record(i, i >= better) for i in range(better + worse)]
    second = [record(i, i < better) for i in range(better + worse)]
    assert difference(first, second)["p"] == pytest.approx(p)


def test_repeating():
    assert is_repeating("So it is 4. " + r"The answer is \boxed{4}. " * 12)
    assert not is_repeating("A short answer, 4.") and not is_repeating(
        "".join(f"step {i}, " for i in range(99))
    )


def test_the_table_names_what_to_be_wary_of():
    odd = [record(0, False, verdict="gold unreadable", gold="???"), record(1, False, verdict="timed out")]
    text = tell(summarize({"A-x": {"gsm8k": odd}, "B-y": {"gsm8k": [record(0), record(1)]}}))
    assert "'???'" in text and "1 answers hung the grader" in text and "B-y - A-x, gsm8k: +100.0%" in text


def test_top_p_keeps_the_likeliest_and_draws_them_by_their_law():
    law = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    token, logp = sample(law.log().expand(50_000, 5), 1.0, torch.Generator().manual_seed(0), top_p=0.7)
    share = torch.bincount(token, minlength=5) / 50_000
    assert share[[0, 2, 4]].sum() == 0 and abs(share[1] - 0.625) < 0.015
    assert torch.allclose(logp.exp(), torch.tensor([0.0, 0.625, 0.0, 0.375, 0.0])[token])
    assert set(sample(law.log().expand(99, 5), 1.0, None, top_p=0.01)[0].tolist()) == {1}


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


def test_limit_is_a_seeded_random_subset():
    problems = [data.Problem(str(i), "1") for i in range(100)]
    first = data.subset(problems, 20, 0)
    assert first == data.subset(problems, 20, 0) != data.subset(problems, 20, 1) and first != problems[:20]


def test_a_stopped_run_resumes_to_the_same_scores(world, tmp_path, monkeypatch, request):
    """Real kills at random moments, and a line cut in the middle. Sampled, so the seeds count too."""
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
    lost = {"seconds"}
    kept = [{k: v for k, v in r.items() if k not in lost} for r in data.read_jsonl(answers)]
    whole = data.read_jsonl(tmp_path / "whole" / answers.name)
    assert kept == [{k: v for k, v in r.items() if k not in lost} for r in whole]


def test_whole_batches(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record(i)) + "\n" for i in range(7)]
    for written, kept in [("", 0), ("".join(lines[:4]), 4), ("".join(lines[:5]), 4), ("".join(lines), 7)]:
        path.write_text(written)
        assert len(data.whole_batches(path, 7)) == kept
        path.write_text(written + '{"index": 9, "cor')
        assert len(data.whole_batches(path, 7)) == kept
        assert not written or path.read_text() == "".join(lines[:kept])
    path.write_text("".join([*lines[:2], "{broken\n", *lines[2:]]))
    with pytest.raises(cli.BadInput, match="line 3"):
        data.whole_batches(path, 7)


def test_base_models_get_examples_and_end_where_they_ask_on():
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

    class Ro:
        tokens = torch.tensor([list(b"4.\nQuestion: 3?")])
        response_mask, finished = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([False])

    assert eval_math.answers(Ro, Tokenizer()) == [{"response": "4.", "length": 15, "finished": True}]


def test_thinking_is_off_unless_asked():
    class Tokenizer:
        chat_template, added_tokens_decoder = "x", {}

        def apply_chat_template(self, messages, enable_thinking, **how):
            return "thinking" if enable_thinking else "at once"

        def __call__(self, text, **how):
            return {"input_ids": text}

    rendered = [data.render(Tokenizer(), [data.Problem("?", "1")], "", "", on)[0] for on in (False, True)]
    assert rendered == ["at once", "thinking"]


def test_batch_size(monkeypatch):
    """auto takes what free memory holds; a size that does not fit says what it needs, before it samples."""
    model, prompts = tiny(END), [[1] * 100]
    assert memory.batch_that_fits(model, prompts, 1000, "auto") == 64
    assert memory.batch_that_fits(model, prompts, 1000, "7") == 7
    row = 2 * 3 * 2 * 4 * 4 * 1100 + 100 * (6 * 16 + 3 * 32) * 4 + 20 * 50
    monkeypatch.setattr(memory, "free_memory", lambda device: math.ceil(row * 5.5 / 0.9))
    assert memory.batch_that_fits(model, prompts, 1000, "auto") == 5
    with pytest.raises(cli.BadInput, match="6 answers at once need"):
        memory.batch_that_fits(model, prompts, 1000, "6")
    monkeypatch.setattr(memory, "free_memory", lambda device: row // 2)
    with pytest.raises(cli.BadInput, match="1 answers at once need"):
        memory.batch_that_fits(model, prompts, 1000, "auto")
