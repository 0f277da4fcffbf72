"""One whole training step: this project, a naive loop, and TRL's DistillationTrainer.

    pip install trl==1.16.0        # for the side `trl`
    python benchmarks/steps.py --student PATH --teacher PATH --data FILE
    python benchmarks/steps.py --student PATH --teacher PATH --data FILE --prompts 1 --steps 1 --growth 4096

Each side is a process of its own with the same prompts. A first step warms up, the median of the others
counts. Memory is the peak of the whole process: resident on a CPU (Linux), allocated on a GPU. The side
`autocast` has fp32 weights and no masters: compare its rollout_s, score_s and memory with those of
`ours-checkpointing`, which has bf16 weights and fp32 masters. Rows are added to results/bench_steps.csv.
With --growth, the side `ours-checkpointing` alone is measured, at answers of --tokens tokens, twice as many,
and so on: results/bench_growth.csv and results/bench_growth.png.
"""

import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import sides  # also puts the project on the path
import torch
from transformers import AutoConfig

import train
from eval_math import INSTRUCTION
from extras import memory
from extras.graphs import graph_rollout
from rollout import rollout
from support import data, models, run_folder
from support.cli import BadInput, knob, parse, run_main
from support.prompts import render
from support.run import Run

OURS = {
    "ours": {"checkpointing": False},
    "ours-checkpointing": {"checkpointing": True},
    "ours-graphs": {"checkpointing": True, "sampler": "graphs"},
    "ours-graphs-8192": {"checkpointing": True, "sampler": "graphs", "micro_batch": 8192},
    "ours-low-memory": {"checkpointing": True, "low_memory": True},
    "autocast": {"checkpointing": True},
}
SIDES = (*OURS, "naive", "trl")
LR = 1e-6
# score_s: both models' forward passes and backward; update_s: AdamW; baseline_gb: before loading the models.
COLUMNS = ("seconds", "rollout_s", "score_s", "update_s", "response_tokens", "loss", "grad_norm", "lr")
COLUMNS += ("baseline_gb", "estimate_gb", "estimate_tensors_gb")


@dataclass(frozen=True)
class Knobs:
    student: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder")
    teacher: str = knob("Qwen/Qwen2.5-1.5B-Instruct", "hub name or folder")
    data: str = knob("openai/gsm8k:main", "problems; its train split")
    sides: tuple[str, ...] = knob((), "may be repeated; default: all", choices=SIDES)
    dtype: str = knob("bfloat16", "of matmuls", choices=("float32", "bfloat16"))
    prompts: int = knob(8, "in a step", least=1)
    tokens: int = knob(128, "the horizon", least=1)
    steps: int = knob(3, "timed steps, after one that is not", least=1)
    warm_up: int = knob(0, "the horizon of the step that is not timed; 0: --tokens", least=0)
    micro_batch: int = knob(8192, "tokens in one backward of this project's sides", least=1)
    endless: bool = knob(False, "no eos token: all answers reach the horizon")
    growth: int = knob(0, "measure growing answers, up to so many tokens; 0: compare the sides", least=0)
    device: str = knob("cpu", "cpu or cuda")
    side: str = knob("", "measure this side in this process and print it as JSON", choices=SIDES)
    out: str = knob("", "CSV file; default: results/bench_steps.csv or results/bench_growth.csv")


