"""Each benchmark runs from its flags to its rows, with the toy's models or tiny shapes."""

import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import gpu
import parts
import pytest
import ranks as bench_ranks
import sides
import steps
from helpers import tiny

import train
from support.cli import BadInput
from support.run_folder import read_csv, write_csv

pytestmark = pytest.mark.slow

SCRIPTS = {parts.__file__: parts, steps.__file__: steps}
NEEDS = {"trl": "trl", "liger": "liger_kernel", "ours-low-memory": "peft"}
LOSS = ("--part=loss", "--tokens=8", "--vocab=50", "--student-width=8", "--teacher-width=12", "--repeats=1")


def every(names):
    """Parameters of a test, one per side; sides whose library is not installed are skipped."""
    found = []
    for name in names:
        missing = name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None
        found.append(pytest.param(name, marks=pytest.mark.skipif(missing, reason="not installed")))
    return pytest.mark.parametrize("side", found)


def columns(name: str) -> set[str]:
    """Those of the committed results, which the README's tables are made of."""
    return set(read_csv(sides.ROOT / "results" / f"bench_{name}.csv")[0])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function (script, flags) -> the rows of its CSV file; its sides are measured in this process."""

    def measure_here(path: str, side: str, given: dict) -> dict:
        script = SCRIPTS[path]
        return script.measure(script.Knobs(**(given | {"side": side})))

    def call(script, *flags: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sides, "measure_apart", measure_here)
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags, f"--out={tmp_path / 'out.csv'}"])
        script.main()
        return read_csv(tmp_path / "out.csv")

    return call


@pytest.fixture
def pair(world) -> list[str]:
    """Flags of a small step of the toy's models."""
    models = [f"--{name}={world / name}" for name in ("student", "teacher")]
    return [*models, f"--data={world}", "--dtype=float32", "--prompts=2", "--tokens=4", "--steps=1"]


@every(steps.SIDES)
def test_steps(run, pair, side):
    (row,) = run(steps, *pair, f"--sides={side}")
    assert columns("steps") <= set(row)
    assert row["side"] == side
    if side.startswith("ours"):
        parts_of_step = sum(float(row[name]) for name in ("rollout_s", "score_s", "update_s"))
        assert 0 < parts_of_step < float(row["seconds"])
        assert float(row["estimate_gb"]) > 0


@every(("ours", "naive"))
def test_endless_answers_reach_the_horizon(run, pair, side):
    (row,) = run(steps, *pair, "--endless", f"--sides={side}")
    assert float(row["response_tokens"]) == 2 * 4


def test_growth(run, pair, tmp_path):
    """The table is replaced once all lengths are measured, and drawn."""
    write_csv(tmp_path / "out.csv", ["tokens"], [{"tokens": 1}])
    rows = run(steps, *pair, "--growth=8")
    assert columns("growth") <= set(rows[0])
    assert [row["tokens"] for row in rows] == ["4", "8"]
    assert [float(row["response_tokens"]) for row in rows] == [2 * 4, 2 * 8]
    assert (tmp_path / "out.png").stat().st_size > 0
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@every(parts.SIDES["loss"])
def test_loss(run, side, dtype):
    """All sides compute the same loss and the same gradient."""
    rows = run(parts, *LOSS, f"--dtype={dtype}", "--sides=naive", f"--sides={side}")
    assert columns("loss") <= set(rows[0])
    tolerance = 1e-4 if dtype == "float32" else 0.25  # Liger takes bf16 log-probabilities
    for name in ("loss", "grad_norm"):
        assert float(rows[1][name]) == pytest.approx(float(rows[0][name]), rel=tolerance)


@every(parts.SIDES["rollouts"])
def test_rollouts(run, world, side):
    flags = (f"--model={world / 'student'}", f"--data={world}", "--horizon=4", "--rows=3", "--repeats=1")
    (row,) = run(parts, "--part=rollouts", *flags, "--every=0", f"--sides={side}")
    assert columns("rollouts") <= set(row)
    assert row["response_tokens"] == "12"
    assert row["tokens"] == row["shortest"] == row["longest"] == "4"


def test_evaluation(run, world):
    """Half of the graded answers are right, and those that equal the gold answer by chance."""
    (grading,) = run(parts, "--part=evaluation", f"--data={world}", "--answers=20")
    assert 10 <= int(grading["right"]) <= 20 and float(grading["ours_s"]) > 0


