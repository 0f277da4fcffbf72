"""Nothing lost: real kills, a full disk, files cut short. Every resumed run ends bit for bit the same.

The toy run of these tests has 16 steps of 4 short rollouts. `pytest --kills 20` kills it twenty times.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import cli
import report
import train
from checkpoint import SIGNALS, State

ROOT = Path(train.__file__).parent
SHORT = "--preset toy --steps 16 --batch-size 4 --max-new-tokens 40 --horizon 13"
SHORT += " --eval-limit 6 --eval-every 6 --save-every 3 --show-every 2"


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    return train.main()


def weights(folder):
    return (folder / "student" / "model.safetensors").read_bytes()


def metrics(folder):
    """metrics.csv but for the columns that a clock fills."""
    clocks = ("rollout_s", "score_s", "update_s", "seconds")
    return [
        {k: v for k, v in row.items() if k not in clocks} for row in report.read_csv(folder / "metrics.csv")
    ]


def stop_after(monkeypatch, steps, number):
    """As Ctrl-C does it: a signal in the middle of step `steps`; a second one would kill at once."""
    log_step, done = report.log_step, []

    def log_and_stop(*args):
        log_step(*args)
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL

    monkeypatch.setattr(report, "log_step", log_and_stop)


@pytest.fixture
def listening():
    """A signal that this process was told to ignore, as under nohup, would not stop a run either."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "flags, number",
    [
        ("--schedule full --horizon 40", signal.SIGINT),
        ("--schedule popd --horizon 5 --divergence sampled", signal.SIGTERM),
        ("--schedule topd --micro-batch 80 --rollouts-per-prompt 2", signal.SIGHUP),
        ("--schedule esr --horizon 9 --eval-temperature 0", signal.SIGINT),
    ],
)
def test_ten_steps_are_five_and_resume_and_five(listening, world, tmp_path, monkeypatch, flags, number):
    """Resumes lost the optimizer, a generator, the horizon or the data cursor."""
    flags = f"{SHORT} {flags} --steps 10 --eval-every 4"
    main(monkeypatch, f"{flags} --out {tmp_path}/whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5, number)
        with pytest.raises(cli.Stopped) as stop:
            main(monkeypatch, f"{flags} --out {tmp_path}/parts")
    assert stop.value.code == 128 + number and "--resume" in str(stop.value)
    assert len(metrics(tmp_path / "parts")) == 5
    torch.manual_seed(123)  # what another process would have
    main(monkeypatch, f"--resume {tmp_path}/parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for name in ("positions.csv", "eval_step_4.jsonl"):
        texts = [(tmp_path / run / name).read_text() for run in ("whole", "parts")]
        assert len(texts[0].splitlines()) == len(texts[1].splitlines())
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "parts")]
    assert [s["after"]["accuracy"] for s in summaries][0] == summaries[1]["after"]["accuracy"]
    assert summaries[0]["response_tokens"] == summaries[1]["response_tokens"]


def test_a_run_that_is_done_may_grow(world, tmp_path, monkeypatch):
    main(monkeypatch, f"{SHORT} --steps 4 --out {tmp_path}/run")
    main(monkeypatch, f"--resume {tmp_path}/run --steps 7 --micro-batch 99")
    assert [int(row["step"]) for row in metrics(tmp_path / "run")] == list(range(7))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 7


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--lr 1", "--lr 1.0 would change the run"),
        ("--steps 3", "can only grow"),
        ("--schedule full", "--schedule full would change"),
        ("--seed 4 --steps 9", "--seed 4"),
    ],
)
def test_a_flag_that_changes_the_run_is_refused(world, tmp_path, monkeypatch, flags, names):
    (tmp_path / "config.json").write_text(json.dumps({**vars(train.Knobs()), "steps": 8}))
    with pytest.raises(cli.BadInput, match=names):
        main(monkeypatch, f"--resume {tmp_path} {flags}")


