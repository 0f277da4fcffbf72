"""The phase diagram: its answers, a tiny run of one cell, and the shares of rows with known answers."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import claims
import phase
import pytest
import sweep

from extras import profile_horizon
from support import toy
from support.cli import BadInput
from support.run_folder import append_csv, read_csv

KNOBS = phase.Knobs(seeds=3, steps=2, problems=2)


def test_the_corners_are_the_toys_worlds():
    for problem in toy.all_problems(toy.Recipe())[:20]:
        for correct in (True, False):
            for q, world in ((0.0, "opening"), (1.0, "closing")):
                assert phase.answer(*problem, q, correct) == toy.answer(*problem, world, correct)


@pytest.mark.parametrize("q, place", [(0.25, 13), (0.5, 26), (0.75, 39)])
def test_right_and_wrong_answers_part_at_the_place(q, place):
    right, wrong = (phase.answer(3, 4, 52, q, correct)[0].split() for correct in (True, False))
    start = 1 + place  # after "work:"
    assert right[:start] == wrong[:start]
    assert right[start : start + 3] == ["so", "it", "is"] and wrong[start : start + 3] == [
        "one",
        "more",
        "is",
    ]
    for one, other in zip(right[start + 3 : -1], wrong[start + 3 : -1], strict=True):
        assert one[:-1] == other[:-1] and (int(one[-1]) + 1) % 10 == int(other[-1])
    assert right[-1] == "\\boxed{1}" and wrong[-1] == "\\boxed{2}"


@pytest.mark.slow
def test_a_run_writes_a_row_once_and_mixes_no_settings(tmp_path, monkeypatch):
    for module in (phase, sweep):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(profile_horizon, "measure", partial(profile_horizon.measure, rollouts=8))
    monkeypatch.setattr(toy, "Recipe", partial(toy.Recipe, pretrain_steps=1, posttrain_steps=1))
    path = tmp_path / "phase.csv"
    knobs = replace(KNOBS, csv=str(path))
    wanted = [("student", ""), ("auto", "0.001"), ("topd-0.05", "0.001")]
    for _ in range(2):
        knobs.run([(0.5, 1)], wanted)
    rows = read_csv(path)
    assert [(row["arm"], row["lr"]) for row in rows] == wanted
    auto = int(rows[0]["auto"])
    student, of_auto, truncated = (int(row["response_tokens"]) for row in rows)
    assert student == 0 and 0.5 < of_auto / (2 * 32 * auto) <= 1 and 0.5 < truncated / (2 * 32 * 6) <= 1
    assert 54 <= float(rows[0]["announced"]) <= 58 and 1 <= auto <= 128
    with pytest.raises(BadInput, match="steps '2' and '3'"):
        replace(knobs, steps=3).read()


@pytest.mark.parametrize("changes", [{"seed": "x"}, {"accuracy": ""}, {"q": "middle"}])
def test_damaged_rows(tmp_path, changes):
    path = tmp_path / "phase.csv"
    knobs = replace(KNOBS, csv=str(path))
    row = {"q": "0.5", "seed": "1", "arm": "student", "lr": "", "accuracy": "0.3"} | knobs.settings()
    append_csv(path, [row])
    assert list(knobs.read()) == [(0.5, 1, "student", "")]
    path.unlink()
    append_csv(path, [row | changes])
    with pytest.raises(BadInput, match="damaged row"):
        knobs.read()


def test_the_committed_rows_are_read():
    """The format of results/phase.csv: its rows have the default settings, and the columns in their order."""
    path = Path(phase.Knobs().csv)
    columns = ["q", "seed", "arm", "lr", "response_tokens", "accuracy", "announced", "auto"]
    assert list(read_csv(path)[0]) == [*columns, "steps", "problems", "worlds", *sweep.SETTINGS]
    assert len(phase.Knobs().read()) == len(read_csv(path))


# Accuracies of three seeds at q = 0.5. The shares of topd-0.5: gains 0.3, 0.6, 0.6 of full's 0.6, 0.6, 0.6.
STUDENT, FULL = (0.2, 0.3, 0.1), (0.8, 0.9, 0.7)
GAINS = {"topd-0.05": (0, 0, 0), "topd-0.1": (0, 0.03, -0.03), "topd-0.25": (0.6, 0.6, 0.6)}
GAINS |= {"topd-0.5": (0.3, 0.6, 0.6), "auto": (0.6, 0.6, 0.6), "popd": (0.6, 0.6, 0.6)}


def made_up(folder) -> phase.Knobs:
    """The rows above, with learning rates for which 1e-3 is best, and lower ones that must not be used."""
    knobs = replace(KNOBS, csv=str(folder / "phase.csv"))
    rows = []

    def add(q, seed, arm, lr, accuracy, announced="", auto=""):
        row = {"q": q, "seed": seed, "arm": arm, "lr": lr, "response_tokens": 0, "accuracy": accuracy}
        rows.append(row | {"announced": announced, "auto": auto} | knobs.settings())

    for q in phase.CORNERS:
        for arm in phase.ARMS:
            for lr, accuracy in zip(phase.RATES, (0.2, 0.9, 0.9)):
                add(q, phase.SWEEP_SEED, arm, lr, accuracy)
    for seed in range(1, 4):
        add(0.5, seed, "student", "", STUDENT[seed - 1], announced=55, auto=59 + seed)
        add(0.5, seed, "teacher", "", 0.95)
        add(0.5, seed, "full", "0.001", FULL[seed - 1])
        add(0.5, seed, "full", "0.003", 0.0)
        for arm, gains in GAINS.items():
            add(0.5, seed, arm, "0.001", round(STUDENT[seed - 1] + gains[seed - 1], 4))
    append_csv(Path(knobs.csv), rows)
    return knobs


def test_shares_of_made_up_rows(tmp_path):
    knobs = made_up(tmp_path)
    cells = phase.cells_of(knobs)
    assert set(cells.rates.values()) == {"0.001"}
    share = cells.share(0.5, "topd-0.5")
    residuals = [-0.2, 0.1, 0.1]  # gain - 5 / 6 of 0.6
    se = (sum(r * r for r in residuals) / 2 / 3) ** 0.5 / 0.6
    assert share.mean == pytest.approx(5 / 6) and share.se == pytest.approx(se)
    assert share.high - share.mean == pytest.approx(claims.T_QUANTILES[0] * se)
    shown = phase.report(cells, knobs)
    words = {line.split()[0]: " ".join(line.split()[1:]) for line in shown.splitlines() if "  " in line[:3]}
    assert words["topd-0.05"].startswith("loses") and words["topd-0.1"].startswith("loses")
    assert words["topd-0.25"].startswith("keeps 100% [100% to 100%]")
    assert words["topd-0.5"].startswith("cannot be told 83%")
    assert "  auto       61.0 tokens, 60 to 62" in shown
    assert phase.text_of(cells, 0.5, "full") == "+60 points"
    assert phase.draw(cells, knobs, Path(knobs.csv)).stat().st_size > 0


@pytest.mark.parametrize("without", ["a seed", "a gain", "a teacher"])
def test_no_share_without_seeds_gain_or_teacher(tmp_path, without):
    knobs = made_up(tmp_path)
    path = Path(knobs.csv)
    rows = read_csv(path)
    for row in rows:
        if without == "a gain" and row["arm"] == "student":
            row["accuracy"] = "0.8"
        if without == "a teacher" and (row["seed"], row["arm"]) == ("2", "teacher"):
            row["accuracy"] = "0.89"
    if without == "a seed":
        rows = [row for row in rows if (row["seed"], row["arm"], row["lr"]) != ("2", "full", "0.001")]
    path.unlink()
    append_csv(path, rows)
    cells = phase.cells_of(knobs)
    assert cells.share(0.5, "topd-0.5") is None
    of_teacher = "seed 2, whose teacher has an accuracy of 89%"
    assert (of_teacher in phase.report(cells, knobs)) == (without == "a teacher")


def test_missing_seeds_are_named(tmp_path, monkeypatch):
    knobs = made_up(tmp_path)
    monkeypatch.setattr(phase, "PLACES", (0.5,))
    assert phase.cells_of(knobs).missing(knobs) == ""
    monkeypatch.setattr(phase, "PLACES", (0.5, 1.0))
    more = replace(knobs, seeds=4)
    assert phase.cells_of(more).missing(more) == "missing: q 0.5 (3 of 4 seeds), q 1 (0 of 4 seeds)"
