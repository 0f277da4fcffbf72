"""The arms of a comparison: who writes the rollouts, how long they are, which tokens have a loss, and which.

Shapes: B rows, R longest response, C tokens of a chunk, V vocabulary. T is `--max-new-tokens`, N = T / 10.
A new arm is one entry at the end of ARMS.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import root  # noqa: F401  puts the project on the path
import torch
from torch import Tensor

import train
from opd import Divergence, nll, token_logp
from rollout import Rollout, rollout, sampling_noise
from schedules import make_schedule
from support import models

SHARE = 0.1  # N / T: the horizon of topd-0.1, and the tokens of a row that keep their loss under a mask

# Horizons: (knobs, rows) -> (step -> H). The run appends to the rows, one for each finished step.


def by_schedule(name: str, horizon: float | None = None) -> Callable:
    def horizon_of(knobs, rows: list[dict]) -> Callable[[int], int]:
        return make_schedule(name, knobs.max_new_tokens, knobs.steps, horizon)

    return horizon_of


def esr(knobs, rows: list[dict]) -> Callable[[int], int]:
    """The first `esr_tokens` tokens of an answer."""
    return lambda step: min(knobs.esr_tokens, knobs.max_new_tokens)


def adaptive(knobs, rows: list[dict]) -> Callable[[int], int]:
    """H doubles when the reverse KL in its second half has stopped falling.

    The criterion: of the last four steps at this H, the later two have more than 0.9 times the KL of the
    earlier two. It is a ratio because the scale of the KL differs between pairs. This is a simple form, with
    our own constants, of the idea of arXiv 2605.28396 and 2607.29494.
    """

    def horizon_at(step: int) -> int:
        if not rows:
            return masked_tokens(knobs)
        horizon = rows[-1]["horizon"]
        recent = [row["late_kl"] for row in rows if row["horizon"] == horizon][-4:]
        if len(recent) == 4 and sum(recent[2:]) > 0.9 * sum(recent[:2]):
            return min(knobs.max_new_tokens, 2 * horizon)
        return horizon

    return horizon_at


# Masks: (pair, rollouts, knobs, step) -> (B, R) bool, the tokens with a loss.
# Those of SELECTION, and `window`, leave the same number of tokens: the sum of min(N, length) over the rows.


def first(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """The first N of each row.

    Later tokens change neither these tokens nor their loss, so the gradient has the same distribution as that
    of rollouts cut at N. This control shows what generation beyond N adds, which is cost.
    """
    return rollouts.response_mask & (positions(rollouts) < masked_tokens(knobs))


def last(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """The last N of each row."""
    start = rollouts.response_mask.sum(1, keepdim=True) - masked_tokens(knobs)
    return rollouts.response_mask & (positions(rollouts) >= start)


def window(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """N consecutive tokens of each row, from a random start."""
    size = masked_tokens(knobs)
    starts = (rollouts.response_mask.sum(1, keepdim=True) - size + 1).clamp_min(1)  # (B, 1) possible starts
    start = (noise(pair, rollouts, knobs, step)[:, :1] * starts).long()
    start = start.minimum(starts - 1)  # the product may round up
    place = positions(rollouts)
    return rollouts.response_mask & (place >= start) & (place < start + size)


def highest(values_of: Callable) -> Callable:
    """The tokens with the highest values in the whole step: a row may have many of them, or none."""

    def mask(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
        number = int(rollouts.response_mask.sum(1).clamp_max(masked_tokens(knobs)).sum())
        return top(rollouts, number, values_of(pair, rollouts, knobs, step))

    return mask


def least_likely_fifth(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """The 20 % of the step's tokens that were least likely when they were sampled."""
    return top(rollouts, round(0.2 * int(rollouts.response_mask.sum())), -rollouts.logp)


