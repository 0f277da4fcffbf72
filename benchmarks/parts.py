"""The parts of a training run alone: the loss, rollouts, evaluation.

    pip install trl==1.16.0 && pip install --no-deps liger-kernel==0.8.5     # for two sides of the loss
    python benchmarks/parts.py --part loss             forward and backward at the real shapes
    python benchmarks/parts.py --part rollouts --model PATH --data FILE
    python benchmarks/parts.py --part evaluation --data FILE            grading
    python benchmarks/parts.py --part logits --model STUDENT --teacher TEACHER --data FILE

Rows are added to results/bench_PART.csv. Each side of the loss and of rollouts is a process of its own; its
memory is measured on Linux. The part `logits` is not a time but an error: that of the gradient if logits are
rounded to bf16.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sides  # also puts the project on the path
import torch
from torch import Tensor

import train
from eval_math import INSTRUCTION, boxed, extract
from extras.graphs import graph_rollout
from opd import log_probs, opd_backward, reverse_kl
from rollout import hidden_states, model_inputs, rollout, sampling_noise
from support import data, models, run_folder
from support.batch_size import Shape
from support.cli import BadInput, knob, parse, run_main
from support.prompts import render
from support.workers import Grader

SAMPLERS = {"plain": rollout, "graphs": graph_rollout}
SIDES = {"loss": ("naive", "ours", "liger", "trl"), "rollouts": ("generate", *SAMPLERS, "plain-cudnn")}
SIDES |= {"evaluation": (), "logits": ()}


@dataclass(frozen=True)
class Knobs:
    part: str = knob("loss", "what to measure", choices=SIDES)
    sides: tuple[str, ...] = knob((), "of the loss or of rollouts; may be repeated; default: all")
    repeats: int = knob(3, "the fastest counts", least=1)
    dtype: str = knob("bfloat16", "of weights and matmuls", choices=("float32", "bfloat16"))
    device: str = knob("cpu", "cpu or cuda")
    seed: int = knob(0, "of the random numbers", least=0)
    side: str = knob("", "measure this side in this process and print it as JSON")
    out: str = knob("", "CSV file to which rows are added; default: results/bench_PART.csv")

    tokens: int = knob(1024, "response tokens", least=1, group="loss")
    vocab: int = knob(151_936, "rows of both heads", least=2)
    student_width: int = knob(896, "hidden size", least=1)
    teacher_width: int = knob(1536, "hidden size", least=1)

    model: str = knob("", "hub name or folder", group="rollouts, evaluation and logits")
    teacher: str = knob("", "logits: hub name or folder")
    data: str = knob("openai/gsm8k:main", "problems; train split for rollouts, test split for evaluation")
    horizon: int = knob(256, "longest answer in tokens", least=1)
    rows: int = knob(16, "prompts sampled together", least=1)
    every: int = knob(
        64, "rollouts: ids divisible by it end an answer, so that lengths differ; 0: none", least=0
    )
    answers: int = knob(
        10_000, "evaluation: answers to grade, half of them those of random problems", least=1
    )


def loss_of(side: str) -> Callable[..., Tensor]:
    """A function of hidden states, head, those of the teacher, and tokens; returns the mean reverse KL.

    The value of `ours` has been backpropagated; those of the other sides have a graph.
    """
    if side == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        return LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False)
    if side == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def naive(hidden, weight, teacher_hidden, teacher_weight, tokens):
        student_logp = (hidden @ weight.T).float().log_softmax(-1)
        teacher_logp = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
        return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1).mean()

    def ours(hidden, weight, teacher_hidden, teacher_weight, tokens):
        head, teacher_head = (models.OutputHead(w, None, 1.0, None, len(w)) for w in (weight, teacher_weight))
        return opd_backward(head, hidden, teacher_head, teacher_hidden, tokens, normalizer=len(tokens))[0]

    def trl(hidden, weight, teacher_hidden, teacher_weight, tokens):
        mask = torch.ones(1, len(tokens), device=hidden.device)
        states = (hidden[None], teacher_hidden[None])
        return _chunked_divergence_loss(*states, weight, teacher_weight, mask, 1.0)[0]

    return {"naive": naive, "ours": ours, "trl": trl}[side]


def measure_loss(knobs: Knobs) -> dict[str, Any]:
    """Seconds, and the memory that is held beyond the inputs, gradients included."""
    device = models.find_device(knobs.device)
    generator = torch.Generator().manual_seed(knobs.seed)

    def normal(*shape: int, scale: float) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(device, getattr(torch, knobs.dtype))

    weight = normal(knobs.vocab, knobs.student_width, scale=0.05).requires_grad_()
    teacher_weight = normal(knobs.vocab, knobs.teacher_width, scale=0.04)
    hidden = normal(knobs.tokens, knobs.student_width, scale=1.0).requires_grad_()
    teacher_hidden = normal(knobs.tokens, knobs.teacher_width, scale=1.0)
    tokens = torch.randint(knobs.vocab, (knobs.tokens,), generator=generator).to(device)
    master = weight
    if knobs.side == "ours" and weight.dtype != torch.float32:  # gradients are summed in fp32, as in training
        master = weight.detach().float().requires_grad_()
        weight.register_post_accumulate_grad_hook(partial(train.move_gradient, master))
    loss_function = loss_of(knobs.side)
    seconds = []
    before = sides.reset_peak(device)
    for _ in range(knobs.repeats):
        weight.grad = hidden.grad = master.grad = None
        started = time.perf_counter()
        loss = loss_function(hidden, weight, teacher_hidden, teacher_weight, tokens)
        if loss.requires_grad:
            loss.backward()
        sides.synchronize(device)
        seconds.append(time.perf_counter() - started)
    row = {"seconds": min(seconds), "peak_gb": (sides.peak_memory(device) - before) / 1e9}
    row |= {"loss": loss.item(), "grad_norm": master.grad.float().norm().item()}
    return row | sides.hardware(device)


def measure_rollouts(knobs: Knobs) -> dict[str, Any]:
    """Seconds and tokens of the fastest call after a first one that warms up."""
    device = models.find_device(knobs.device)
    torch.manual_seed(knobs.seed)  # of `generate`
    model = models.load_model(knobs.model, getattr(torch, knobs.dtype), device)
    torch.backends.cuda.enable_cudnn_sdp(knobs.side == "plain-cudnn")
    problems = data.subset(data.read_problems(knobs.data, "train"), knobs.rows, knobs.seed)
    prompts = render(models.load_tokenizer(knobs.model), problems, INSTRUCTION)
    vocab_size = model.config.get_text_config().vocab_size
    eos_ids = set(range(0, vocab_size, knobs.every)) if knobs.every else {vocab_size}
    measured = []
    for _ in range(knobs.repeats + 1):
        started = time.perf_counter()
        if knobs.side == "generate":
            _, mask = sides.generate(model, prompts, knobs.horizon, eos_ids)
            lengths = mask[:, max(map(len, prompts)) :].sum(1).tolist()
        else:
            sampler = SAMPLERS[knobs.side.removesuffix("-cudnn")]
            noise = sampling_noise([(knobs.seed, 0, row) for row in range(len(prompts))], knobs.horizon)
            lengths = sampler(model, prompts, knobs.horizon, eos_ids, noise).response_mask.sum(1).tolist()
        sides.synchronize(device)
        measured.append((time.perf_counter() - started, lengths))
    seconds, lengths = max(measured[1:], key=lambda m: sum(m[1]) / m[0])  # the most tokens per second
    row = {"first_call_s": measured[0][0], "seconds": seconds}
    row |= {"response_tokens": sum(lengths), "tokens_per_s": sum(lengths) / seconds}
    row |= {"shortest": min(lengths), "longest": max(lengths)} | sides.peak_columns(device)
    weights = sum(weight.nbytes for weight in model.parameters())
    row |= {"weights_gb_per_s": max(lengths) * weights / seconds / 1e9}
    numbers, target = torch.ones(2, 1 << 27, device=device)  # 512 MB each
    row |= {"read_gb_per_s": bandwidth(device, numbers.sum, numbers.nbytes)}
    row |= {"copy_gb_per_s": bandwidth(device, lambda: target.copy_(numbers), 2 * numbers.nbytes)}
    read = max(lengths) * weights + cache_reads(model, prompts, lengths)
    row |= {"bandwidth_share": read / seconds / 1e9 / row["copy_gb_per_s"]}
    return row | sides.hardware(device)


def cache_reads(model, prompts: list[list[int]], lengths: list[int]) -> int:
    """Bytes of keys and values that attention reads: token t of a row reads those of all tokens before it."""
    shape = Shape.of(model.config, model.dtype.itemsize)
    tokens = sum(n * len(prompt) + n * (n - 1) // 2 for prompt, n in zip(prompts, lengths))
    return 2 * shape.layers * shape.cached_width * shape.item * tokens


def bandwidth(device: torch.device, action: Callable[[], object], moved: int) -> float:
    """GB per second of an action that moves so many bytes, in the fastest of four calls."""
    seconds = []
    for _ in range(4):
        sides.synchronize(device)
        started = time.perf_counter()
        action()
        sides.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return moved / min(seconds) / 1e9


def run_evaluation(knobs: Knobs, out: Path) -> None:
    """The time of grading answers of which half are right."""
    problems = data.read_problems(knobs.data, "test")
    rng = random.Random(knobs.seed)
    golds = [rng.choice(problems).answer for _ in range(knobs.answers)]
    answers = [gold if i % 2 else rng.choice(problems).answer for i, gold in enumerate(golds)]
    with Grader(extract, boxed) as grader:
        started = time.perf_counter()
        verdicts = grader.grade([rf"So it is \boxed{{{answer}}}." for answer in answers], golds)
        seconds = time.perf_counter() - started
    right = sum(verdict["correct"] for verdict in verdicts)
    row = {"what": "grading", "n": knobs.answers, "ours_s": seconds, "right": right}
    row |= {"data": Path(knobs.data).name} | sides.hardware(models.find_device(knobs.device))
    print(row)
    run_folder.append_csv(out, [row])


@torch.no_grad()
def sampled_logits(knobs: Knobs) -> tuple[Tensor, Tensor]:
    """fp32 logits of student and teacher on the student's own tokens, (N, V) each."""
    names = {"student": knobs.model, "teacher": knobs.teacher}
    settings = train.Knobs(**names, checkpointing=False, dtype="float32")
    pair = train.load_pair(settings, models.find_device(knobs.device))
    problems = data.subset(data.read_problems(knobs.data, "test"), 4, knobs.seed)
    prompts = render(pair.tokenizer, problems, INSTRUCTION)
    noise = sampling_noise(range(len(prompts)), 64)
    rollouts = rollout(pair.student, prompts, 64, pair.eos_ids, noise)
    ids, predicts = model_inputs(rollouts, list(range(len(prompts))), rollouts.response_mask)
    return (
        pair.student_head(hidden_states(pair.student, ids)[predicts]),
        pair.teacher_head(hidden_states(pair.teacher, ids)[predicts]),
    )


