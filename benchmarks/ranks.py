"""Tokens per second of training steps in one process, and in several that torchrun starts.

    python benchmarks/ranks.py                                                   the toy, 1 and 2 processes
    python benchmarks/ranks.py --flags "--student PATH --teacher PATH --data FILE" --processes 1 --processes 4

Each process has --threads CPU threads. The runs alternate, so that a machine that becomes slower does so for
all. Of each run the first step warms up, and the sums over the others count. Rows are added to
results/bench_ranks.csv.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sides  # also puts the project on the path

from support import run_folder
from support.cli import BadInput, knob, parse, run_main

PHASES = ("rollout_s", "score_s", "update_s")


@dataclass(frozen=True)
class Knobs:
    flags: str = knob("--preset toy --schedule full", "of train.py")
    processes: tuple[str, ...] = knob((), "may be repeated; default: 1 and 2")
    threads: int = knob(1, "CPU threads of each process", least=1)
    steps: int = knob(5, "timed steps, after one that is not", least=1)
    repeats: int = knob(2, "runs with each number of processes", least=1)
    out: str = knob("", "CSV file; default: results/bench_ranks.csv")


def measure(knobs: Knobs, processes: str, folder: Path) -> dict[str, Any]:
    """The row of one run. Raises BadInput if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["train.py", *knobs.flags.split(), f"--steps={knobs.steps + 1}", f"--out={folder}"]
    command += ["--eval-limit=0", "--save-every=0", "--show-every=0"]
    environment = os.environ | {"OMP_NUM_THREADS": str(knobs.threads)}
    done = subprocess.run(command, cwd=sides.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        raise BadInput(f"{processes} processes failed ({(lines or [done.stderr[-300:]])[0]}): change --flags")
    timed = run_folder.read_csv(folder / "metrics.csv")[1:]
    totals = {name: sum(float(row[name]) for row in timed) for name in (*PHASES, "response_tokens")}
    rate = totals["response_tokens"] / sum(totals[name] for name in PHASES)
    about = {"flags": knobs.flags, "processes": int(processes), "threads": knobs.threads}
    return about | {"steps": knobs.steps} | totals | {"tokens_per_s": rate, "cpus": os.cpu_count()}


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    processes = knobs.processes or ("1", "2")
    if not all(number.isdecimal() and int(number) for number in processes):
        raise BadInput(f"--processes {' '.join(processes)}: give whole numbers from 1")
    out = Path(knobs.out or sides.ROOT / "results" / "bench_ranks.csv")
    run_folder.prepare_file(out, "--out")
    for _ in range(knobs.repeats):
        for number in processes:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(knobs, number, Path(folder, "run"))
            print(row, flush=True)
            run_folder.append_csv(out, [row])


if __name__ == "__main__":
    run_main(main)
