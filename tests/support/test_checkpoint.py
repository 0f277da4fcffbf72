"""Checkpoints and resume: real kills, a full disk, damaged files. A resumed run ends bit for bit the same.

The toy run of these tests has 9 steps of 4 short rollouts. `pytest --kills 20` kills it twenty times.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import in_process, pair_of, renumbered, tiny
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

import eval_math
import train
from extras import lora
from support import data, models, run_folder
from support.cli import BadInput, Stopped
from support.run import SIGNALS, CheckpointedRun

SHORT = "--preset toy --steps 9 --batch-size 4 --max-new-tokens 8 --horizon 5"
SHORT += " --eval-limit 6 --eval-every 6 --save-every 3 --show-every 2"


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    return train.main()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        main(patch, f"{SHORT} --out {folder}")
    return folder


def weights(folder):
    return (folder / "student" / "model.safetensors").read_bytes()


def metrics(folder):
    """The rows of metrics.csv without the columns that depend on the clock."""
    clocks = ("rollout_s", "score_s", "update_s", "seconds")
    rows = run_folder.read_csv(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in clocks} for row in rows]


def after_each_step(monkeypatch, action):
    """Call `action(run)` when a step has been logged."""
    log = CheckpointedRun.log

    def log_and_act(run, *args, **columns):
        row = log(run, *args, **columns)
        action(run)
        return row

    monkeypatch.setattr(CheckpointedRun, "log", log_and_act)


@pytest.fixture
def default_signals():
    """A signal that this process was told to ignore, as under nohup, would not stop a run either."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "flags, number",
    [
        ("--schedule popd --horizon 2 --divergence sampled", signal.SIGTERM),
        pytest.param("--schedule full --horizon 1", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(
            "--schedule topd --micro-batch 80 --eval-temperature 0 --rollouts-per-prompt 2",
            signal.SIGHUP,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ten_steps_equal_five_and_resume_and_five(
    default_signals, world, tmp_path, monkeypatch, flags, number
):
    """Resumes lost the optimizer, a generator, the horizon or the data cursor. A second signal kills."""
    flags = f"{SHORT} {flags} --steps 10 --eval-every 4"
    main(monkeypatch, f"{flags} --out {tmp_path}/whole")

    def interrupt(run):
        if run.step == 4:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL

    with monkeypatch.context() as patch:
        after_each_step(patch, interrupt)
        with pytest.raises(Stopped, match="stopped after step 4: .*--resume") as stop:
            main(monkeypatch, f"{flags} --out {tmp_path}/parts")
    assert stop.value.code == 128 + number
    assert len(metrics(tmp_path / "parts")) == 5
    torch.manual_seed(123)  # another process would have another one
    main(monkeypatch, f"--resume {tmp_path}/parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert (tmp_path / "parts/positions.csv").read_bytes() == (tmp_path / "whole/positions.csv").read_bytes()
    for name in ("before", "teacher", "step_4", "step_8", "after"):
        whole, parts = (data.read_jsonl(tmp_path / run / f"eval_{name}.jsonl") for run in ("whole", "parts"))
        assert [r["response"] for r in whole] == [r["response"] for r in parts], name
    whole, parts = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "parts"))
    assert whole["after"]["accuracy"] == parts["after"]["accuracy"]
    assert whole["response_tokens"] == parts["response_tokens"]


def test_a_finished_run_may_grow(world, tmp_path, monkeypatch):
    main(monkeypatch, f"{SHORT} --steps 4 --out {tmp_path}/run")
    elsewhere = "--device cpu --teacher-device cpu"  # the run may move: its GPUs may be gone
    own = tmp_path / "run" / "checkpoint-best.safetensors"  # a copy by the user is neither read nor counted
    own.write_bytes(b"")
    main(monkeypatch, f"--resume {tmp_path}/run --steps 7 --micro-batch 99 {elsewhere}")
    assert own.exists() and len(list(own.parent.glob("checkpoint-*"))) == 3
    assert [int(row["step"]) for row in metrics(tmp_path / "run")] == list(range(7))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 7


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--lr 1", "--lr 1.0 would change the run"),
        ("--steps 3", "can only grow"),
        ("--schedule full", "--schedule full would change"),
        ("--seed 4 --steps 9", "--seed 4 would change the run, which has 0:"),
    ],
)
def test_a_flag_that_changes_the_run_is_refused(tmp_path, monkeypatch, flags, names):
    run_folder.write_config(tmp_path, vars(train.Knobs(steps=8, dtype="float32")), torch.device("cpu"), {})
    with pytest.raises(BadInput, match=names):
        main(monkeypatch, f"--resume {tmp_path} {flags}")


