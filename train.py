"""On-policy distillation: the student answers, the teacher scores each token, the student moves towards it.

    python train.py --schedule topd --horizon 0.1      laptop: a toy world, about a minute
    python train.py --preset qwen                      one GPU: a 0.5B student, a 1.5B teacher, GSM8K

Left out: top-k and top-p in training (the loss must differentiate the law that was sampled), old rollouts.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import data
import fast
import models
import prepare
import profile_horizon
import report
import toy
from checkpoint import State
from cli import knob, parse, run
from eval_math import INSTRUCTION
from opd import DIVERGENCES, opd_loss
from rollout import Rollout
from schedules import SCHEDULES


@dataclass(frozen=True)
class Knobs:
    schedule: str = knob("topd", "how long rollouts are", choices=SCHEDULES)
    horizon: float | str | None = knob(
        None, "up to 1 a share of --max-new-tokens, above 1 tokens; auto: measured first", word="auto"
    )
    popd_growth: int | None = knob(None, "tokens that POPD adds; default: full length at 2/3 of the run")
    popd_interval: int | None = knob(None, "steps between two additions; default: 1/30 of the run")
    divergence: str = knob("reverse_kl", "the loss", choices=DIVERGENCES)
    preset: str = knob("", "default: qwen on a CUDA GPU, toy elsewhere", choices=("toy", "qwen"))
    world: str = knob("opening", "the toy preset's world", choices=toy.WORLDS)
    student: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder")
    teacher: str = knob("Qwen/Qwen2.5-1.5B-Instruct", "hub name or folder; same tokenizer as the student's")
    data: str = knob("openai/gsm8k:main", "hub name[:config], folder, or JSONL/JSON/CSV/parquet file")
    eval_data: str = knob("", "held-out problems; default: test split of --data, or some of a single file")
    instruction: str = knob(INSTRUCTION, "text after each problem")
    system_prompt: str = knob("", "system message; the chat template's own if empty")
    max_new_tokens: int = knob(1024, "T, the full response length: of evaluation, and of horizon 1", 1)
    steps: int = knob(200, "optimizer steps", 1)
    batch_size: int = knob(16, "prompts a step", 1)
    rollouts_per_prompt: int = knob(1, "answers to each prompt", 1)
    micro_batch: int = knob(2048, "tokens in one forward and backward: sets memory, not the result", 1)
    low_memory: bool = knob(False, "LoRA adapters learn, not all weights; qwen: lr 5e-5 then")
    checkpointing: bool = knob(True, "recompute activations in backward: less memory, a third more time")
    sampler: str = knob("", "training's rollouts; default: fast on a CPU", choices=("plain", "fast"))
    temperature: float = knob(1.0, "of the sampling, and of both models in the loss", 0.01)
    lr: float = knob(5e-6, "peak learning rate", 0)
    warmup: float = knob(0.1, "share of the steps in which the learning rate climbs", 0, most=1)
    decay: str = knob("cosine", "of the learning rate after that", choices=("cosine", "constant"))
    beta2: float = knob(0.95, "AdamW's memory of squared gradients: short, as runs are", 0, most=0.9999)
    clip: float = knob(1.0, "largest gradient norm", 0)
    eval_every: int = knob(0, "steps between evaluations, besides before and after; 0: none", 0)
    eval_limit: int = knob(64, "held-out problems; 0: no evaluation", 0)
    eval_batch: int | str = knob(
        "auto", "answers evaluated together; auto: what fits, up to 64", 1, word="auto"
    )
    eval_temperature: float = knob(0.0, "0 is greedy", 0)
    show_every: int = knob(10, "steps between rollouts shown with the teacher's gap per token; 0: none", 0)
    save_every: int = knob(25, "steps between checkpoints, and one at the end; 0: none", 0)
    seed: int = knob(0, "of data order and sampling", 0, most=2**32)
    dtype: str = knob("", "of matmuls; default: the faster one here", choices=("bfloat16", "float32"))
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    out: str = knob("", "run folder; default: the first free runs/<preset>-<schedule>-N")
    dry_run: bool = knob(False, "estimate the memory, and whether it fits, and stop")
    resume: str = knob("", "run folder to go on with; its settings hold, --steps may grow")


def learning_rate(step: int, knobs: Knobs) -> float:
    """Linear warm-up, then constant or a cosine towards zero; never zero itself."""
    climb = min(1.0, (step + 1) / max(1.0, knobs.warmup * knobs.steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * step / knobs.steps) if knobs.decay == "cosine" else 1.0
    return knobs.lr * climb * fall


def score(pair: models.Pair, ro: Rollout, knobs: Knobs, loss_mask: Tensor | None = None) -> tuple:
    """Loss of a rollout, its gradients added to the masters' a micro-batch at a time (none under no_grad).

    All response tokens have a loss, or, in experiments, those of `loss_mask`, (B, R).
    Returns the loss, `token_stats` with each token's row and position, and the teacher's seconds.
    """
    loss_mask = ro.response_mask if loss_mask is None else loss_mask
    loss, stats, teacher_s, normalizer = 0.0, [], 0.0, int(loss_mask.sum())
    for rows in models.micro_batches(ro, knobs.micro_batch):
        ids, predicts = models.sequences(ro, rows, loss_mask)  # (b, L) both
        mask, started = loss_mask[rows], time.perf_counter()
        tokens, (row, position) = ro.tokens[rows][mask], mask.nonzero().T  # (N,) each
        with torch.no_grad():
            teacher = pair.teacher_head, models.hidden_states(pair.teacher, ids, predicts)  # (N, D_T)
        teacher_s += pair.seconds_since(started)
        student = pair.student_head, models.hidden_states(pair.student, ids, predicts)  # (N, D_S)
        part, seen = opd_loss(student, teacher, tokens, normalizer, knobs.divergence, knobs.temperature)
        if part.requires_grad:
            part.backward()
        loss += part.item()
        stats.append(seen | {"row": row.new_tensor(rows)[row], "position": position})
    return loss, {name: torch.cat([s[name] for s in stats]) for name in stats[0]}, teacher_s


def update(
    pair: models.Pair, optimizer, ro: Rollout, knobs: Knobs, step: int, loss_mask: Tensor | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """One step towards the teacher: its row of the log, and `token_stats`.

    A gradient that is no number moves nothing.
    """
    started = time.perf_counter()
    pair.student.train()  # switches gradient checkpointing on, where it is wanted
    loss, stats, teacher_s = score(pair, ro, knobs, loss_mask)
    norm = torch.nn.utils.clip_grad_norm_(pair.masters.values(), knobs.clip).item()
    rate = optimizer.param_groups[0]["lr"] = learning_rate(step, knobs)
    if math.isfinite(loss + norm):
        optimizer.step()
        pair.publish()  # the weights that the student computes with follow their fp32 masters
    optimizer.zero_grad()
    row = {"loss": loss, "grad_norm": norm, "lr": rate, "score_s": teacher_s}
    return row | {"update_s": pair.seconds_since(started) - teacher_s}, stats


def train(knobs: Knobs, schedule: Callable, pair: models.Pair, prompts: list, grade: Callable, folder: Path):
    """The run: `steps` times sample, score, update. `grade(model, name)` gives a model's held-out score."""
    student, rng = pair.student, torch.Generator(pair.student.device).manual_seed(knobs.seed)
    rollout = fast.sampler(knobs.sampler, student)  # rollout.rollout, or the same by faster means
    optimizer = torch.optim.AdamW(pair.masters.values(), betas=(0.9, knobs.beta2), weight_decay=0, fused=True)
    state = State(folder, pair, optimizer, rng, knobs.save_every)
    try:
        summary = {"before": grade(student, "before"), "teacher": grade(pair.teacher, "teacher")}
        for step in state.steps(knobs.steps):  # goes on where a stopped run was; saves after the body
            started, horizon = time.perf_counter(), schedule(step)
            ids = data.batch(len(prompts), knobs.batch_size, step, knobs.seed)
            asked = [prompts[i] for i in ids for _ in range(knobs.rollouts_per_prompt)]
            ro = rollout(student, asked, horizon, pair.ends, knobs.temperature, pair.vocab_size, rng)
            row = {"step": step, "horizon": horizon, "rollout_s": pair.seconds_since(started)}

            of_update, stats = update(pair, optimizer, ro, knobs, step)
            row |= of_update
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                report.stop_not_finite(folder, row, ids, ro, stats, pair.tokenizer)
            row["seconds"] = time.perf_counter() - state.began
            if knobs.eval_every and (step + 1) % knobs.eval_every == 0 and step + 1 < knobs.steps:
                row["accuracy"] = grade(student, f"step_{step + 1}")["accuracy"]
            report.log_step(folder, state.bar, row, ro, stats)
            if knobs.show_every and step % knobs.show_every == 0:
                report.show_rollout(folder, state.bar, step, pair.tokenizer, ro, stats)
        pair.save_student(folder / "student")
        summary["seconds"] = time.perf_counter() - state.began
        report.finish(folder, summary | {"after": grade(student, "after")})
    except Exception as error:
        shape = f"{knobs.batch_size} x {knobs.rollouts_per_prompt} rollouts, horizon {schedule(state.step)}"
        state.explain(error, shape)  # one line, unless it is a bug
        raise


def main() -> None:
    """Check all that can be checked before the first step, then train."""
    knobs, folder = prepare.settings(Knobs, parse(Knobs, __doc__, None))
    schedule = prepare.schedule(knobs)
    if knobs.dry_run:
        print(prepare.memory_of(knobs, max(map(schedule, range(knobs.steps)))))
        return
    pair, prompts, grade = prepare.load(knobs, folder)
    if knobs.horizon == "auto":
        knobs = replace(knobs, horizon=profile_horizon.choose(score, pair, prompts, knobs))
        schedule = prepare.schedule(knobs)
    with report.only_run(folder, fresh=not knobs.resume):
        report.write_config(folder, asdict(knobs), pair.student.device)
        train(knobs, schedule, pair, prompts, grade, folder)


if __name__ == "__main__":
    run(main)
