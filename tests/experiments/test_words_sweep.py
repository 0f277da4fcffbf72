"""The second world: a tiny run of some arms, and the report and figure of rows with known answers."""

import re
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import claims
import pytest
import sweep
import torch
import words

from extras import profile_horizon
from support import toy
from support.cli import BadInput
from support.run_folder import append_csv, read_csv

ROOT = Path(words.__file__).parents[1]
TIMES = ("seconds", "rollout_s")


@pytest.fixture
def micro(tmp_path, monkeypatch) -> words.Knobs:
    """Settings of a sweep over worlds whose models are hardly trained, with one learning rate."""
    monkeypatch.setattr(sweep, "CACHE", tmp_path)
    monkeypatch.setattr(words, "RATES", ("0.001",))
    monkeypatch.setattr(words.Knobs, "rates", ("0.001",))
    monkeypatch.setattr(profile_horizon, "measure", partial(profile_horizon.measure, rollouts=8))

    def build(sampler, recipe: words.words.Recipe) -> Path:
        return toy.build("opening", toy.Recipe(recipe.seed, pretrain_steps=1, posttrain_steps=1), tmp_path)

    monkeypatch.setattr(words.words, "build", build)
    preset = toy.PRESET | {"batch_size": 4, "max_new_tokens": 20}
    monkeypatch.setattr(words.words, "PRESET", preset)
    arms = ("esr", "lora-esr")
    return words.Knobs(arms=arms, seeds=1, steps=4, problems=4, rollouts=4, csv=str(tmp_path / "words.csv"))


@pytest.mark.slow
def test_a_sweep_continues_and_a_run_gives_its_row_again(micro):
    path = Path(micro.csv)
    words.run_all(replace(micro, arms=("esr",)))
    words.run_all(micro)
    rows = read_csv(path)
    ends = [("0", "student"), ("0", "teacher"), ("1", "student"), ("1", "teacher")]
    runs = [("0", "esr"), ("1", "esr"), ("0", "lora-esr"), ("1", "lora-esr")]
    assert [(row["seed"], row["arm"]) for row in rows] == ends + runs
    student, teacher, esr, lora = rows[2:4] + rows[5::2]
    assert 1 <= int(student["auto"]) <= 20 and esr["auto"] == teacher["kl_own_0"] == rows[4]["kl_own_0"] == ""
    assert 8 < int(esr["response_tokens"]) <= 4 * 4 * int(student["auto"])  # N by the 45 % rule
    assert len(esr["correct"]) == len(esr["correct_greedy"]) == 4
    kl = [name for name in esr if name.startswith("kl_student")]
    assert len(kl) == 10 and all(float(esr[name]) > 0 for name in kl)
    assert [student[name] for name in kl] == [student[name.replace("student", "own")] for name in kl]
    assert float(esr["kl_student_0"]) != float(student["kl_student_0"])
    assert esr["kl_student_0"] != lora["kl_student_0"]  # the adapters were trained instead
    assert float(esr["grad_norm_max"]) >= float(esr["grad_norm_mean"]) > 0
    path.unlink()
    append_csv(path, rows[:5])
    words.run_all(replace(micro, arms=("esr",)))
    again = read_csv(path)[5]
    assert {n: v for n, v in again.items() if n not in TIMES} == {
        n: v for n, v in esr.items() if n not in TIMES
    }
    with pytest.raises(BadInput, match="steps '4' and '5'"):
        words.run_all(replace(micro, steps=5))


@pytest.mark.slow
def test_the_decay_before_and_after_training(micro, monkeypatch):
    monkeypatch.setattr(words, "PREFIXES", "0 5")
    monkeypatch.setattr(sweep.Sweep, "finished", lambda self: {})
    with pytest.raises(BadInput, match="no learning rate of full: run words.py without --decay first"):
        words.decay_in_worlds(micro)
    monkeypatch.setattr(sweep.Sweep, "chosen_rates", lambda *given: {"full": words.RATES[0]})
    words.decay_in_worlds(micro)
    rows = read_csv(Path(micro.csv).with_stem("words_decay"))
    assert [row["student"] for row in rows] == ["before"] * 6 + ["after full"] * 6
    before, after = ([row["value"] for row in part if row["at"] == "0"] for part in (rows[:6], rows[6:]))
    assert before == after  # without a prefix the student does not matter
    with pytest.raises(BadInput, match=r"would mix problems '\d+' and '7'"):
        words.decay_in_worlds(replace(micro, problems=7))
    assert read_csv(Path(micro.csv).with_stem("words_decay")) == rows


def test_committed_decay_recomputed_by_hand():
    rows = read_csv(ROOT / "results" / "words_decay.csv")
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    for student, at in (("before", "50"), ("after full", "50"), ("before", "10")):
        found = [r for r in rows if (r["student"], r["curve"], r["at"]) == (student, "difference", at)]
        values = [100 * float(row["value"]) for row in found]
        mean, half = statistics.fmean(values), 2.365 * statistics.stdev(values) / 8**0.5
        assert f"{mean:.0f} [{mean - half:.0f} to {mean + half:.0f}]" in text


SAMPLED = {"student": (0.3, 0.3, 0.3), "teacher": (0.7, 0.72, 0.68), "full": (0.6, 0.62, 0.58)}
SAMPLED |= {"topd-0.1": (0.2, 0.22, 0.18), "esr": (0.75, 0.77, 0.73), "popd": (0.5, 0.7, 0.6)}