def test_an_edited_setting_is_refused_by_name(saved, monkeypatch):
    path = saved / "config.json"
    before = json.loads(path.read_text())
    for edit in ({"lr": 0.5}, {"lr": 0.5, "seed": 9}, {"steps": 7}, {"world": "closing"}):
        path.write_text(json.dumps(before | edit))
        with pytest.raises(BadInput, match=f"^{', '.join(edit)} in .* changed since the run was started"):
            main(monkeypatch, f"--resume {saved}")
    path.write_text(json.dumps(before, indent=7))  # the layout does not matter
    main(monkeypatch, f"--resume {saved}")


def test_a_setting_that_is_newer_than_the_run_takes_its_default(saved, monkeypatch, capsys):
    """And one that the run had recorded cannot be deleted."""
    path = saved / "config.json"
    config = json.loads(path.read_text())
    for name in ("sampler", "temperature"):
        del config[name]
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="temperature, sampler in .* changed since"):
        main(monkeypatch, f"--resume {saved}")
    for name in ("sampler", "temperature"):
        del config["digests"][name]
    path.write_text(json.dumps(config))
    before = weights(saved)
    capsys.readouterr()
    for said in (1, 0):  # the first continuation records them
        main(monkeypatch, f"--resume {saved}")
        line = "continuing with the defaults --sampler 'plain', --temperature 1.0\n"
        assert capsys.readouterr().out.count(line) == said
    assert weights(saved) == before


def test_the_folder_of_another_program_is_not_resumed(tmp_path, monkeypatch):
    run_folder.write_config(tmp_path, vars(eval_math.Knobs()), torch.device("cpu"), {})
    with pytest.raises(BadInput, match="is not the config of such a run .*other settings: benchmark, limit"):
        main(monkeypatch, f"--resume {tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(vars(train.Knobs())))
    with pytest.raises(BadInput, match="is not the config of such a run .*'digests'"):
        main(monkeypatch, f"--resume {tmp_path}")


def test_kills_at_random_moments_change_nothing(whole, tmp_path, monkeypatch, request):
    """kill -9 in the middle of a step, of an evaluation, of a save."""
    rng = random.Random(1)
    out = tmp_path / "killed"
    given = f"{SHORT} --out {out}"
    moments = ["metrics.csv", "checkpoint-*.part", "eval_step_*.jsonl", "checkpoint-*rs"]
    for _ in range(request.config.getoption("--kills")):
        process = in_process(train.main, given.split(), tmp_path / "output")
        moment = rng.choice(moments)
        deadline = time.time() + 60
        before = {p: p.stat().st_size for p in out.glob(moment)}
        while time.time() < deadline and process.is_alive():
            if {p: p.stat().st_size for p in out.glob(moment) if p.exists()} != before:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.join()
        if (out / "config.json").exists():
            given = f"--resume {out}"
        else:
            shutil.rmtree(out, ignore_errors=True)
    main(monkeypatch, given)
    assert weights(out) == weights(whole)
    assert metrics(out) == metrics(whole)


def test_sigterm_saves_and_exits_with_143(world, tmp_path):
    flags = f"{SHORT} --steps 100000 --eval-limit 0 --out {tmp_path}/run"
    process = in_process(train.main, flags.split(), tmp_path / "output")
    while process.is_alive() and not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.02)
    process.terminate()
    process.join(timeout=60)
    text = (tmp_path / "output").read_text()
    assert process.exitcode == 143, text
    assert "Traceback" not in text and "--resume" in text.splitlines()[-1]
    assert list((tmp_path / "run").glob("checkpoint-*")) and (tmp_path / "run" / "student").is_dir()


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The folder of a run of six steps, which is not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        main(patch, f"{SHORT} --steps 6 --eval-limit 0 --out {folder}")
    return folder


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_last_two_checkpoints_are_kept(finished):
    names = sorted(p.name for p in finished.glob("checkpoint*"))
    assert names == ["checkpoint-000003.safetensors", "checkpoint-000006.safetensors"]