def start(folder, flags=SHORT):
    """The run in a process of its own, which has neither a home nor UTF-8: that must not matter."""
    given = f"--resume {folder}" if (folder / "config.json").exists() else f"{flags} --out {folder}"
    if "--out" in given:
        shutil.rmtree(folder, ignore_errors=True)
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    env = os.environ | odd | {"HOME": "/nonexistent"}
    command = [sys.executable, str(ROOT / "train.py"), *given.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def test_kills_at_random_moments_end_bit_for_bit_the_same(world, tmp_path, monkeypatch, request):
    """kill -9, in the middle of a step, of an evaluation, of a save."""
    main(monkeypatch, f"{SHORT} --out {tmp_path}/whole")
    rng, out = random.Random(1), tmp_path / "killed"
    moments = ["metrics.csv", "checkpoint-*.part", "eval_step_*.jsonl", "checkpoint-*rs"]
    for _ in range(request.config.getoption("--kills")):
        process, moment, deadline = start(out), rng.choice(moments), time.time() + 60
        seen = {p: p.stat().st_size for p in out.glob(moment)}
        while time.time() < deadline and process.poll() is None:
            if {p: p.stat().st_size for p in out.glob(moment) if p.exists()} != seen:
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
    main(monkeypatch, f"--resume {out}")
    assert weights(out) == weights(tmp_path / "whole") and metrics(out) == metrics(tmp_path / "whole")


def test_sigterm_saves_and_ends_with_143(world, tmp_path):
    process = start(tmp_path / "run", f"{SHORT} --steps 100000 --eval-limit 0")
    while not (tmp_path / "run" / "metrics.csv").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err and "--resume" in err.splitlines()[-1]
    assert list((tmp_path / "run").glob("checkpoint-*")) and (tmp_path / "run" / "student").is_dir()


@pytest.fixture
def saved(world, tmp_path, monkeypatch):
    main(monkeypatch, f"{SHORT} --steps 6 --eval-limit 0 --out {tmp_path}/run")
    return tmp_path / "run"


def test_the_last_two_checkpoints_are_kept(saved):
    assert sorted(p.name for p in saved.glob("checkpoint*")) == [
        f"checkpoint-00000{n}.safetensors" for n in (3, 6)
    ]


@pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "text"])
def test_a_broken_checkpoint_is_passed_over(saved, monkeypatch, capsys, fault):
    """Cut short, a byte changed, nothing in it: known as broken, said, and the one before is used."""
    before, path = weights(saved), saved / "checkpoint-000006.safetensors"
    content = path.read_bytes()
    flipped = content[:-5000] + bytes([content[-5000] ^ 1]) + content[-4999:]
    path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b"", "text": b"no tensors"}[fault])
    main(monkeypatch, f"--resume {saved}")
    assert "checkpoint-000006.safetensors is broken" in capsys.readouterr().err
    assert weights(saved) == before and len(metrics(saved)) == 6


def test_without_a_whole_checkpoint_the_run_says_so(saved, monkeypatch):
    for path in saved.glob("checkpoint-*"):
        path.write_bytes(b"")
    with pytest.raises(cli.BadInput, match="no checkpoint in .* is whole"):
        main(monkeypatch, f"--resume {saved}")


def test_a_checkpoint_is_tensors_alone(saved):
    """No pickle: what is read back cannot run code."""
    with open(saved / "checkpoint-000006.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {"weight", "exp_avg", "exp_avg_sq", "step", "rng"} == {
        k.split("/")[0] for k in header if k[0] != "_"
    }


def test_two_runs_in_one_folder(saved, monkeypatch):
    with report.only_run(saved, fresh=False), pytest.raises(cli.BadInput, match="another run is writing"):
        main(monkeypatch, f"--resume {saved} --steps 9")
    main(monkeypatch, f"--resume {saved} --steps 7")  # the lock is gone with its holder


