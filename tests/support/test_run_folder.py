"""The run folder: the settings a run gets, its lock, and its files."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import pair_of, tiny
from safetensors import SafetensorError
from tqdm import tqdm

import eval_math
import train
from rollout import rollout
from support import models, run_folder, toy
from support.cli import BadInput, Stopped
from support.run import CheckpointedRun, Run

CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(monkeypatch, gpu: bool = False, **given):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    return run_folder.settings(train.Knobs, {"dtype": "float32", "device": "cpu"} | given)


@pytest.mark.parametrize("name", ["student", "teacher", "data"])
def test_a_named_model_or_data_set_never_gets_the_settings_of_the_toy(here, monkeypatch, name):
    """The toy's learning rate of 1e-3 would ruin a real model within a few steps."""
    knobs, folder = settings(monkeypatch, **{name: "X"})
    assert knobs == train.Knobs(preset="qwen", dtype="float32", device="cpu", **{name: "X"})
    assert knobs.lr == 5e-6 and knobs.max_new_tokens == 1024 and "boxed" in knobs.instruction
    assert folder == Path("runs/qwen-topd-1")
    for number in (1, 2):
        (here / "runs" / f"qwen-topd-{number}").mkdir(parents=True)
    assert settings(monkeypatch, **{name: "X"})[1] == Path("runs/qwen-topd-3")


def test_the_toy_is_chosen_without_a_gpu_and_without_names(here, monkeypatch, capsys):
    knobs, folder = settings(monkeypatch)
    assert knobs.preset == "toy" and folder == Path("runs/toy-topd-1")
    assert all(getattr(knobs, name) == value for name, value in toy.preset("opening").items())
    assert "preset toy" in capsys.readouterr().out
    assert settings(monkeypatch, gpu=True)[0].preset == "qwen"
    assert not (here / "runs").exists()


def test_given_flags_take_precedence_over_the_preset(here, monkeypatch):
    knobs, _ = settings(monkeypatch, preset="toy", student="X", lr=0.5, world="closing")
    assert (knobs.preset, knobs.student, knobs.lr) == ("toy", "X", 0.5)
    assert knobs.teacher == toy.preset("closing")["teacher"] and knobs.steps == toy.PRESET["steps"]


@pytest.mark.parametrize("preset", ["toy", "words"])
def test_tiny_models_run_with_one_thread_and_others_with_all(here, monkeypatch, preset):
    """With two threads and one busy core, a run of the toy took ten times as long."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    settings(monkeypatch, preset=preset)
    assert chosen == [1]
    settings(monkeypatch, preset=preset, student="X")
    settings(monkeypatch, preset="qwen")
    assert chosen == [1]


def test_a_low_memory_run_has_its_own_learning_rate(here, monkeypatch):
    assert settings(monkeypatch, preset="qwen")[0].lr == train.Knobs.lr
    assert settings(monkeypatch, preset="qwen", low_memory=True)[0].lr == run_folder.LOW_MEMORY["lr"]
    assert settings(monkeypatch, preset="qwen", low_memory=True, lr=1e-4)[0].lr == 1e-4


def test_exclusive_removes_the_folders_it_created_if_nothing_was_written(here):
    with pytest.raises(BadInput), run_folder.exclusive(here / "runs" / "a", fresh=True):
        raise BadInput("before the first file")
    assert list(here.iterdir()) == []


def test_exclusive_keeps_a_finished_run_next_to_it_and_a_folder_that_was_there(here):
    (here / "runs" / "done").mkdir(parents=True)
    (here / "runs" / "done" / "config.json").write_text("{}")
    (here / "mine").mkdir()
    for folder in (here / "runs" / "next", here / "mine"):
        with pytest.raises(BadInput), run_folder.exclusive(folder, fresh=True):
            raise BadInput("before the first file")
    assert (here / "runs" / "done" / "config.json").exists() and not (here / "runs" / "next").exists()
    assert list((here / "mine").iterdir()) == []  # a second attempt finds it as the first one did


def test_exclusive_removes_a_run_that_could_not_begin_and_keeps_one_that_has_answers(here):
    for name, left in (("config.json", []), ("eval_before.jsonl", ["config.json", "eval_before.jsonl"])):
        with pytest.raises(BadInput), run_folder.exclusive(here / "run", fresh=True):
            (here / "run" / "config.json").write_text("{}")
            (here / "run" / name).write_text("{}")
            raise BadInput("the answers do not fit into memory")
        assert sorted(path.name for path in here.glob("run/*") if path.name != ".lock") == left


@pytest.mark.parametrize(
    "error, becomes, line",
    [(OSError("full"), Stopped, "start again if it is gone"), (KeyboardInterrupt(), KeyboardInterrupt, None)],
)
def test_exclusive_leaves_nothing_after_any_error_if_nothing_was_written(here, error, becomes, line):
    """So that the same command may be given again."""
    with pytest.raises(becomes, match=line), run_folder.exclusive(here / "run", fresh=True):
        raise error
    assert list(here.iterdir()) == []


def test_exclusive_keeps_what_was_written(here):
    with pytest.raises(Stopped, match="out of memory"), run_folder.exclusive(here / "run", fresh=True):
        (here / "run" / "config.json").write_text("{}")
        raise MemoryError
    assert (here / "run" / "config.json").exists()


def test_exclusive_does_not_touch_the_folder_of_a_run_that_has_written_nothing_yet(here):
    """Two runs that start together choose the same folder; the one that comes second removed it."""
    with run_folder.exclusive(here / "run", fresh=True):
        with (
            pytest.raises(BadInput, match="another run is writing"),
            run_folder.exclusive(here / "run", fresh=True),
        ):
            raise AssertionError("both are in the folder")
        (here / "run" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="was started in"), run_folder.exclusive(here / "run", fresh=True):
        raise AssertionError("a folder that was empty when it was chosen")
    assert (here / "run" / "config.json").exists()


def test_exclusive_removes_every_folder_it_created_and_no_other(here):
    """Also those above the run's; a run that a neighbour has written there meanwhile stays."""
    (here / "there").mkdir()
    with pytest.raises(BadInput), run_folder.exclusive(here / "there" / "a" / "b" / "c", fresh=True):
        raise BadInput("before the first file")
    assert [path.name for path in here.rglob("*")] == ["there"]
    with pytest.raises(BadInput), run_folder.exclusive(here / "runs" / "mine", fresh=True):
        (here / "runs" / "done").mkdir()
        (here / "runs" / "done" / "config.json").write_text("{}")
        raise BadInput("before the first file")
    assert sorted(path.name for path in here.rglob("*")) == ["config.json", "done", "runs", "there"]


