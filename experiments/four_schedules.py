"""The four schedules on the toy world, one run each: python experiments/four_schedules.py

Writes results/toy.csv, a row a run, and TOPD's curve, results/toy_topd.png. One seed, so no claim about which
is best: it shows that all four work, and what they cost.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import report

PHASES = ("rollout_s", "score_s", "update_s")
RUNS = ["--schedule full", "--schedule popd", "--schedule topd --horizon 0.1", "--schedule esr --horizon 20"]
RUNS += ["--schedule full --world closing", "--schedule topd --world closing"]  # the counter-example


def main() -> None:
    table = ROOT / "results" / "toy.csv"
    table.parent.mkdir(exist_ok=True)
    table.unlink(missing_ok=True)
    for flags in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, ROOT / "train.py", "--preset", "toy", *flags.split(), "--out", out]
            subprocess.run(command, check=True)
            summary = json.loads((out / "summary.json").read_text())
            row = {"flags": flags}
            for name in ("before", "after", "teacher"):
                row |= {name: summary[name]["accuracy"], f"{name}_se": summary[name]["se"]}
            row |= {"n": summary["after"]["n"], "response_tokens": summary["response_tokens"]}
            row |= {"seconds": sum(float(r[c]) for r in report.read_csv(out / "metrics.csv") for c in PHASES)}
            row["hardware"] = json.loads((out / "config.json").read_text())["environment"]["hardware"]
            report.append_csv(table, [row])
            if flags == "--schedule topd --horizon 0.1":
                shutil.copy(out / "curve.png", table.with_name("toy_topd.png"))


if __name__ == "__main__":
    main()
