"""The four schedules on the toy world, one run of train.py each.

    python experiments/four_schedules.py

Writes results/toy.csv, one row per run, and TOPD's curve, results/toy_topd.png, when all runs have finished.
One seed says nothing about which schedule is best: this shows that all four work, and what they cost.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from root import RESULTS, ROOT

from support.cli import NoKnobs, Stopped, parse, run_main
from support.run_folder import read_csv, write_csv

TOPD = "--schedule topd --horizon 0.1"
RUNS = ["--schedule full", "--schedule popd", TOPD, "--schedule esr --horizon 20"]
RUNS += ["--schedule full --world closing", "--schedule topd --world closing"]  # where truncation fails


def train_row(flags: str, out: Path) -> dict:
    """Train with these flags in the run folder `out`: the row of the table."""
    command = [sys.executable, ROOT / "train.py", "--preset", "toy", *flags.split(), "--out", out]
    code = subprocess.run(command).returncode
    if code:
        raise Stopped(code, f"train.py {flags} failed, see above; no result was changed")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    row = {"flags": flags}
    for name in ("before", "after", "teacher"):
        row |= {name: summary[name]["accuracy"], f"{name}_se": summary[name]["se"]}
    row |= {"n": summary["after"]["n"], "response_tokens": summary["response_tokens"]}
    metrics = read_csv(out / "metrics.csv")
    seconds = sum(float(step[name]) for step in metrics for name in ("rollout_s", "score_s", "update_s"))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return row | {"seconds": seconds, "hardware": config["environment"]["hardware"]}


def main() -> None:
    parse(NoKnobs, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        rows = [train_row(flags, Path(folder, flags)) for flags in RUNS]
        shutil.copy(Path(folder, TOPD, "curve.png"), RESULTS / "toy_topd.png")
    write_csv(RESULTS / "toy.csv", list(rows[0]), rows)


if __name__ == "__main__":
    run_main(main)