def test_a_second_evaluation_on_one_folder_leaves_that_of_the_first(here, world, monkeypatch):
    """Whether the first has written its config.json yet or not, and at each moment the second may begin."""
    flags = f"--model {world}/teacher --data {world}/test.jsonl --limit 2 --out {here}/out"
    monkeypatch.setattr("sys.argv", ["eval_math.py", *flags.split()])
    for written in (False, True):
        with run_folder.exclusive(here / "out", fresh=True):
            if written:
                (here / "out" / "config.json").write_text("{}")
            before = sorted(here.rglob("*"))
            with pytest.raises(BadInput, match="already holds a run"):
                eval_math.main()
            with monkeypatch.context() as patch, pytest.raises(BadInput, match="another run is writing"):
                # It was free when the second one chose it.
                patch.setattr(run_folder, "new_folder", lambda out, default: Path(out))
                eval_math.main()
            assert sorted(here.rglob("*")) == before


def test_a_run_without_its_metrics_is_refused(here):
    """The rows of the steps that are done could not be written again."""
    pair = pair_of(tiny(), tiny(seed=1))
    run = CheckpointedRun(here, pair, train.adamw(pair, train.Knobs()), train.Knobs())
    run.step = 2
    run.save()
    rows = [{"step": step, "loss": 0.5} for step in range(3)]
    for kept in ([], rows[:1], rows[1:], [rows[0], rows[2]]):
        (here / "metrics.csv").unlink(missing_ok=True)
        if kept:
            run_folder.append_csv(here / "metrics.csv", kept)
        with pytest.raises(BadInput, match="lacks rows of the 2 steps that are done"):
            run.load(4)
        assert not kept or len(run_folder.read_csv(here / "metrics.csv")) == len(kept)
    (here / "metrics.csv").unlink()
    run_folder.append_csv(here / "metrics.csv", rows)
    run.load(4)
    assert [row["step"] for row in run_folder.read_csv(here / "metrics.csv")] == ["0", "1"]


