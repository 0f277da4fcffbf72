"""Trackers, read back with their own readers; without network."""

import sys
import time
from types import SimpleNamespace

import pytest

import train
from extras import tracker
from support import run_folder
from support.cli import BadInput


def trained(monkeypatch, folder, name):
    flags = f"--preset toy --steps 2 --show-every 0 --eval-limit 0 --tracker {name} --out {folder}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    return run_folder.read_csv(folder / "metrics.csv")


def test_tensorboard(world, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = trained(monkeypatch, tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for column in ("reverse_kl", "horizon", "response_tokens"):
        values = [event.value for event in events.Scalars(column)]
        assert values == pytest.approx([float(row[column]) for row in rows], rel=1e-4)
    assert events.Scalars("response_tokens")[0].step == 0


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((0, 1, 2, 3), (2, 3)):
        log = tracker.start("tensorboard", tmp_path, {})
        for step in steps:
            log(step, {"loss": step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]


def test_wandb_offline(world, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(monkeypatch, tmp_path / "run", "wandb")
    wandb.finish()  # at exit, it does this itself
    files = list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert len(files) == 1
    deadline = time.monotonic() + 30  # another process writes the file
    while b"reverse_kl" not in files[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"reverse_kl" in files[0].read_bytes()


def test_runs_in_folders_of_one_name_are_two(tmp_path, monkeypatch):
    """wandb continues a run whose id it knows; the id is that of the run, not of its folder."""
    begun = []
    library = SimpleNamespace(init=lambda **about: begun.append(about), Error=ValueError)
    monkeypatch.setitem(sys.modules, "wandb", library)
    for place in "ab":
        folder = tmp_path / place / "run"
        folder.mkdir(parents=True)
        run_folder.write_json(folder / "config.json", {"run_id": f"id of {place}"})
        tracker.start("wandb", folder, {})
    assert [(about["name"], about["id"]) for about in begun] == [("run", "id of a"), ("run", "id of b")]


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadInput, match="^--tracker wandb is not installed .*: pip install wandb$"):
        tracker.start("wandb", tmp_path, {})


def test_numbers_of_nested_scores():
    summary = {"before": {"accuracy": 0.5, "warnings": ["x"]}, "teacher": None, "seconds": 3, "step": 7}
    assert tracker.numbers(summary) == {"before/accuracy": 0.5, "seconds": 3.0}