def run_logits(knobs: Knobs, out: Path) -> None:
    """The error of the logits' gradient when both models' logits are rounded to bf16.

    The closer the models, the larger it is: teachers between student and teacher are interpolated logits.
    """
    student, teacher = sampled_logits(knobs)

    def kl_and_gradient(logits: Tensor, teacher_logits: Tensor) -> tuple[float, Tensor]:
        logits = logits.clone().requires_grad_()
        kl = reverse_kl(log_probs(logits), log_probs(teacher_logits), None).mean()
        kl.backward()
        return kl.item(), logits.grad

    for weight in (1, 0.3, 0.1, 0.03, 0.01):
        between = torch.lerp(student, teacher, weight)
        kl, exact = kl_and_gradient(student, between)
        _, rounded = kl_and_gradient(student.bfloat16().float(), between.bfloat16().float())
        error = ((rounded - exact).norm() / exact.norm()).item()
        row = {"student": Path(knobs.model).name, "teacher": Path(knobs.teacher).name, "weight": weight}
        row |= {"tokens": len(student), "reverse_kl": kl, "bf16_error": error}
        print(row, flush=True)
        run_folder.append_csv(out, [row | sides.hardware(models.find_device(knobs.device))])


def measure(knobs: Knobs) -> dict[str, Any]:
    """One side of the loss or of rollouts, in this process."""
    return measure_loss(knobs) if knobs.part == "loss" else measure_rollouts(knobs)


