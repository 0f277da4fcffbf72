"""What training with a teacher of another family does, with the toy and a teacher of renumbered tokens."""

import sys
from pathlib import Path

import other_family
import pytest
from helpers import renumbered

from support.data import Problem
from support.run_folder import read_csv

ROOT = Path(other_family.__file__).parents[1]


def test_numbers_of_the_results():
    rows = {(row["curve"], row["at"]): row for row in read_csv(ROOT / "results" / "other_family.csv")}
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for readout in ("accuracy", "cut", "newline"):
        for curve in ("before", *(f"{run} after 100 steps" for run in ("esr50", "esr100", "full"))):
            value, low, high = (100 * float(rows[curve, readout][name]) for name in ("value", "low", "high"))
            assert f" {value:.1f} % [{low:.1f} to {high:.1f}] |" in text


def test_a_student_that_equals_the_teacher(world, tmp_path, monkeypatch):
    """Its log-ratio is 0 on any text: log p of the teacher's weights, log q of the same under other ids."""
    other = renumbered(world, tmp_path / "other")
    path = tmp_path / "rows.csv"
    flags = ["--student", world / "student", "--teacher", other, "--trained", world / "teacher"]
    flags += ["--data", world, "--problems", 20, "--texts", 20, "--max-new-tokens", 128]
    flags += ["--instruction=", "--csv", path]
    monkeypatch.setattr(sys, "argv", ["other_family.py", *map(str, flags)])
    other_family.main()
    rows = {(row["curve"], row["at"]): row for row in read_csv(path)}
    trained = world.name
    ratio = {name: float(rows[name, "log_ratio_per_byte"]["value"]) for name in ("before", trained)}
    assert ratio["before"] < -0.01 and ratio[trained] == pytest.approx(0, abs=1e-3)
    assert float(rows[trained, "accuracy"]["low"]) > float(rows["before", "accuracy"]["high"])


def test_readouts_of_two_answers():
    texts = ("1 + 1.\nSo 2. The answer is 2", "on and on and on. " * 20)
    answers = [{"response": text, "finished": done} for text, done in zip(texts, (True, False))]
    problems = [Problem("1 + 1?", "2"), Problem("1 + 2?", "3")]
    sums = other_family.sums_of_answers(answers, problems)
    assert {name: sum(total) / sum(count) for name, (total, count) in sums.items()} == pytest.approx(
        {"accuracy": 0.5, "cut": 0.5, "repeating": 0.5, "newline": 1 / 22}
    )
