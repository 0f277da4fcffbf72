"""The loss alone, forward and backward, at the real shapes: time and memory beside those of other projects.

    pip install trl==1.16.0 && pip install --no-deps liger-kernel==0.8.5     # the peers
    python benchmarks/loss.py

Each side is a process of its own with the same random hidden states and heads; its memory is what the process
holds at its peak beyond these inputs. Adds rows to results/bench_loss.csv. Linux.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sides import ROOT, flags_of, measure_apart, peak_memory, reset_peak  # puts the project on the path

import opd
import report
from cli import knob, parse, run

SIDES = ("naive", "ours", "liger", "trl")


@dataclass(frozen=True)
class Knobs:
    sides: tuple[str, ...] = knob((), "may be given several times; default: all", choices=SIDES)
    tokens: int = knob(1024, "response tokens", 1)
    vocab: int = knob(151_936, "rows of both heads", 2)
    student_width: int = knob(896, "hidden size", 1)
    teacher_width: int = knob(1536, "hidden size", 1)
    dtype: str = knob("float32", "of hidden states and heads", choices=("float32", "bfloat16"))
    repeats: int = knob(3, "the fastest counts", 1)
    device: str = knob("cpu", "cpu or cuda")
    side: str = knob("", "measure this side in this process and print it as JSON", choices=SIDES)
    out: str = knob(str(ROOT / "results" / "bench_loss.csv"), "CSV file to which rows are added")


def loss_of(side: str, knobs: Knobs):
    """A function (hidden, weight, teacher_hidden, teacher_weight, tokens) -> mean reverse KL."""
    if side == "naive":

        def naive(hidden, weight, teacher_hidden, teacher_weight, tokens):
            student_logp = (hidden @ weight.T).float().log_softmax(-1)
            teacher_logp = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
            return opd.reverse_kl(student_logp, teacher_logp, tokens).mean()

        return naive
    if side == "ours":

        def ours(hidden, weight, teacher_hidden, teacher_weight, tokens):
            head = (
                opd.Head(weight, None, None, len(weight)),
                opd.Head(teacher_weight, None, None, len(weight)),
            )
            return opd.opd_loss((head[0], hidden), (head[1], teacher_hidden), tokens, len(tokens))[0]

        return ours
    if side == "liger":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False)

        def of_liger(hidden, weight, teacher_hidden, teacher_weight, tokens):
            return liger(hidden, weight, teacher_hidden, teacher_weight, tokens)

        return of_liger
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def trl(hidden, weight, teacher_hidden, teacher_weight, tokens):
        mask = torch.ones(1, len(tokens), device=hidden.device)
        return _chunked_divergence_loss(
            hidden[None], teacher_hidden[None], weight, teacher_weight, mask, 1.0
        )[0]

    return trl


def measure(knobs: Knobs) -> dict:
    """One side, in this process."""
    device, dtype = torch.device(knobs.device), getattr(torch, knobs.dtype)
    rng = torch.Generator().manual_seed(0)

    def draw(*shape, scale):
        return (torch.randn(*shape, generator=rng) * scale).to(device, dtype)

    weight = draw(knobs.vocab, knobs.student_width, scale=0.05).requires_grad_()
    teacher_weight = draw(knobs.vocab, knobs.teacher_width, scale=0.04)
    hidden = draw(knobs.tokens, knobs.student_width, scale=1.0).requires_grad_()
    teacher_hidden = draw(knobs.tokens, knobs.teacher_width, scale=1.0)
    tokens = torch.randint(knobs.vocab, (knobs.tokens,), generator=rng).to(device)
    loss_function, seconds = loss_of(knobs.side, knobs), []
    before = reset_peak(device)
    for _ in range(knobs.repeats):
        weight.grad = hidden.grad = None
        started = time.perf_counter()
        loss = loss_function(hidden, weight, teacher_hidden, teacher_weight, tokens)
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    row = {"side": knobs.side, "seconds": min(seconds), "peak_gb": (peak_memory(device) - before) / 1e9}
    return row | {"loss": loss.item(), "grad_norm": weight.grad.float().norm().item()}


def main() -> None:
    given = parse(Knobs, __doc__, None)
    knobs = Knobs(**given)
    if knobs.side:
        print(json.dumps(measure(knobs)))
        return
    flags = flags_of(given)
    rows = []
    for side in knobs.sides or SIDES:
        rows.append(measure_apart(__file__, side, flags))
        print(rows[-1], flush=True)
    shape = {
        name: getattr(knobs, name) for name in ("tokens", "vocab", "student_width", "teacher_width", "dtype")
    }
    hardware = report.environment(torch.device(knobs.device))["hardware"]
    report.append_csv(Path(knobs.out), [shape | row | {"hardware": hardware} for row in rows])


if __name__ == "__main__":
    run(main)
