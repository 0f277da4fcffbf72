"""--horizon auto: the horizon follows from where the reverse KL is, is reported, and is kept by the run."""

import json
import re
import sys

import pytest
import torch
from helpers import END, pair_of, tiny

import train
from extras import profile_horizon
from extras.profile_horizon import horizon_of_profile, measure
from schedules import make_schedule
from support import run_folder
from support.cli import BadInput

PROMPTS = [[5, 6], [7], [8, 9, 4]]


@pytest.mark.parametrize(
    "kl, position, share, horizon",
    [
        ([0, 0, 0, 5, 0, 0], [0, 1, 2, 3, 4, 5], 0.45, 4),  # all of it at position 3
        ([1] * 100, list(range(100)), 0.45, 45),  # uniform
        ([1] * 100, list(range(99, -1, -1)), 0.45, 45),  # tokens come in any order
        ([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2], 0.45, 1),  # three of four rows end at once: sums, not means
        ([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2], 0.8, 2),
        ([1, 2, 3], [0, 1, 2], 1.0, 3),
    ],
)
def test_horizon_of_profile(kl, position, share, horizon):
    assert horizon_of_profile(torch.tensor(kl).float(), torch.tensor(position), share) == horizon


@pytest.mark.parametrize("kl", [[0.0, 1e-9], [float("nan"), 1.0], [-1e-9, 0.0]])
def test_no_horizon_where_the_models_agree(kl):
    with pytest.raises(BadInput, match="suggests no horizon"):
        horizon_of_profile(torch.tensor(kl), torch.arange(2))


def test_measure_covers_every_token_of_every_rollout_once():
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    knobs = train.Knobs(max_new_tokens=6, micro_batch=40, seed=3)
    profile = [measure(train.score, pair, PROMPTS, knobs, rollouts=10, batch=batch) for batch in (4, 4, 10)]
    places = list(zip(profile[0]["row"].tolist(), profile[0]["position"].tolist()))
    assert len(set(places)) == len(places)
    assert {row for row, _ in places} == set(range(10))
    assert torch.equal(profile[0]["reverse_kl"], profile[1]["reverse_kl"])
    assert sorted(places) == sorted(zip(profile[2]["row"].tolist(), profile[2]["position"].tolist()))


def test_horizon_auto_is_measured_reported_and_kept(world, tmp_path, monkeypatch, capsys):
    """The toy's models differ in the first words; the run folder holds the number for a resumed run."""
    command = "train.py --preset toy --horizon auto --eval-limit 0 --steps 2 --max-new-tokens 50"
    command += f" --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", command.split())
    train.main()
    printed = capsys.readouterr().out
    found = re.search(r"horizon (\d+): the first \1 tokens hold 45 % of the reverse KL of 256", printed)
    horizon = int(found[1])
    assert 1 <= horizon < 12
    assert {row["horizon"] for row in run_folder.read_csv(tmp_path / "run" / "metrics.csv")} == {str(horizon)}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["horizon"] == horizon
    monkeypatch.setattr(sys, "argv", f"train.py --resume {tmp_path}/run --steps 3".split())
    train.main()
    assert "measuring" not in capsys.readouterr().out


def test_a_horizon_of_one_token_is_not_the_whole_budget(monkeypatch):
    """--horizon 1 means the whole budget; where all of the reverse KL is in the first token, it is one."""
    pair = pair_of(tiny(), tiny(seed=1))
    knobs = train.Knobs(schedule="esr", horizon="auto", max_new_tokens=9)
    tokens = {
        "reverse_kl": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "position": torch.tensor([0, 1, 0, 1]),
        "row": torch.tensor([0, 0, 1, 1]),
    }
    monkeypatch.setattr(profile_horizon, "measure", lambda *args, **options: tokens)
    horizon = profile_horizon.choose(train.score, pair, PROMPTS, knobs)
    assert make_schedule("esr", budget=9, steps=10, horizon=horizon)(0) == 1
