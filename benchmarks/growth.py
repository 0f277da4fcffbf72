"""How a step grows with the length of the answers: time and memory from 128 to 4,096 response tokens.

    python benchmarks/growth.py --student PATH --teacher PATH --data FILE

Each length is a process of its own (benchmarks/steps.py, answers that run to the horizon). Writes
results/bench_growth.csv and draws results/bench_growth.png.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from sides import ROOT, measure_apart  # puts the project on the path

import report
from cli import knob, parse, run

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

LENGTHS = (128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Knobs:
    student: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder")
    teacher: str = knob("Qwen/Qwen2.5-1.5B-Instruct", "hub name or folder")
    data: str = knob("openai/gsm8k:main", "problems; its train split")
    prompts: int = knob(1, "a step", 1)
    dtype: str = knob("bfloat16", "of matmuls", choices=("float32", "bfloat16"))
    device: str = knob("cpu", "cpu or cuda")
    out: str = knob(
        str(ROOT / "results" / "bench_growth.csv"), "CSV file, written anew; the figure beside it"
    )


def draw(table: Path) -> Path:
    """Seconds of a step, stacked by phase, and peak memory, by response tokens; dotted: linear growth."""
    rows = report.read_csv(table)
    tokens = [int(row["tokens"]) for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    phases = ("rollout_s", "score_s", "update_s")
    stacked = [[float(row[phase]) for row in rows] for phase in phases]
    labels = ("sampling", "teacher", "student's update")
    left.stackplot(tokens, stacked, labels=labels, colors=("#0072b2", "#e69f00", "#009e73"), alpha=0.8)
    whole = [sum(parts) for parts in zip(*stacked)]
    left.plot([0, tokens[-1]], [0, whole[-1]], ":", color="black", label="linear")
    left.set(title="seconds a step", xlabel="response tokens", xlim=(0, None), ylim=(0, None))
    left.legend(loc="upper left")
    right.plot(tokens, [float(row["peak_gb"]) for row in rows], "o-", color="#d55e00", label="measured")
    whole = [float(row["estimate_gb"]) + float(row["baseline_gb"]) for row in rows]
    right.plot(tokens, whole, "x--", color="#56b4e9", label="estimated by --dry-run, plus the libraries")
    right.set(title="peak memory, GB", xlabel="response tokens", xlim=(0, None), ylim=(0, None))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(table.with_suffix(".png"), dpi=110)
    return table.with_suffix(".png")


def main() -> None:
    given = parse(Knobs, __doc__, None)
    knobs = Knobs(**given)
    table = Path(knobs.out)
    table.unlink(missing_ok=True)
    flags = [
        f"--{name}={getattr(knobs, name)}" for name in ("student", "teacher", "data", "prompts", "dtype")
    ]
    flags += [f"--device={knobs.device}", "--endless", "--steps=1"]
    hardware = {"hardware": report.environment(torch.device(knobs.device))["hardware"]}
    script = str(Path(__file__).with_name("steps.py"))
    for length in LENGTHS:
        row = measure_apart(script, "ours-checkpointing", [*flags, f"--tokens={length}"])
        row = {"model": Path(knobs.student).name, "prompts": knobs.prompts, "tokens": length} | row | hardware
        print(json.dumps(row), flush=True)
        report.append_csv(table, [row])
    print(draw(table))


if __name__ == "__main__":
    run(main)