def without_end(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """All tokens but the eos token, which is the last one of a finished row."""
    end = positions(rollouts) == rollouts.response_mask.sum(1, keepdim=True) - 1
    return rollouts.response_mask & ~(end & rollouts.finished[:, None])


def top(rollouts: Rollout, number: int, values: Tensor) -> Tensor:
    candidates = values.masked_fill(~rollouts.response_mask, -torch.inf)
    mask = torch.zeros_like(rollouts.response_mask)
    mask.view(-1)[candidates.flatten().topk(number).indices] = True
    return mask


def positions(rollouts: Rollout) -> Tensor:
    return torch.arange(rollouts.tokens.shape[1], device=rollouts.tokens.device)[None]  # (1, R)


def masked_tokens(knobs) -> int:
    """N in tokens."""
    return max(1, round(SHARE * knobs.max_new_tokens))


# Values that `highest` chooses by: (pair, rollouts, knobs, step) -> (B, R).


def noise(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """Uniform random numbers that depend only on the seed, the row and the number of earlier steps."""
    keys = [("mask", knobs.seed, step, row) for row in range(len(rollouts.prompts))]
    return sampling_noise(keys, rollouts.tokens.shape[1]).to(rollouts.tokens.device)


def statistic(name: str) -> Callable:
    """One of opd.token_statistics: one more forward pass."""

    @torch.no_grad()
    def values_of(pair: train.Pair, rollouts: Rollout, knobs, step: int) -> Tensor:
        _, tokens = train.score(pair, rollouts, temperature=knobs.temperature, micro_batch=knobs.micro_batch)
        return by_place(rollouts, tokens, name)

    return values_of


def by_place(rollouts: Rollout, tokens: dict[str, Tensor], name: str) -> Tensor:
    """A statistic of tokens by row and position, (B, R); 0 where there is none."""
    values = torch.zeros(rollouts.tokens.shape, device=rollouts.tokens.device)
    values[tokens["row"], tokens["position"]] = tokens[name].to(values.dtype)
    return values


# Samplers: (pair, knobs) -> what `train.train` takes as its sampler, with the student as the first argument.


def teachers_share(share: float) -> Callable:
    """In each step the teacher writes all rollouts with this probability; seed and step decide."""

    def sampler_of(pair: train.Pair, knobs) -> Callable[..., Rollout]:
        steps = count()  # counts calls: right only in runs that are never resumed

        def sampler(student, *settings, **more) -> Rollout:
            draw = sampling_noise([("writer", knobs.seed, next(steps))], 1).item()
            if draw < share:
                return replace(rollout(pair.teacher, *settings, **more), logp=None)
            return rollout(student, *settings, **more)

        return sampler

    return sampler_of


def unlikelihood(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """-A log p(y) with the fixed advantage A = -0.5: (C, V), (C, V), (C,) -> (C,). No teacher is in it."""
    return 0.5 * token_logp(student_logp, tokens)


class Arm(NamedTuple):
    horizon: Callable  # (knobs, rows) -> (step -> H)
    mask: Callable | None = None  # None: every sampled token has a loss
    lr_scale: float = 1.0
    sampler: Callable | None = None  # None: the student writes
    divergence: Divergence | None = None  # None: that of the knobs
    sharpened: float | None = None  # the teacher is a copy of the untrained student, at this temperature
    low_memory: bool = False  # LoRA: the student must have been loaded with adapters

    def scorer(self, knobs) -> Callable[..., tuple[float, dict[str, Tensor]]]:
        """`train.score` with this arm's mask, divergence and teacher."""
        steps = count()  # as in `teachers_share`

        def score(pair: train.Pair, rollouts: Rollout, **settings) -> tuple[float, dict[str, Tensor]]:
            step = next(steps)
            changes = {"teacher_temperature": self.sharpened}
            if self.divergence:
                changes["divergence"] = self.divergence
            if self.mask:
                changes["loss_mask"] = self.mask(pair, rollouts, knobs, step)
            return train.score(pair, rollouts, **(settings | changes))

        return score

    def train(self, pair: train.Pair, prompts: list[list[int]], knobs, run) -> None:
        """Train the pair's student. The horizon may depend on `run.rows`."""
        knobs = replace(knobs, lr=knobs.lr * self.lr_scale)
        if self.sharpened:
            teacher = deepcopy(pair.student).requires_grad_(False)
            pair = replace(pair, teacher=teacher, teacher_head=models.OutputHead.of(teacher, pair.vocab_size))
        optimizer = train.adamw(pair, knobs)
        horizon_at = self.horizon(knobs, run.rows)
        sampler = self.sampler(pair, knobs) if self.sampler else rollout
        scorer = self.scorer(knobs)
        train.train(pair, optimizer, prompts, horizon_at, knobs, run, sampler=sampler, scorer=scorer)


FULL = by_schedule("full")
TRUNCATED = by_schedule("topd", SHARE)
TEACHER = teachers_share(1.0)
ARMS = {
    "full": Arm(FULL),
    "popd": Arm(by_schedule("popd")),
    "topd-0.25": Arm(by_schedule("topd", 0.25)),
    "topd-0.1": Arm(TRUNCATED),
    "esr": Arm(esr),
    "adaptive": Arm(adaptive),
    # A tenth of the learning rate and nothing else. It does not give a token the weight that it has in a full
    # rollout: that is a factor of the loss, which AdamW cancels.
    "topd-0.1-lr-0.1": Arm(TRUNCATED, lr_scale=0.1),
    "first": Arm(FULL, first),
    "window": Arm(FULL, window),
    "last": Arm(FULL, last),
    "random": Arm(FULL, highest(noise)),
    "top-kl": Arm(FULL, highest(statistic("reverse_kl"))),
    "top-teacher-entropy": Arm(FULL, highest(statistic("teacher_entropy"))),
    "top-student-entropy": Arm(FULL, highest(statistic("student_entropy"))),
    # Controls of the gain itself: does it need a teacher, the teacher's distribution, the student's own text?
    "no-teacher": Arm(FULL, least_likely_fifth, divergence=unlikelihood),  # arXiv 2608.31046
    "seqkd": Arm(FULL, sampler=TEACHER, divergence=nll),  # cross-entropy on the teacher's answers
    "self-teacher": Arm(FULL, sharpened=0.7),
    "no-end": Arm(FULL, without_end),
    "seqkd-0.1": Arm(TRUNCATED, sampler=TEACHER, divergence=nll),
    "gkd": Arm(FULL, sampler=teachers_share(0.5)),  # GKD's lambda = 0.5, with the same divergence as full
    "lora": Arm(FULL, low_memory=True),
    "lora-esr": Arm(esr, low_memory=True),
}
SELECTION = ("first", "last", "random", "top-kl", "top-teacher-entropy", "top-student-entropy")
GROUPS = {
    "all": tuple(ARMS)[:14],
    "horizons": tuple(ARMS)[:10],
    "selection": ("full", *SELECTION),
    "closing": ("full", "popd", "topd-0.1", "adaptive"),
}
