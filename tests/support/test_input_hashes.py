"""Inputs are known by content: a run is not continued with other data, another tokenizer or other weights."""

import json
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

import eval_math
import train
from support.cli import BadInput


def main(monkeypatch, module, flags):
    monkeypatch.setattr(sys, "argv", [module.__file__, *flags.split()])
    return module.main()


def edit_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_weight(path):
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, path, {"format": "pt"})


def edit_merges(path):
    """The same tokens, and other ids for a text."""
    state = json.loads(path.read_text())
    del state["model"]["merges"][5:]
    path.write_text(json.dumps(state))


TEMPLATE, WEIGHTS = "student/chat_template.jinja", "teacher/model.safetensors"
RUN, EVALUATION = (train, "run"), (eval_math, "evaluation")
CHANGES = [  # what continues, a file, its change, what the line names
    (RUN, "train.jsonl", lambda path: edit_text(path, "x=3", "x=4"), "training problems of"),
    (RUN, "test.jsonl", lambda path: edit_text(path, '"answer": "', '"answer": "1'), "held-out problems of"),
    (RUN, TEMPLATE, lambda path: edit_text(path, "assistant", "model"), "tokenizer of .*student"),
    (RUN, "student/tokenizer.json", edit_merges, "tokenizer of .*student"),
    (RUN, WEIGHTS, edit_weight, "weights of .*teacher"),
    (
        EVALUATION,
        "test.jsonl",
        lambda path: edit_text(path, '"answer": "', '"answer": "1'),
        "problems of test",
    ),
    (EVALUATION, TEMPLATE, lambda path: edit_text(path, "assistant", "model"), "tokenizer of .*student"),
    (EVALUATION, WEIGHTS, edit_weight, "weights of .*teacher"),
]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A copy of the world with a run and an evaluation in it."""
    at = tmp_path_factory.mktemp("inputs")
    shutil.copytree(world, at, dirs_exist_ok=True)
    flags = f"--student {at}/student --teacher {at}/teacher --data {at} --preset toy --steps 1 --eval-limit 4"
    with pytest.MonkeyPatch.context() as patch:
        main(patch, train, f"{flags} --eval-every 0 --max-new-tokens 8 --out {at}/run")
        flags = f"--model {at}/student --model {at}/teacher --data {at}/test.jsonl --limit 4"
        main(patch, eval_math, f"{flags} --max-new-tokens 8 --out {at}/evaluation")
    return at


@pytest.mark.parametrize("continued, name, change, names", CHANGES)
def test_changed_inputs_are_refused_by_name(stopped, monkeypatch, continued, name, change, names):
    script, folder = continued
    original = (stopped / name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (stopped / folder).rglob("*")}
    change(stopped / name)
    try:
        with pytest.raises(BadInput, match=f"^{names}.* changed since the run was started"):
            main(monkeypatch, script, f"--resume {stopped / folder}")
    finally:
        (stopped / name).write_bytes(original)
    assert {path: path.stat().st_mtime_ns for path in (stopped / folder).rglob("*")} == before


@pytest.mark.parametrize("script, folder", [RUN, EVALUATION])
def test_unchanged_inputs_are_accepted(stopped, monkeypatch, script, folder):
    """The bytes decide, not the time of the last change."""
    for path in stopped.glob("*/*.safetensors"):
        path.touch()
    main(monkeypatch, script, f"--resume {stopped / folder}")
