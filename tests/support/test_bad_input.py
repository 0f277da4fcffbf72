"""Wrong input of every kind: one line with value, reason and remedy, exit code 2, and no file changes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_math
import train
from support import toy
from support.cli import run_main

GOOD = '{"question": "x=3, then +4 fiftytwo times", "answer": "1"}\n'


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def broken_models(folder, world):
    """Model folders, each with one thing wrong."""
    names = ("pickled", "code", "cut", "nan", "lacking", "notemplate", "badconfig", "half", "notokens")
    at = {name: Path(shutil.copytree(world / "student", folder / name)) for name in names}
    weights = load_file(world / "student" / "model.safetensors")
    for name in ("pickled", "half"):
        (at[name] / "model.safetensors").unlink()
    torch.save(weights, at["pickled"] / "pytorch_model.bin")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(at["code"] / "config.json", model_type="evil", auto_map=code)
    (at["code"] / "evil.py").write_text(f"open({str(folder / 'evil_ran')!r}, 'w')")
    whole = (world / "student" / "model.safetensors").read_bytes()
    (at["cut"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    first, *_, last = weights
    nan = weights | {last: torch.full_like(weights[last], torch.nan)}
    save_file(nan, at["nan"] / "model.safetensors", {"format": "pt"})
    del weights[first if "layers" in first else last]
    save_file(weights, at["lacking"] / "model.safetensors", {"format": "pt"})
    for template in at["notemplate"].glob("*.jinja"):
        template.unlink()
    (at["notokens"] / "tokenizer.json").unlink()
    (at["badconfig"] / "config.json").write_text("{broken")


@pytest.fixture(scope="module")
def here(tmp_path_factory, world):
    """A folder of wrong inputs."""
    here = tmp_path_factory.mktemp("wrong inputs")  # the space is meant
    jsonl(here / "empty.jsonl")
    jsonl(here / "broken.jsonl", {"question": "x", "answer": "1"}, '{"question": "y", "answ')
    jsonl(here / "list.jsonl", "[1, 2]")
    jsonl(here / "noanswer.jsonl", {"question": "x", "gold": "1"})
    jsonl(here / "prompts.jsonl", *[{"prompt": f"x={i}"} for i in range(9)])
    jsonl(here / "noquestion.jsonl", {"text": "x", "answer": "1"})
    jsonl(here / "one.jsonl", {"question": "x=1, then +2 fiftyone times", "answer": "1"})
    jsonl(here / "long.jsonl", *[{"question": f"x={i} " * 300, "answer": "1"} for i in range(200)])
    jsonl(here / "twice.jsonl", *[GOOD.strip()] * 3)
    jsonl(here / "half.jsonl", {"index": 0, "response": 4, "gold": "4", "verdict": "right"})
    jsonl(here / "blank.jsonl", GOOD.strip(), {"question": " ", "answer": "1"})
    jsonl(here / "huge.jsonl", GOOD.strip(), {"question": "x" * 50_000_000, "answer": "1"})
    (here / "nul.jsonl").write_bytes(GOOD.encode() + b'{"question": "a\x00b", "answer": "1"}\n')
    (here / "latin.jsonl").write_bytes(GOOD.encode() + '{"question": "é", "answer": "1"}\n'.encode("latin-1"))
    jsonl(here / "test.jsonl", GOOD.strip())
    (here / "table.xlsx").write_text("x")
    (here / "nothing").mkdir()
    (here / "used").mkdir()
    (here / "used" / "metrics.csv").write_text("step\n")
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text("{}")
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(here / "other")
    AutoModelForCausalLM.from_pretrained(world / "teacher").save_pretrained(here / "other")
    broken_models(here, world)
    return here


ASK = "--model={world}/teacher --data={world}/test.jsonl"
BAD = [  # script, flags, what the line names
    ("train", "--schedule sometimes", "sometimes"),
    ("train", "--horizon 0", "horizon 0"),
    ("train", "--horizon -1", "horizon -1"),
    ("train", "--horizon 500", "horizon 500"),
    ("train", "--horizon nan", "horizon nan"),
    ("train", "--horizon x", "'x'"),
    ("train", "--schedule popd --popd-interval 1000", "never grows"),
    ("train", "--schedule popd --popd-growth 0", "never grows"),
    ("train", "--popd-growth 5", "popd"),
    ("train", "--steps 0", "--steps 0"),
    ("train", "--batch-size -4", "--batch-size -4"),
    ("train", "--temperature 0", "--temperature 0"),
    ("train", "--lr nan", "--lr nan"),
    ("train", "--stepz 3", "--stepz"),
    ("train", "--sched full", "--sched"),
    ("train", "--preset huge", "huge"),
    ("train", "--world middle", "middle"),
    ("train", "--device abacus", "abacus"),
    ("train", "--dtype int8", "int8"),
    ("train", "--data {here}/empty.jsonl", "is empty"),
    ("train", "--data {here}/broken.jsonl", "line 2"),
    ("train", "--data {here}/list.jsonl", "line 1"),
    ("train", "--eval-data {here}/noanswer.jsonl", "no column answer"),
    ("train", "--data {here}/prompts.jsonl --eval-limit 4", "only 0 problems with an answer"),
    (
        "train",
        "--data {here}/prompts.jsonl --eval-limit 0 --question-column text",
        "no column text, only prompt",
    ),
    ("train", "--data {here}/noquestion.jsonl", "no column question"),
    ("train", "--data {here}/one.jsonl", "none left"),
    ("train", "--data {here}/long.jsonl", "longest prompt"),
    ("train", "--data {here}/table.xlsx", "table.xlsx"),
    ("train", "--data {here}/nothing", "has no train"),
    ("train", "--data {here}/missing.jsonl", "does not exist"),
    ("train", "--student {here}/missing", "does not exist"),
    ("train", "--teacher {here}/nothing", "cannot load"),
    ("train", "--student nobody/nothing", "cannot load nobody/nothing"),
    ("train", "--data nobody/nothing", "cannot read data nobody/nothing"),
    ("train", "--teacher {here}/other", "different tokenizers"),
    ("train", "--out {here}/used", "already holds"),
    ("train", "--out {here}/one.jsonl", "already holds"),
    ("train", "--data={here}/blank.jsonl", "line 2 has an empty question"),
    ("train", "--data={here}/huge.jsonl", "50,000,000 characters"),
    ("train", "--data={here}/nul.jsonl", "line 2"),
    ("train", "--data={here}/latin.jsonl", "line 2"),
    ("train", "--student={here}/pickled", "model.safetensors"),
    ("train", "--student={here}/code", "custom code"),
    ("train", "--student={here}/cut", "cannot load"),
    ("train", "--teacher={here}/nan", "NaN or infinite weights"),
    ("train", "--teacher={here}/lacking", "lacks 1 weights"),
    ("train", "--student={here}/notemplate", "no chat template"),
    ("train", "--student={here}/badconfig", "not a valid JSON"),
    ("train", "--eval-batch=some", "invalid int or auto value"),
    ("train", "--resume={here}/nothing", "config.json"),
    ("train", "--resume={here}/run", "start a new one"),
    ("train", "--beta2=1", "above"),
    ("train", "--seed=99999999999999999999999", "above"),
    ("train", "--out=/dev/null/x", "/dev/null/x"),
    ("train", "--device=meta", "not available"),
    ("train", "--data={here}/twice.jsonl --eval-limit=1", "repeats the held-out"),
    ("eval_math", "", "--model"),
    ("eval_math", f"{ASK} --top-p=2", "above"),
    ("eval_math", "--regrade={here}/half.jsonl", "no graded answers"),
    ("eval_math", "--model={world}/teacher", "--benchmark"),
    ("eval_math", "--model={world}/teacher --benchmark=gsm9k", "choose from 'gsm8k', 'math500'"),
    ("eval_math", "--model={world}/teacher --benchmark=gsm8k", "network"),
    ("eval_math", "--model={world}/teacher --data={here}/none.jsonl", "does not exist"),
    ("eval_math", "--model={world}/teacher --data={here}/broken.jsonl", "line 2"),
    ("eval_math", "--model={world}/teacher --data={here}/noanswer.jsonl", "no column answer"),
    ("eval_math", "--model={world}/teacher --data={here}/empty.jsonl", "empty"),
    ("eval_math", f"{ASK} --answer-column=gold", "no column gold, only question, answer"),
    ("eval_math", "--model={here}/notokens --data={world}/test.jsonl", "give a complete model folder"),
    ("eval_math", "--model={here}/nowhere --data={world}/test.jsonl", "does not exist"),
    ("eval_math", "--model={here}/half --data={world}/test.jsonl", "cannot load"),
    ("eval_math", "--model={here}/code --data={world}/test.jsonl", "custom code"),
    ("eval_math", f"{ASK} --samples=0", "below 1"),
    ("eval_math", f"{ASK} --samples=4", "--temperature"),
    ("eval_math", f"{ASK} --top-p=0", "below"),
    ("eval_math", f"{ASK} --batch-size=many", "invalid int or auto value"),
    ("eval_math", f"{ASK} --batch-size=0", "is below 1"),
    ("eval_math", f"{ASK} --data={{here}}/test.jsonl", "the same name"),
    ("eval_math", f"{ASK} --max-new-tokens=100000", "exceed the context"),
    ("eval_math", f"{ASK} --device=tpu9", "device"),
    ("eval_math", f"{ASK} --out={{here}}/used", "already holds"),
    ("eval_math", "--resume={here}", "config.json"),
    ("eval_math", "--resume={here}/run", "start a new one"),
    ("eval_math", "--regrade={here}/none.jsonl", "no graded answers"),
    ("eval_math", "--regrade={here}/test.jsonl", "no graded answers"),
    ("eval_math", "--regrade={here}/broken.jsonl", "line 2"),
    ("toy", "--world=middle", "middle"),
    ("toy", "--wrld=opening", "--wrld"),
]
MAINS = {"train": train.main, "eval_math": eval_math.main, "toy": toy.main}


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("script, flags, names", BAD)
def test_bad_input_is_one_line_and_changes_nothing(here, world, monkeypatch, capsys, script, flags, names):
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(here)
    before = files(here)
    argv = [flag.format(here=here, world=world) for flag in flags.split()]
    argv = ["--preset", "toy", *argv] if script == "train" else argv
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run_main(MAINS[script])
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert line.count("\n") == 1 and line.startswith("error: ") and names in line, line
    assert files(here) == before


def test_there_are_many():
    assert len(BAD) >= 80
