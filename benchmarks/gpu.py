"""What only a GPU can show; benchmarks/gpu.sh runs the tests on it first, then this.

    benchmarks/gpu.sh             one CUDA card, ten minutes or more, no network
    benchmarks/gpu.sh --tiny      the same with tiny models on a CPU, about a minute

The models have random weights in the shapes of Qwen2.5 0.5B and 1.5B, and the toy's tokenizer and problems:
speed and memory depend on shapes alone. Measured, each side in a process of its own:

steps       a whole step of this project, of a naive loop, and under autocast; peaks of memory next to what
            `--dry-run` estimates
rollouts    the samplers: tokens per second, and the share of the card's bandwidth that reading weights and KV
            cache takes; for fewer tokens the plain one with cuDNN's attention, which is off otherwise

Rows go to results/gpu.csv, which is replaced at the end; those of a stopped run stay in results/gpu.part.
Where a side fails, the column `error` says why.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parts
import sides  # also puts the project on the path
import steps
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from support import models, run_folder, toy
from support.cli import BadInput, knob, parse, run_main

QWEN = {"num_key_value_heads": 2, "vocab_size": 151_936}
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
BIG = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS = {  # horizon -> sides
    "full": ("ours-graphs", "ours-graphs-8192", "ours-checkpointing", "naive"),
    "topd": ("ours-graphs", "ours-checkpointing", "ours-low-memory", "naive", "autocast"),
}
WANTED = 0.15  # largest difference of measured and estimated memory


@dataclass(frozen=True)
class Knobs:
    tiny: bool = knob(False, "tiny models on a CPU: does the script still run?")
    out: str = knob("", "CSV file that is replaced; default: results/gpu.csv, with --tiny runs/gpu-tiny.csv")


@dataclass(frozen=True)
class Plan:
    """What is measured on which device."""

    device: str
    shapes: dict[str, dict[str, int]]  # of student and teacher
    rollouts: tuple[int, ...]  # rows sampled together
    rollout_tokens: int
    prompts: int  # in a step
    tokens: dict[str, int]  # the two horizons
    dtype: str = "bfloat16"


REAL = Plan(
    device="cuda",
    shapes={"student": QWEN | HALF, "teacher": QWEN | BIG},
    rollouts=(16, 64),
    rollout_tokens=512,
    prompts=16,
    tokens={"full": 1024, "topd": 102},
)
TINY = Plan(
    device="cpu",
    shapes=dict.fromkeys(("student", "teacher"), SMALL | {"num_key_value_heads": 2, "vocab_size": 2000}),
    rollouts=(2,),
    rollout_tokens=4,
    prompts=2,
    tokens={"full": 8, "topd": 2},
)


def write_inputs(folder: Path, plan: Plan) -> None:
    """student/, teacher/, train.jsonl and test.jsonl, as in the toy's world."""
    recipe = toy.Recipe()
    tokenizer = toy.make_tokenizer(recipe)
    for name, shape in plan.shapes.items():
        config = Qwen2Config(
            **shape,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for part in ("train", "test"):
        rows = [{"question": toy.question(*p), "answer": "0"} for p in toy.all_problems(recipe)[:100]]
        run_folder.write_jsonl(folder / f"{part}.jsonl", rows)


def measurements(plan: Plan, folder: Path) -> Iterator[tuple[Any, str, dict[str, Any], dict[str, Any]]]:
    """The script, the side, its flags, and the columns that describe the row."""
    common = {"data": str(folder), "device": plan.device, "dtype": plan.dtype}
    pair = {name: str(folder / name) for name in plan.shapes}
    for horizon, selected in STEPS.items():
        about = {"part": "steps", "rows": plan.prompts, "tokens": plan.tokens[horizon]}
        flags = common | pair | {"prompts": plan.prompts, "tokens": plan.tokens[horizon], "steps": 1}
        flags |= {"endless": True, "warm_up": 2, "micro_batch": 2048}  # the default of train.py
        for side in selected:
            yield steps, side, flags, about
    for rows in plan.rollouts:
        about = {"part": "rollouts", "rows": rows, "tokens": plan.rollout_tokens}
        flags = common | {"part": "rollouts", "model": str(folder / "student"), "every": 0, "repeats": 1}
        flags |= {"rows": rows, "horizon": plan.rollout_tokens}
        for side in parts.SAMPLERS:
            yield parts, side, flags, about
    fewer = {"rows": plan.rollouts[0], "horizon": max(plan.rollout_tokens // 4, 2)}
    yield parts, "plain-cudnn", flags | fewer, about | {"rows": fewer["rows"], "tokens": fewer["horizon"]}


def measure(plan: Plan, folder: Path, out: Path) -> None:
    """Write all rows; that of a side that fails says why."""
    rows = []
    for script, side, flags, about in measurements(plan, folder):
        started = time.perf_counter()
        try:
            found = sides.measure_apart(script.__file__, side, flags) | {"error": ""}
        except BadInput as error:
            found = {"error": str(error)} | sides.hardware(torch.device(plan.device))
        rows.append(about | {"side": side} | found)
        columns = list(dict.fromkeys(name for row in rows for name in row))  # sides have different ones
        run_folder.write_csv(out.with_suffix(".part"), columns, rows)
        print(summary(rows[-1]), f"({time.perf_counter() - started:.0f} s)", flush=True)
    out.with_suffix(".part").replace(out)
    print(f"{rows[0]['hardware']}: {out}")


def summary(row: dict[str, Any]) -> str:
    """One line of a row: speed, bandwidth, and memory next to its estimate."""
    text = f"{row['part']:9}{row['side']:19}{row['rows']:3} x {row['tokens']:<5}"
    if row["error"]:
        return f"{text} failed: {row['error']}"
    text += f"{row['seconds']:8.2f} s"
    if row["part"] == "rollouts":
        return f"{text}{row['tokens_per_s']:9.0f} tokens/s, {row['bandwidth_share']:.0%} of the bandwidth"
    text += f"  peak {row['peak_gb']:.2f} GB"
    if row["device_gb"] and row["estimate_gb"]:
        gap = row["estimate_gb"] / row["device_gb"] - 1
        verdict = "as wanted" if abs(gap) <= WANTED else f"beyond {WANTED:.0%}"
        text += f", reserved {row['reserved_gb']:.2f}, of the device {row['device_gb']:.2f}"
        text += f", estimated {row['estimate_gb']:.2f} ({gap:+.0%}, {verdict})"
    return text


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    plan = TINY if knobs.tiny else REAL
    out = Path(knobs.out or sides.ROOT / ("runs/gpu-tiny.csv" if knobs.tiny else "results/gpu.csv"))
    run_folder.prepare_file(out, "--out")
    if not (knobs.tiny or torch.cuda.is_available()):
        raise BadInput("there is no CUDA device here: add --tiny, which runs on a CPU")
    if not knobs.tiny:  # allocates nothing: the context of this process would count in the measurements
        plan = replace(plan, dtype=models.dtype_name("", torch.device(plan.device)))
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), plan)
        measure(plan, Path(folder), out)


if __name__ == "__main__":
    run_main(main)