def main() -> None:
    given = parse(Knobs, __doc__)
    knobs = Knobs(**given)
    out = Path(knobs.out or sides.ROOT / "results" / f"bench_{knobs.part}.csv")
    for side in filter(None, (*knobs.sides, knobs.side)):
        if side not in SIDES[knobs.part]:
            raise BadInput(f"--part {knobs.part} has no side {side}: choose one of {SIDES[knobs.part]}")
    needed = {"rollouts": ("model",), "logits": ("model", "teacher")}.get(knobs.part, ())
    for name in needed:
        if not getattr(knobs, name):
            raise BadInput(f"--part {knobs.part} needs --{name}: give a hub name or a folder")
    run_folder.prepare_file(out, "--out")
    if knobs.side:
        print(json.dumps(measure(knobs)))
    elif knobs.part == "evaluation":
        run_evaluation(knobs, out)
    elif knobs.part == "logits":
        run_logits(knobs, out)
    else:
        names = ("tokens", "vocab", "student_width", "teacher_width", "dtype")
        about = {name: getattr(knobs, name) for name in names}
        if knobs.part == "rollouts":
            about = {"model": Path(knobs.model).name, "dtype": knobs.dtype, "rows": knobs.rows}
            about |= {"tokens": knobs.horizon, "every": knobs.every}
        sides.compare_sides(__file__, knobs.sides or SIDES[knobs.part], given, about, out)


if __name__ == "__main__":
    run_main(main)