def ours(knobs: Knobs, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Steps of `train.train`."""
    device = models.find_device(knobs.device)
    settings = train.Knobs(
        student=knobs.student,
        teacher=knobs.teacher,
        **({"micro_batch": knobs.micro_batch} | OURS[knobs.side]),
        steps=knobs.steps + 1,
        batch_size=knobs.prompts,
        lr=LR,
        warmup=0,
        decay="constant",
        show_every=0,
        dtype=knobs.dtype,
        device=device.type,
    )
    facts = {"baseline_gb": sides.reset_peak(device) / 1e9}
    if knobs.side != "autocast":
        configs = [models.load(AutoConfig, name) for name in (knobs.student, knobs.teacher)]
        found = memory.estimate(settings, *configs, max(map(len, prompts)), knobs.tokens)
        facts |= {"estimate_gb": found["peak"] / 1e9, "estimate_tensors_gb": found["tensors"] / 1e9}
    pair, how = load(knobs, settings, device)
    if knobs.endless:
        pair = replace(pair, eos_ids={pair.vocab_size})  # an id that is never sampled
    run = Run(device)
    sides.reset_peak(device)  # loading has a peak of its own
    horizons = [knobs.warm_up or knobs.tokens] + [knobs.tokens] * knobs.steps
    train.train(pair, train.adamw(pair, settings), prompts, horizons.__getitem__, settings, run, **how)
    return [row | facts | {"seconds": row["seconds"] - last["seconds"]} for last, row in pairwise(run.rows)]


def load(knobs: Knobs, settings: train.Knobs, device: torch.device) -> tuple[train.Pair, dict[str, Callable]]:
    """The models of a side, and what it replaces in `train.train`."""
    if knobs.side != "autocast":
        how = {"sampler": graph_rollout} if settings.sampler == "graphs" else {}
        return train.load_pair(settings, device), how
    pair = train.load_pair(replace(settings, low_memory=False, dtype="float32"), device)
    for weight in pair.teacher.parameters():  # it is not trained
        weight.data = weight.data.to(getattr(torch, knobs.dtype))
    torch.cuda.empty_cache()  # of its fp32 weights; does nothing without CUDA
    return pair, autocast(device, getattr(torch, knobs.dtype))


def autocast(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """The sampler and the scorer of `train.train` under autocast: what fp32 weights without masters would be.

    Each call has a context of its own, as the copies that one makes of the weights are kept until its end.
    """

    def cast(function: Callable) -> Callable:
        @functools.wraps(function)
        def inside(*args: Any, **options: Any) -> Any:
            with torch.autocast(device.type, dtype):
                return function(*args, **options)

        return inside

    return {"sampler": cast(rollout), "scorer": cast(train.score)}


def naive(knobs: Knobs, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """A first implementation: `generate`, the full logits of both models, weights in the matmuls' dtype."""
    device = models.find_device(knobs.device)
    dtype = getattr(torch, knobs.dtype)
    student = models.load_model(knobs.student, dtype, device)
    teacher = models.load_model(knobs.teacher, dtype, device).requires_grad_(False)
    eos_ids = models.eos_ids(models.load_tokenizer(knobs.student), student, teacher)
    if knobs.endless:
        eos_ids = {student.config.get_text_config().vocab_size}
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    first = max(map(len, prompts))  # where the responses begin
    rows = []
    for tokens in [knobs.warm_up or knobs.tokens] + [knobs.tokens] * knobs.steps:
        started = time.perf_counter()
        sequences, mask = sides.generate(student, prompts, tokens, eos_ids)
        row = {"rollout_s": time.perf_counter() - started, "response_tokens": int(mask[:, first:].sum())}
        student_logits = student(sequences, attention_mask=mask).logits[:, first - 1 : -1]
        student_logp = student_logits.float().log_softmax(-1)
        with torch.no_grad():
            teacher_logits = teacher(sequences, attention_mask=mask).logits[:, first - 1 : -1]
            teacher_logp = teacher_logits.float().log_softmax(-1)
        divergence = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
        loss = (divergence * mask[:, first:]).sum() / row["response_tokens"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sides.synchronize(device)
        rows.append(row | {"loss": loss.item(), "seconds": time.perf_counter() - started})
    return rows[1:]


def trl(knobs: Knobs, problems: list[data.Problem]) -> list[dict[str, Any]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    starts = []
    rows = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            starts.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            rows.append({"seconds": time.perf_counter() - starts[-1]})

    chats = [[{"role": "user", "content": problem.question + INSTRUCTION}] for problem in problems]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            use_cpu=knobs.device == "cpu",
            bf16=knobs.dtype == "bfloat16",
            per_device_train_batch_size=len(chats),
            max_steps=knobs.steps + 1,
            max_completion_length=knobs.tokens,
            learning_rate=LR,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            teacher_model_init_kwargs={"dtype": knobs.dtype},
        )
        trainer = DistillationTrainer(
            model=knobs.student,
            teacher_model=knobs.teacher,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": chats}),
            callbacks=[Clock()],
        )
        trainer.train()
    return rows[1:]


def measure(knobs: Knobs) -> dict[str, Any]:
    """The medians of one side's timed steps and its peak memory, measured in this process."""
    problems = data.subset(data.read_problems(knobs.data, "train"), knobs.prompts, 0)
    prompts = render(models.load_tokenizer(knobs.student), problems, INSTRUCTION)
    if knobs.side == "trl":
        rows = trl(knobs, problems)
    elif knobs.side == "naive":
        rows = naive(knobs, prompts)
    else:
        rows = ours(knobs, prompts)
    found = {}
    for name in COLUMNS:
        found[name] = statistics.median(row[name] for row in rows) if name in rows[0] else ""
    device = models.find_device(knobs.device)
    return found | sides.peak_columns(device) | sides.hardware(device)


def measure_growth(knobs: Knobs, given: dict[str, Any], table: Path) -> None:
    """Measure answers of --tokens tokens, twice as many, ... up to --growth, then replace the table."""
    part = table.with_suffix(".part")
    rows = []
    tokens = knobs.tokens
    while tokens <= knobs.growth:
        row = {"model": Path(knobs.student).name, "prompts": knobs.prompts, "tokens": tokens}
        flags = given | {"tokens": tokens, "endless": True}
        row |= sides.measure_apart(__file__, "ours-checkpointing", flags)
        print(row, flush=True)
        rows.append(row)
        run_folder.write_csv(part, list(row), rows)  # an interrupted run leaves its rows here
        tokens *= 2
    part.replace(table)
    print(draw_growth(table))


def draw_growth(table: Path) -> Path:
    """Seconds of a step by phase, and peak memory, by response tokens; dotted: linear growth."""
    from matplotlib.figure import Figure

    rows = run_folder.read_csv(table)
    tokens = [int(row["tokens"]) for row in rows]
    phases = {"sampling": "rollout_s", "scoring and backward": "score_s", "AdamW": "update_s"}
    seconds = [[float(row[column]) for row in rows] for column in phases.values()]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.stackplot(tokens, seconds, labels=list(phases), colors=("#0072b2", "#e69f00", "#009e73"), alpha=0.8)
    left.plot([0, tokens[-1]], [0, sum(s[-1] for s in seconds)], ":", color="black", label="linear")
    left.set(title="seconds per step", xlabel="response tokens", xlim=(0, None), ylim=(0, None))
    left.legend(loc="upper left")
    estimated = [float(row["estimate_gb"]) + float(row["baseline_gb"]) for row in rows]
    right.plot(tokens, [float(row["peak_gb"]) for row in rows], "o-", color="#d55e00", label="measured")
    right.plot(tokens, estimated, "x--", color="#56b4e9", label="estimated by --dry-run, plus the libraries")
    right.set(title="peak memory, GB", xlabel="response tokens", xlim=(0, None), ylim=(0, None))
    right.legend(loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(table.with_suffix(".png"), dpi=110)
    return table.with_suffix(".png")


def main() -> None:
    given = parse(Knobs, __doc__)
    knobs = Knobs(**given)
    selected = knobs.sides or SIDES
    name = "bench_growth.csv" if knobs.growth else "bench_steps.csv"
    out = Path(knobs.out or sides.ROOT / "results" / name)
    if knobs.growth and knobs.sides:
        raise BadInput("--growth measures the side ours-checkpointing alone: drop --sides")
    if knobs.growth and knobs.growth < knobs.tokens:
        raise BadInput(f"--growth {knobs.growth} is below --tokens {knobs.tokens}: raise it")
    run_folder.prepare_file(out, "--out")
    if knobs.side:
        print(json.dumps(measure(knobs)))
    elif knobs.growth:
        measure_growth(knobs, given, out)
    elif knobs.endless and "trl" in selected:
        raise BadInput("--endless is not available for the side trl: select the others with --sides")
    else:
        about = {name: Path(getattr(knobs, name)).name for name in ("student", "teacher")}
        about |= {name: getattr(knobs, name) for name in ("dtype", "prompts", "tokens")}
        sides.compare_sides(__file__, selected, given, about, out)


if __name__ == "__main__":
    run_main(main)
