"""The pair of real weights: its problems, its teacher, and the reverse KL, with a tiny model."""

import random
import re
from pathlib import Path

import claims
import english
import pytest
from helpers import load_pair

from support import data
from support.run_folder import read_csv

ROOT = Path(english.__file__).parents[1]
RECIPE = english.Recipe(problems=8, held_out=6, steps=6, batch=4, lr=3e-3)


def test_worked_answers_say_what_the_questions_say():
    rng = random.Random(0)
    for question, worked, result in (english.draw_problem(RECIPE, rng) for _ in range(200)):
        start, *changes = map(int, re.findall(r"\d+", question))
        losses = re.findall(r"(sells|loses|gives away) (\d+)", question)
        total = start + sum(changes) - 2 * sum(int(amount) for _, amount in losses)
        assert total == result and worked.endswith(f"\\boxed{{{result}}}.")
        sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", worked)
        assert len(sums) == len(changes)
        for before, sign, amount, after in sums:
            assert int(before) + int(f"{sign}{amount}") == int(after)


def test_no_question_is_in_two_parts(tmp_path):
    taught = english.write_problems(tmp_path, RECIPE)
    parts = [set(taught)]
    for name in ("test", "train"):
        parts.append({row["question"] for row in data.read_jsonl(tmp_path / f"{name}.jsonl")})
    assert [len(part) for part in parts] == [24, 6, 8] and len(set().union(*parts)) == 38


@pytest.mark.slow
def test_the_teacher_learns_and_its_reverse_kl_is_measured(world, tmp_path, monkeypatch):
    monkeypatch.setattr(english, "CACHE", tmp_path)
    monkeypatch.setattr(english, "MAX_NEW_TOKENS", 20)
    monkeypatch.setattr(english, "BATCH", 4)
    recipe = english.Recipe(str(world / "student"), problems=8, held_out=6, steps=6, batch=4, lr=3e-3)
    folder = english.build(recipe)
    assert english.build(recipe) == folder  # not made again
    taught = english.write_problems(tmp_path, recipe)
    nll = {}
    for name in ("student", "teacher"):
        pair = load_pair(folder / name, folder / "teacher")
        ids = [pair.tokenizer.encode(text, return_tensors="pt") for text in taught.values()]
        nll[name] = sum(pair.student(input_ids=text, labels=text).loss.item() for text in ids)
    assert nll["teacher"] < 0.7 * nll["student"]
    rows = english.score_students(folder, (str(folder / "teacher"),), rollouts=6)
    means = {row["curve"]: row["value"] for row in rows if row["at"] == "all"}
    assert means["student on the student's"] > 0.1 and means["student on the teacher's"] > 0.1
    assert means["teacher on the student's"] == pytest.approx(0, abs=1e-6)
    of_tenths = [row for row in rows if row["curve"] == "student on the student's" and row["at"] != "all"]
    tokens = sum(row["n"] for row in of_tenths)
    weighted = sum(row["value"] * row["n"] for row in of_tenths) / tokens
    assert weighted == pytest.approx(means["student on the student's"])
    assert tokens == next(row["n"] for row in rows)
    assert english.draw(rows, tmp_path / "kl.csv").stat().st_size > 10_000


def test_numbers_of_the_results():
    """From the committed files: who solves what the other does not, and the fall of the reverse KL."""
    results = claims.read(ROOT / "results" / "compare_english.csv")
    full, esr = claims.correct([results["full"][0], results["esr"][0]])
    assert ((full < esr).sum(), (full > esr).sum()) == (15, 51)
    values = {(row["curve"], row["at"]): row for row in read_csv(ROOT / "results" / "english_kl.csv")}

    def beyond_first_tenth(curve):
        whole, first = values[curve, "all"], values[curve, "0"]
        parts = [float(row["value"]) * int(row["n"]) for row in (whole, first)]
        return (parts[0] - parts[1]) / (int(whole["n"]) - int(first["n"]))

    before = beyond_first_tenth("student on the student's")
    falls = [1 - beyond_first_tenth(f"{name} on the student's") / before for name in ("topd-0.1-0", "full-0")]
    assert falls == pytest.approx([0.10, 0.72], abs=0.005)


def test_committed_scores_of_two_rates_recomputed():
    """Every row of the table of the third seed, from the digits of both files."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    high = {
        row["arm"]: row for row in read_csv(ROOT / "results" / "compare_english.csv") if row["seed"] == "2"
    }
    low = {row["arm"]: row for row in read_csv(ROOT / "results" / "english_lower_rate_scores.csv")}
    assert {"full", "esr"} <= low.keys()
    for arm in low:
        for digits, score in (("correct", "accuracy"), ("correct_greedy", "greedy")):
            first, second = high[arm][digits], low[arm][digits]
            assert len(first) == len(second) == 200
            for marks, row in ((first, high[arm]), (second, low[arm])):
                assert marks.count("1") / 200 == float(row[score])
            better = sum((a, b) == ("0", "1") for a, b in zip(first, second))
            worse = sum((a, b) == ("1", "0") for a, b in zip(first, second))
            scores = " | ".join(f"{marks.count('1') / 2:.1f} %" for marks in (first, second))
            assert f" | {scores} | {better}, {worse}; " in text


def test_committed_scores_of_half_the_rate_recomputed():
    """The table of three seeds, and the interval of its differences, from the digits of both files."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = read_csv(ROOT / "results" / "english_lower_rate_scores.csv")
    rows += read_csv(ROOT / "results" / "english_lower_rate_seeds_scores.csv")
    runs = {(row["arm"], row["seed"]): row for row in rows}
    for arm, name in {"full": "full", "esr": "ESR", "popd": "POPD"}.items():
        found = [runs[arm, seed] for seed in "012"]
        cells = [f"{float(row['accuracy']):.1%} ({100 * float(row['greedy']):.1f})" for row in found]
        assert f"| {name} | {' | '.join(cells).replace('%', ' %')} |" in text
    for name, arm, digits, form in (
        ("ESR against full", "esr", "correct", ""),
        ("greedily", "esr", "correct_greedy", "greedily "),
        ("POPD against full", "popd", "correct", ""),
        ("greedily", "popd", "correct_greedy", "greedily "),
    ):
        gaps, cells = [], []
        for seed in "012":
            ours, full = (runs[which, seed][digits] for which in (arm, "full"))
            assert len(ours) == len(full) == 200
            better = sum(pair == ("1", "0") for pair in zip(ours, full))
            worse = sum(pair == ("0", "1") for pair in zip(ours, full))
            gaps.append((better - worse) / 200)
            cells.append(f"{(better - worse) / 2:+.1f} ({better}, {worse}; ")
        line = next(line for line in text.splitlines() if f"| {name} | {cells[0]}" in line)
        assert all(cell in line for cell in cells)
        mean, _, low, high = (100 * number for number in claims.interval_of(gaps))
        words = " ".join(text.split()).replace(" points [", " [")
        assert f"{form}{mean:+.1f} [{low:.1f} to {high:+.1f}]" in words