def made_up(folder) -> words.Knobs:
    """Rows of three seeds; greedy accuracies are 10 points higher; the middle learning rate is the best."""
    knobs = words.Knobs(arms=("full", "popd", "topd-0.1", "esr"), seeds=3)
    knobs = replace(knobs, csv=str(folder / "words.csv"))
    columns = [*claims.COSTS, "truncated", "repeating", "mean_length", *words.TABLE]
    columns += [f"kl_{writer}_{i}" for writer in words.WRITERS for i in words.TENTHS]
    rows = []
    for arm, values in SAMPLED.items():
        rates = words.RATES if arm in words.ARMS else ("",)
        runs = [(0, lr, 0.5 + (lr == words.RATES[2])) for lr in rates]
        runs += [(seed, rates[len(rates) // 2], value) for seed, value in enumerate(values, 1)]
        for seed, lr, value in runs:
            row = {"world": "words", "seed": seed, "arm": arm, "lr": lr, "accuracy": value}
            row |= {"greedy": value + 0.1} | dict.fromkeys(columns, 0.25) | {"response_tokens": 10**5}
            row |= {f"kl_own_{i}": 0.5 for i in words.TENTHS[:6]} | {"kl_own_9": ""}
            rows.append(row | knobs.settings())
    append_csv(Path(knobs.csv), rows)
    return knobs


def test_the_report_of_made_up_rows(tmp_path, monkeypatch, capsys):
    knobs = made_up(tmp_path)
    flags = [f for arm in knobs.arms for f in ("--arms", arm)] + ["--seeds", "3"]
    monkeypatch.setattr(sys, "argv", ["words.py", "--report", "--csv", knobs.csv, *flags])
    words.main()
    text = capsys.readouterr().out
    assert "learning rates: full 0.0015, popd 0.0015, " in text and "missing" not in text
    half = 4.303 * statistics.stdev([-10, 8, 2]) / 3**0.5  # popd - full in points
    claim = "is at least as good as full: sampled"
    assert f"topd-0.1 {claim} does not hold, -40.0% [-40.0% to -40.0%]; greedy does not hold, -40.0%" in text
    assert f"esr {claim} holds, +15.0% [+15.0% to +15.0%]; greedy holds" in text
    assert f"popd {claim} cannot be told, +0.0% [{-half:.1f}% to {half:+.1f}%]" in text
    assert "esr passes its teacher: sampled holds, +5.0%" in text
    assert "full passes its teacher: sampled does not hold, -10.0%" in text
    assert "topd-0.1 is better than the student before: sampled does not hold, -10.0%" in text
    table = next(line for line in text.splitlines() if line.startswith("esr "))
    assert "75.0% [70.0% to 80.0%]  85.0% [80.0% to 90.0%]    2.0%   100,000" in table
    assert Path(knobs.csv).with_suffix(".png").stat().st_size > 0


def test_missing_arms_seeds_and_rates_are_named(tmp_path):
    knobs = replace(made_up(tmp_path), arms=("full", "esr", "gkd"), seeds=4)
    path = Path(knobs.csv)
    rows = [
        row for row in read_csv(path) if (row["arm"], row["seed"], row["lr"]) != ("esr", "0", words.RATES[2])
    ]
    path.unlink()
    append_csv(path, rows)
    results, rates = words.results_of(knobs)
    lacking = "student (seed 4); teacher (seed 4); full (seed 4); esr (all of it); gkd (all of it)"
    assert words.missing(results, knobs) == f"missing: {lacking}" and list(rates) == ["full"]
    assert lacking in words.report(results, rates, knobs)
    words.draw(results, knobs)


def test_tenths_of_positions():
    tokens = {"position": torch.tensor([0, 1, 2, 3, 19]), "reverse_kl": torch.tensor([1.0, 3, 5, 7, 9])}
    found = words.by_tenth(tokens, 20)
    assert found == {0: 2.0, 1: 6.0, 9: 9.0}


def test_committed_verdicts_and_figure_recomputed_by_hand():
    """From results/words.csv, without sweep.py: two verdicts, and two points of the figure."""
    knobs = words.Knobs()
    results, rates = words.results_of(knobs)
    rows = [row for row in read_csv(Path(knobs.csv)) if row["seed"] != "0"]
    rows = [row for row in rows if row["lr"] == rates.get(row["arm"], "")]
    correct = {(row["arm"], row["seed"]): row["correct"].count("1") / 500 for row in rows}
    verdicts = words.verdicts(results)
    for arm, verdict in (("popd", "holds"), ("topd-0.1", "does not hold")):
        gaps = [100 * (correct[arm, seed] - correct["full", seed]) for seed in "12345678"]
        mean, half = statistics.fmean(gaps), 2.365 * statistics.stdev(gaps) / 8**0.5  # t of 7 degrees
        assert (mean - half > -5) == (verdict == "holds") and (mean + half < -5) == (verdict != "holds")
        line = next(line for line in verdicts if line.startswith(f"{arm} is at least as good as full"))
        low, high = (float(part) for part in re.findall(r"\[(\S+)% to (\S+)%\]", line)[0])
        assert f"sampled {verdict}, {mean:+.1f}%" in line
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.06)
    for arm in ("full", "topd-0.1"):
        points = [float(row["kl_own_2"]) for row in rows if row["arm"] == arm]
        assert len(points) == 8
        assert words.mean(results, arm, "kl_own_2") == pytest.approx(statistics.fmean(points))
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    lines = words.report(results, rates, knobs).splitlines()
    methods = ("popd", "topd-0.25", "topd-0.1", "esr")
    shown = [line for line in lines if line.startswith(tuple(f"{arm} is at least" for arm in methods))]
    shown += [line for line in lines if line.endswith("     8")]
    assert len(shown) == 20 and all(line in text for line in shown)