def test_out_of_memory_leaves_a_checkpoint_and_says_what_to_turn(world, tmp_path, monkeypatch):
    score, calls = train.score, []

    def hungry(*args):
        calls.append(1)
        if len(calls) == 5:
            torch.empty(1 << 60, dtype=torch.uint8)
        return score(*args)

    flags = f"{SHORT} --eval-limit 0 --save-every 0 --out {tmp_path}"
    main(monkeypatch, f"{flags}/whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "score", hungry)
        with pytest.raises(cli.Stopped, match="step 4, 4 x 1 rollouts, horizon 13: lower --micro"):
            main(monkeypatch, f"{flags}/run")
    main(monkeypatch, f"--resume {tmp_path}/run")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_out_of_memory_in_an_evaluation_saves_no_half_done_step(world, tmp_path, monkeypatch):
    """The update is done by then, the step is not: a checkpoint would apply the update twice."""
    import prepare

    flags, evaluate = f"{SHORT} --save-every 3 --out {tmp_path}", prepare.evaluate
    main(monkeypatch, f"{flags}/whole")

    def hungry(*args, **kwargs):
        if args[5].stem in ("eval_step_6", "eval_after"):
            torch.empty(1 << 60, dtype=torch.uint8)
        return evaluate(*args, **kwargs)

    for again in (f"{flags}/run", f"--resume {tmp_path}/run"):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "evaluate", hungry)
            with pytest.raises(cli.Stopped, match="lower --micro-batch or --eval-batch"):
                main(monkeypatch, again)
        assert [p.name for p in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-000003.safetensors"]
    main(monkeypatch, f"--resume {tmp_path}/run")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_bug_keeps_its_traceback(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(monkeypatch, f"{SHORT} --eval-limit 0 --out {tmp_path}/run")


def test_not_finite_names_the_offending_row(world, tmp_path, monkeypatch):
    score = train.score

    def poisoned(*args):
        loss, stats, seconds = score(*args)
        stats["reverse_kl"][stats["row"] == 2] = torch.nan
        return float("nan"), stats, seconds

    monkeypatch.setattr(train, "score", poisoned)
    with pytest.raises(cli.Stopped, match="step 0 gave loss nan"):
        main(monkeypatch, f"{SHORT} --eval-limit 0 --out {tmp_path}/run")
    found = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert found["bad_rows"] == [2] and found["bad"] == [found["batch"][2]] and len(found["problems"]) == 4


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


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(disk, world, tmp_path, monkeypatch):
    """With room again the run resumes to the same end."""
    flags = f"{SHORT} --eval-limit 0 --save-every 1"
    main(monkeypatch, f"{flags} --out {tmp_path}/whole")
    (disk / "filler").write_bytes(b"x" * 3_000_000)
    with pytest.raises(cli.Stopped, match="No space left.*--resume"):
        main(monkeypatch, f"{flags} --out {disk}/run")
    assert not list((disk / "run").glob("*.part"))
    (disk / "filler").unlink()
    main(monkeypatch, f"--resume {disk}/run")
    assert weights(disk / "run") == weights(tmp_path / "whole")
    assert metrics(disk / "run") == metrics(tmp_path / "whole")


def test_a_folder_that_becomes_read_only_ends_in_one_line(disk, world, monkeypatch):
    log_step, mount = report.log_step, ["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk / "run")]

    def log_and_lock(*args):
        log_step(*args)
        subprocess.run(mount, check=True)

    with monkeypatch.context() as patch:
        patch.setattr(report, "log_step", log_and_lock)
        with pytest.raises(cli.Stopped, match="Read-only file system.*--resume"):
            main(monkeypatch, f"{SHORT} --eval-limit 0 --save-every 1 --out {disk}/run")
    subprocess.run(["umount", "-l", str(disk / "run")], check=True)
    main(monkeypatch, f"--resume {disk}/run")
    assert len(metrics(disk / "run")) == 16


def test_a_folder_that_is_deleted_under_way_ends_in_one_line(world, tmp_path, monkeypatch):
    out, log_step = tmp_path / "run", report.log_step

    def log_and_delete(*args):
        shutil.rmtree(out)
        log_step(*args)

    monkeypatch.setattr(report, "log_step", log_and_delete)
    with pytest.raises(cli.Stopped, match="cannot write the run"):
        main(monkeypatch, f"{SHORT} --eval-limit 0 --out {out}")


def test_memory_of_a_long_run_is_flat(world, tmp_path, monkeypatch, request):
    """Resident memory after a fifth of the run and at its end, evaluations included."""
    sizes, log_step = [], report.log_step

    def log_and_weigh(*args):
        log_step(*args)
        sizes.append(psutil.Process().memory_info().rss)

    monkeypatch.setattr(report, "log_step", log_and_weigh)
    steps = 300 if request.config.getoption("--kills") > 3 else 60
    main(monkeypatch, f"{SHORT} --steps {steps} --eval-every 20 --out {tmp_path}/run")
    assert sizes[-1] < 1.03 * sizes[len(sizes) // 5]


def test_state_of_a_student_that_trains_in_part(tmp_path):
    """Frozen weights are not saved, and AdamW's state finds its weight by name."""
    from conftest import pair_of, tiny

    pairs, states = [], []
    for _ in range(2):
        student = tiny()
        student.model.layers[0].requires_grad_(False)
        pairs.append(pair := pair_of(student, tiny(seed=1)))
        optimizer = torch.optim.AdamW(pair.masters.values(), fused=True)
        states.append(State(tmp_path, pair, optimizer, torch.Generator().manual_seed(1), 1))
    student = pairs[0].student
    student(input_ids=torch.arange(9)[None]).logits.square().sum().backward()
    states[0].optimizer.step()
    states[0].step = 1
    states[0].save()
    states[1].load(2)
    assert states[1].step == 1 and not any("layers.0." in name for name in states[0].tensors())
    theirs = states[1].tensors()
    assert all(torch.equal(value, theirs[name]) for name, value in states[0].tensors().items())