def test_sides_run_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    """With the flags that were given; the last line is the result."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys; print('loading'); print(json.dumps([os.getpid(), sys.argv[1:]]))"
    )
    given = {"tokens": 8, "student_width": 8, "endless": True, "compiled": False, "sides": ("ours",)}
    process, flags = sides.measure_apart(str(script), "ours", given)
    assert process != os.getpid()
    assert flags == ["--side=ours", "--tokens=8", "--student-width=8", "--endless", "--no-compiled"]
    monkeypatch.setattr(sys, "argv", [parts.__file__, *LOSS, "--side=ours"])
    parts.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["loss"] > 0


def test_a_side_that_fails_is_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import no_such_library")
    with pytest.raises(BadInput, match="side trl failed .*no_such_library.*select others with --sides"):
        sides.measure_apart(str(script), "trl", {"endless": True})


def test_everything_for_a_gpu_runs_on_a_cpu(run, capsys):
    """Every side, none of which fails, with the columns that a GPU's rows have."""
    pytest.importorskip("peft")
    rows = run(gpu, "--tiny")
    assert [row["error"] for row in rows] == [""] * len(rows)
    steps, rollouts = ([row for row in rows if row["part"] == part] for part in ("steps", "rollouts"))
    assert {row["side"] for row in rollouts} == {*parts.SAMPLERS, "plain-cudnn"}
    assert {row["side"] for row in steps} == {*gpu.STEPS["full"], *gpu.STEPS["topd"]}
    assert all(row["hardware"] and float(row["seconds"]) > 0 for row in rows)
    assert all(float(row["bandwidth_share"]) > 0 for row in rollouts)
    estimated = {row["side"] for row in rows if row["estimate_gb"]}
    assert estimated == {"ours-graphs", "ours-graphs-8192", "ours-checkpointing", "ours-low-memory"}
    assert {"peak_gb", "reserved_gb", "device_gb", "estimate_tensors_gb"} <= set(rows[0])
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("rollouts ", "steps ")) for line in printed) == len(rows)


def test_a_side_that_fails_on_the_gpu_leaves_its_reason(run, monkeypatch, tmp_path):
    def fail(*args):
        raise BadInput("side x failed (out of memory)")

    def planned(*args):
        yield steps, "x", {}, {"part": "steps", "rows": 1, "tokens": 2}
        raise KeyboardInterrupt  # what was measured before a stop stays

    monkeypatch.setattr(gpu, "measurements", planned)
    monkeypatch.setattr(steps, "measure", fail)
    monkeypatch.setattr(steps, "Knobs", dict)
    with pytest.raises(KeyboardInterrupt):
        run(gpu, "--tiny")
    (row,) = read_csv(tmp_path / "out.part")
    assert row["error"] == "side x failed (out of memory)" and row["hardware"]


def test_the_memory_next_to_its_estimate():
    row = {"part": "steps", "side": "ours", "rows": 16, "tokens": 102, "error": "", "seconds": 2.0}
    row |= {"peak_gb": 12.0, "reserved_gb": 13.0, "device_gb": 13.5, "estimate_gb": 14.0}
    assert "of the device 13.50, estimated 14.00 (+4%, as wanted)" in gpu.summary(row)
    assert "(+48%, beyond 15%)" in gpu.summary(row | {"estimate_gb": 20.0})


def test_cache_reads_are_those_of_every_token_before():
    model = tiny()  # 2 layers, 2 key heads of 4 fp32 numbers: 128 bytes of keys and values per token
    assert parts.cache_reads(model, [[1] * 5, [1]], [3, 1]) == 128 * ((5 + 6 + 7) + 1)


def test_ranks(world, tmp_path, monkeypatch):
    """The rows of a run, which torchrun starts in processes of their own and here is in this one."""
    run = bench_ranks.subprocess.run

    def run_here(command, **options):
        if "torch.distributed.run" not in command:  # git, for the commit in config.json
            return run(command, **options)
        if "--nproc-per-node=3" in command:
            return SimpleNamespace(returncode=2, stderr="a log\nerror: 2 answers for 3 processes\n")
        monkeypatch.setattr(sys, "argv", command[5:])
        return SimpleNamespace(returncode=train.main())

    monkeypatch.setattr(bench_ranks.subprocess, "run", run_here)
    flags = "--preset toy --batch-size 2 --max-new-tokens 4"
    knobs = bench_ranks.Knobs(flags=flags, steps=1)
    row = bench_ranks.measure(knobs, "1", tmp_path / "run")
    assert row["processes"] == 1 and 0 < row["response_tokens"] <= 8  # of the second step
    seconds = row["rollout_s"] + row["score_s"] + row["update_s"]
    assert row["tokens_per_s"] == pytest.approx(row["response_tokens"] / seconds)
    with pytest.raises(BadInput, match="3 processes failed .error: 2 answers for 3 processes.: change"):
        bench_ranks.measure(knobs, "3", tmp_path / "other")