def test_a_checkpoint_holds_tensors_alone(finished):
    """No pickle: reading one cannot run code."""
    with open(finished / "checkpoint-000006.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kinds = {name.split("/")[0] for name in header if name != "__metadata__"}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step"}


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


FAULTS = {
    "cut": lambda content: content[:-9],
    "flipped": lambda content: flipped(content, len(content) - 5000, 0),
    "swapped": lambda content: content[:-8192] + content[-4096:] + content[-8192:-4096],
    "step": lambda content: content.replace(b'\\"step\\": 6', b'\\"step\\": 7'),
    "empty": lambda content: b"",
    "text": lambda content: b"no tensors",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_skipped(saved, monkeypatch, capsys, fault):
    """It is recognised and reported, and the one before is used."""
    before = weights(saved)
    path = saved / "checkpoint-000006.safetensors"
    content = path.read_bytes()
    damaged = FAULTS[fault](content)
    assert damaged != content
    path.write_bytes(damaged)
    main(monkeypatch, f"--resume {saved}")
    assert "checkpoint-000006.safetensors is damaged" in capsys.readouterr().err
    assert weights(saved) == before
    assert len(metrics(saved)) == 6


def test_every_flipped_bit_is_noticed(tmp_path):
    """In the header, whose step was once not part of the checksum, and in the tensors."""
    pair = pair_of(tiny(), tiny(seed=1))
    run = CheckpointedRun(tmp_path, pair, train.adamw(pair, train.Knobs()), train.Knobs())
    run.save()
    path = tmp_path / "checkpoint-000000.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    places = [*range(8), *rng.sample(range(8, header), 200), *rng.sample(range(header, len(content)), 20)]
    for place in places:
        path.write_bytes(flipped(content, place, rng.randrange(8)))
        with pytest.raises((SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError)):
            run.read_checkpoint(path)
    path.write_bytes(content)
    run.read_checkpoint(path)


def test_a_checkpoint_of_another_run_is_refused_by_name(saved, world, tmp_path, monkeypatch):
    """Also if that run had the same settings; a copy of the whole folder is the same run."""
    main(monkeypatch, f"{SHORT} --steps 3 --eval-limit 0 --out {tmp_path}/other")
    shutil.copy(tmp_path / "other" / "checkpoint-000003.safetensors", saved / "checkpoint-000009.safetensors")
    with pytest.raises(BadInput, match="checkpoint-000009.safetensors is of another run"):
        main(monkeypatch, f"--resume {saved}")
    (saved / "checkpoint-000009.safetensors").unlink()
    main(monkeypatch, f"--resume {saved}")


def test_without_an_intact_checkpoint_the_run_is_refused(saved, monkeypatch):
    for path in saved.glob("checkpoint-*"):
        path.write_bytes(b"")
    with pytest.raises(BadInput, match="no checkpoint in .* is intact"):
        main(monkeypatch, f"--resume {saved}")


def test_a_finished_run_without_checkpoints_is_kept_and_another_starts_anew(saved, monkeypatch, capsys):
    for path in saved.glob("checkpoint-*"):
        path.unlink()
    before = {path: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    with pytest.raises(BadInput, match="has finished, and has no checkpoint to continue from"):
        main(monkeypatch, f"--resume {saved} --steps 7")
    assert {path: path.read_bytes() for path in saved.iterdir() if path.is_file()} == before
    (saved / "summary.json").unlink()
    main(monkeypatch, f"--resume {saved}")
    assert f"{saved} has no checkpoint: starting at step 0" in capsys.readouterr().out


def test_two_runs_in_one_folder(saved, monkeypatch):
    with run_folder.exclusive(saved, fresh=False), pytest.raises(BadInput, match="another run is writing"):
        main(monkeypatch, f"--resume {saved} --steps 9")
    main(monkeypatch, f"--resume {saved} --steps 7")  # the lock is gone with its holder


def out_of_memory():
    torch.empty(1 << 60, dtype=torch.uint8)


def test_out_of_memory_saves_a_checkpoint_and_names_the_flags(whole, tmp_path, monkeypatch):
    score = train.score
    calls = []

    def hungry(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            out_of_memory()
        return score(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "score", hungry)
        shape = "step 4, 4 x 1 rollouts of at most [0-9]+ tokens"
        with pytest.raises(Stopped, match=f"{shape}: lower --micro-batch .*--resume"):
            main(monkeypatch, f"{SHORT} --eval-limit 0 --save-every 0 --out {tmp_path}/run")
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-000004.safetensors"]
    main(monkeypatch, f"--resume {tmp_path}/run")
    assert weights(tmp_path / "run") == weights(whole)  # evaluations do not change the training


def test_a_sampler_that_fails_on_the_way_loses_no_step(whole, tmp_path, monkeypatch):
    sample = train.rollout

    def failing(*args, **kwargs):
        if (tmp_path / "run/metrics.csv").exists() and len(metrics(tmp_path / "run")) == 4:
            raise BadInput("the engine has stopped")
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "rollout", failing)
        with pytest.raises(BadInput, match="the engine has stopped"):
            main(monkeypatch, f"{SHORT} --eval-limit 0 --save-every 0 --out {tmp_path}/run")
    assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-000004.safetensors"]
    main(monkeypatch, f"--resume {tmp_path}/run")
    assert weights(tmp_path / "run") == weights(whole)


def test_another_optimizer_loses_no_step_and_resumes(world, tmp_path, monkeypatch):
    """The state of SGD does not count its updates."""
    monkeypatch.setattr(
        train, "adamw", lambda pair, knobs: torch.optim.SGD(pair.masters.values(), momentum=0.9)
    )
    flags = f"{SHORT} --eval-limit 0 --lr 0.1 --out {tmp_path}"
    main(monkeypatch, f"{flags}/whole")
    sample = train.rollout
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise BadInput("a sampler of another kind")
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "rollout", failing)
        with pytest.raises(BadInput, match="of another kind"):
            main(monkeypatch, f"{flags}/parts")
    assert (tmp_path / "parts" / "checkpoint-000004.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train, "adamw", lambda pair, knobs: torch.optim.Adagrad(pair.masters.values()))
        with pytest.raises(BadInput, match="has the state of SGD: continue with that optimizer"):
            main(monkeypatch, f"--resume {tmp_path}/parts")
    main(monkeypatch, f"--resume {tmp_path}/parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_the_script_of_docs_trains_and_only_it_resumes_its_run(world, tmp_path, monkeypatch):
    """The loss is that of the first half of each answer; the answers shown are whole."""
    text = (Path(train.__file__).parent / "docs" / "running.md").read_text(encoding="utf-8")
    scripts = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = next(script for script in scripts if "train.main" in script)
    run = tmp_path / "run"
    seen = []
    monkeypatch.setattr(train, "score", partial(noted, train.score, seen))
    for steps in (2, 3):
        flags = f"{SHORT} --eval-limit 0 --steps 2 --out {run}" if steps == 2 else f"--resume {run} --steps 3"
        monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
        with pytest.raises(SystemExit) as end:
            exec(script, {})
        assert end.value.code == 0
        if steps == 2:
            with pytest.raises(BadInput, match="functions of the script changed since the run was started"):
                main(monkeypatch, f"--resume {run} --steps 3")
    assert len(metrics(run)) == len(seen) == 3
    lengths = [int(row["response_tokens"]) for row in metrics(run)]
    assert all(0 < with_loss < length for with_loss, length in zip(seen, lengths))
    (shown, _) = data.read_jsonl(run / "rollouts.jsonl")
    assert len(shown["response"]) == 5  # the horizon


def noted(score, seen, *args, **kwargs):
    loss, statistics = score(*args, **kwargs)
    seen.append(len(statistics["row"]))
    return loss, statistics


def test_functions_of_a_script_differ_by_name_and_by_the_arguments_of_a_partial():
    describe = run_folder.describe_functions
    assert describe(sampler=None, scorer=None) is None
    found = [describe(sampler=None, scorer=f) for f in (noted, partial(noted, 1), partial(noted, 2))]
    assert found == ["scorer noted", "scorer noted[[1], {}]", "scorer noted[[2], {}]"]
    assert describe(sampler=partial(noted, main), scorer=None) == 'sampler noted[["main"], {}]'
    assert describe(sampler=None, scorer=partial(noted, {(1, 2): 3}, {4})) == 'scorer noted[[{}, "set"], {}]'
    nested = [describe(scorer=partial(noted, partial(main, flag))) for flag in ("a", "b")]
    assert nested[0] == r'scorer noted[["main[[\"a\"], {}]"], {}]' != nested[1]


def test_a_script_with_a_scorer_has_one_tokenizer(world, tmp_path, monkeypatch):
    other = renumbered(world, tmp_path / "other")
    flags = f"{SHORT} --divergence sampled --teacher {other} --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    with pytest.raises(BadInput, match="the script's scorer score needs one tokenizer"):
        train.main(sampler=train.rollout, scorer=train.score)  # the sampler could stay
    assert not (tmp_path / "run").exists()


def test_out_of_memory_in_an_evaluation_saves_no_half_done_step(whole, tmp_path, monkeypatch):
    """The update is done by then, the step is not: a checkpoint would apply the update twice."""
    evaluate = train.evaluate

    def hungry(*args, path, **kwargs):
        if path.stem == "eval_step_6":
            out_of_memory()
        return evaluate(*args, path=path, **kwargs)

    for command in (f"{SHORT} --out {tmp_path}/run", f"--resume {tmp_path}/run"):
        with monkeypatch.context() as patch:
            patch.setattr(train, "evaluate", hungry)
            with pytest.raises(Stopped, match="lower --micro-batch or --eval-batch"):
                main(monkeypatch, command)
        assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-000003.safetensors"]
    main(monkeypatch, f"--resume {tmp_path}/run")
    assert weights(tmp_path / "run") == weights(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


def test_a_bug_keeps_its_traceback(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(monkeypatch, f"{SHORT} --eval-limit 0 --out {tmp_path}/run")


def test_non_finite_loss_names_the_offending_row(world, tmp_path, monkeypatch):
    score = train.score

    def poisoned(*args, **kwargs):
        _, tokens = score(*args, **kwargs)
        tokens["reverse_kl"][tokens["row"] == 2] = torch.nan
        return float("nan"), tokens

    monkeypatch.setattr(train, "score", poisoned)
    with pytest.raises(Stopped, match="step 0 has loss nan .*lower --lr"):
        main(monkeypatch, f"{SHORT} --eval-limit 0 --out {tmp_path}/run")
    found = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert set(found) == {"bad_rows", "bad", "batch", "step", "loss", "grad_norm"}
    assert found["step"] == 0 and found["loss"] == "nan" and float(found["grad_norm"]) > 0
    assert found["bad_rows"] == [2] and found["bad"] == [found["batch"][2]]
    assert len(found["batch"]) == 4 and all("assistant" in text for text in found["batch"])


def test_a_learning_rate_that_overflows_stops_before_the_weights_are_nan(world, tmp_path, monkeypatch):
    with pytest.raises(Stopped, match="step [1-9]"):
        main(monkeypatch, f"{SHORT} --lr 1e30 --clip 1e30 --eval-limit 0 --out {tmp_path}/run")
    assert json.loads((tmp_path / "run" / "non_finite.json").read_text())["step"] >= 1


@pytest.fixture
def disk(tmp_path):
    """A real file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_run_can_be_resumed(disk, whole, monkeypatch):
    (disk / "filler").write_bytes(b"x" * 3_000_000)
    with pytest.raises(Stopped, match="No space left.*--resume"):
        main(monkeypatch, f"{SHORT} --save-every 1 --out {disk}/run")
    assert not list((disk / "run").glob("*.part"))
    (disk / "filler").unlink()
    main(monkeypatch, f"--resume {disk}/run")
    assert weights(disk / "run") == weights(whole)
    assert metrics(disk / "run") == metrics(whole)


def test_a_folder_that_becomes_read_only_ends_in_one_line(disk, world, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk / "run")]
    with monkeypatch.context() as patch:
        after_each_step(patch, lambda run: subprocess.run(mount, check=True))
        with pytest.raises(Stopped, match="Read-only file system.*--resume"):
            main(monkeypatch, f"{SHORT} --steps 5 --eval-limit 0 --save-every 1 --out {disk}/run")
    subprocess.run(["umount", "-l", str(disk / "run")], check=True)
    main(monkeypatch, f"--resume {disk}/run")
    assert len(metrics(disk / "run")) == 5


def test_a_folder_that_is_deleted_during_the_run_ends_in_one_line(world, tmp_path, monkeypatch):
    after_each_step(monkeypatch, lambda run: shutil.rmtree(run.folder))
    with pytest.raises(Stopped, match="cannot write the run"):
        main(monkeypatch, f"{SHORT} --eval-limit 0 --out {tmp_path}/run")


@pytest.mark.slow
def test_no_tensor_of_a_step_is_kept(world, tmp_path, monkeypatch):
    """Nor one of an evaluation, nor of a checkpoint."""
    alive = []

    def count(run):
        if run.step in (3, 7):
            gc.collect()
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    after_each_step(monkeypatch, count)
    main(monkeypatch, f"{SHORT} --eval-every 2 --save-every 2 --out {tmp_path}/run")
    assert alive[0] == alive[1]


def test_checkpoint_of_a_student_that_is_trained_in_part(tmp_path):
    """Frozen weights are not saved, and AdamW's state finds its weight by name."""
    runs = []
    for _ in range(2):
        student = tiny()
        student.model.layers[0].requires_grad_(False)
        pair = pair_of(student, tiny(seed=1))
        runs.append(CheckpointedRun(tmp_path, pair, train.adamw(pair, train.Knobs()), train.Knobs()))
    first, second = runs
    first.pair.student(input_ids=torch.arange(9)[None]).logits.square().sum().backward()
    first.optimizer.step()
    first.step = 1
    run_folder.append_csv(tmp_path / "metrics.csv", [{"step": 0}])
    first.save()
    second.load(2)
    assert second.step == 1
    saved, loaded = first.tensors(), second.tensors()
    assert saved.keys() == loaded.keys() and not any("layers.0." in name for name in saved)
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_student_that_can_be_saved_passes_and_leaves_nothing(world, tmp_path, tied, adapters):
    student = tiny(tie_word_embeddings=tied)
    if adapters:
        lora.add_adapters(student)
    pair = train.replace(
        pair_of(student, tiny(seed=1)), tokenizer=AutoTokenizer.from_pretrained(world / "student")
    )
    CheckpointedRun(tmp_path, pair, train.adamw(pair, train.Knobs()), train.Knobs()).check_saving()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [AttributeError("no base_layer"), ValueError("invalid"), OSError("full")])
def test_what_cannot_be_saved_is_refused_before_the_first_step(world, tmp_path, monkeypatch, error):
    """It failed when all steps were done, and the student was lost."""

    def fail(model, tokenizer, folder, state_dict):
        folder.mkdir()
        raise error

    monkeypatch.setattr(models, "save_model", fail)
    with pytest.raises(BadInput, match=f"the student cannot be saved .*{error}"):
        main(monkeypatch, f"{SHORT} --out {tmp_path}/runs/a")
    assert not list(tmp_path.iterdir())


def test_what_is_saved_in_part_is_refused_before_the_first_step(world, tmp_path, monkeypatch):
    save_model = models.save_model

    def lose_a_weight(model, tokenizer, folder, state_dict):
        weights = dict(model.state_dict())
        del weights["model.norm.weight"]
        save_model(model, tokenizer, folder, weights)

    monkeypatch.setattr(models, "save_model", lose_a_weight)
    with pytest.raises(BadInput, match="cannot be saved .*lacks 1 weights, such as model.norm.weight"):
        main(monkeypatch, f"{SHORT} --out {tmp_path}/run")
    assert not list(tmp_path.iterdir())


def test_a_generation_config_that_contradicts_itself_is_saved_without_the_contradiction(
    world, tmp_path, monkeypatch
):
    """Greedy with a temperature: published models have it, and transformers refuses to save it."""
    shutil.copytree(world / "student", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    content = json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6, "top_k": 20}
    path.write_text(json.dumps(content | {"repetition_penalty": 1.1}))
    main(monkeypatch, f"{SHORT} --steps 1 --eval-limit 0 --student {tmp_path}/model --out {tmp_path}/run")
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "student")
    assert (saved.temperature, saved.top_k, saved.repetition_penalty) == (None, None, 1.1)
    saved.validate(strict=True)