def test_append_csv_rewrites_a_file_that_lacks_a_column(tmp_path):
    path = tmp_path / "metrics.csv"
    run_folder.append_csv(path, [{"step": 0, "loss": 0.25, "note": 'a "b", c'}, {"step": 1, "loss": 1 / 3}])
    run_folder.append_csv(path, [{"loss": 2.0, "new": 7, "step": 2}])
    run_folder.append_csv(path, [{"step": 3}])
    assert run_folder.read_csv(path) == [
        {"step": "0", "loss": "0.25", "note": 'a "b", c', "new": ""},
        {"step": "1", "loss": "0.333333", "note": "", "new": ""},
        {"step": "2", "loss": "2", "note": "", "new": "7"},
        {"step": "3", "loss": "", "note": "", "new": ""},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_every_key_of_the_row_is_a_column_of_metrics_csv(tmp_path):
    """The given columns, the timings, the mean of each statistic; no means of row and position."""
    pair = pair_of(tiny(), tiny(seed=1))
    rollouts = rollout(pair.student, [[5, 6], [7]], 4, pair.eos_ids, torch.rand(2, 4))
    with torch.no_grad():
        _, tokens = train.score(pair, rollouts)
    run = CheckpointedRun(tmp_path, pair, train.adamw(pair, train.Knobs()), train.Knobs(show_every=0))
    run.bar = tqdm(disable=True)
    with run.timed("own_s"):
        pass
    row = run.log(rollouts, tokens | {"own": tokens["row"] * 0 + 3}, step=0, horizon=4, given="text")
    (written,) = run_folder.read_csv(tmp_path / "metrics.csv")
    assert written == {name: str(value) for name, value in run_folder.rounded(row).items()}
    assert {"step", "horizon", "given", "own_s", "seconds", "own", "reverse_kl", "truncated"} <= set(written)
    assert not {"row", "position"} & set(written)
    assert written["own"] == "3" and row["response_tokens"] == int(rollouts.response_mask.sum())
    assert row["reverse_kl"] == pytest.approx(tokens["reverse_kl"].mean().item())
    assert run.rows == []  # a long run keeps no rows in memory
    run = Run(CPU)
    assert run.log(rollouts, tokens, given=torch.tensor([2.5]))["given"] == 2.5
    with pytest.raises(ValueError, match="two values for the column reverse_kl"):
        run.log(rollouts, tokens, reverse_kl=1.0)


def test_a_run_in_memory_keeps_its_rows():
    pair = pair_of(tiny(), tiny(seed=1))
    knobs = train.Knobs(steps=3, batch_size=2, show_every=1, micro_batch=40)
    run = Run(CPU)
    train.train(pair, train.adamw(pair, knobs), [[5, 6], [7]], lambda step: 2 + step, knobs, run)
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert [row["horizon"] for row in run.rows] == [2, 3, 4]
    assert all(row["rollout_s"] > 0 and row["seconds"] > 0 for row in run.rows)


def test_whole_batches(tmp_path):
    """What a stopped evaluation left, cut to batches of two; the last one of all may be smaller."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"index": i, "batch_size": 2}) + "\n" for i in range(7)]
    for written, kept in [("", 0), ("".join(lines[:4]), 4), ("".join(lines[:5]), 4), ("".join(lines), 7)]:
        path.write_text(written)
        assert len(run_folder.whole_batches(path, list(range(7)))) == kept
        path.write_text(written + '{"index": 9, "cor')
        assert len(run_folder.whole_batches(path, list(range(7)))) == kept
        assert (path.read_text() if path.exists() else "") == "".join(lines[:kept])  # nothing to add to
    path.write_text("".join([*lines[:2], "{broken\n", *lines[2:]]))
    with pytest.raises(BadInput, match="a.jsonl line 3"):
        run_folder.whole_batches(path, list(range(7)))
    wrong = {
        2: [lines[0], *lines[2:]],
        5: [*lines[:4], lines[6]],
        8: [*lines, lines[0]],
        1: ['{"index": 0}\n'],
    }
    for number, edited in wrong.items():
        path.write_text("".join(edited))
        with pytest.raises(BadInput, match=f"answer {number} of .* is not the one that the evaluation wrote"):
            run_folder.whole_batches(path, list(range(7)))
        assert path.read_text() == "".join(edited)


def test_a_file_is_flushed_while_it_is_open_for_writing(tmp_path, monkeypatch):
    """Windows refuses to flush one that is open for reading alone."""
    written = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: written.append(os.write(descriptor, b"")))
    run_folder.write_json(tmp_path / "a.json", {})
    assert written == [0]


def test_rows_after_a_checkpoint_are_dropped(tmp_path):
    """Also a row that was cut short; a file that has no rows left goes."""
    run_folder.append_csv(tmp_path / "metrics.csv", [{"step": i, "loss": 0.5} for i in range(5)])
    run_folder.append_csv(tmp_path / "positions.csv", [{"step": 4, "position": 0}])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2")
    for name in ("step_2", "step_4", "after", "before"):
        (tmp_path / f"eval_{name}.jsonl").write_text("")
    (tmp_path / "summary.json").write_text("{}")  # of a run that has grown
    (tmp_path / "eval_step_5_copy.jsonl").touch()  # not ours
    run_folder.drop_rows_after(tmp_path, 3, total=6)
    assert [row["step"] for row in run_folder.read_csv(tmp_path / "metrics.csv")] == ["0", "1", "2"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "metrics.csv",
        "eval_step_2.jsonl",
        "eval_step_5_copy.jsonl",
        "eval_before.jsonl",
    }


def test_an_estimate_needs_no_library_for_few_bits(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    run_folder.check_device_flags(train.Knobs(teacher_bits="4", dry_run=True), CPU)
    with pytest.raises(BadInput, match="needs bitsandbytes"):
        run_folder.check_device_flags(train.Knobs(teacher_bits="4"), CPU)


def test_cuda_graphs_are_refused_where_they_do_not_run():
    knobs = train.Knobs(sampler="graphs")
    run_folder.check_device_flags(knobs, CPU)
    with pytest.raises(BadInput, match="--sampler graphs does not run on mps: drop it"):
        run_folder.check_device_flags(knobs, torch.device("mps"))


def test_a_disk_that_fills_while_a_world_is_built_is_one_line(tmp_path, monkeypatch):
    def full(world):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(toy, "CACHE", tmp_path)
    monkeypatch.setattr(toy, "build", full)
    knobs = train.Knobs(**toy.preset("opening") | {"preset": "toy"})
    with pytest.raises(Stopped, match="cannot write the models .*: free some space, then start again"):
        run_folder.build_world(knobs, rollout)
