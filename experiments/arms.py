"""The arms of a comparison: how long rollouts are, and which of their tokens have a loss.

Shapes: B rows, R longest response. T is `--max-new-tokens`, N = T / 10. A new arm is one entry of ARMS.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import train
from rollout import Rollout, sampling_noise
from schedules import make_schedule

SHARE = 0.1  # N / T: the horizon of topd-0.1, and the tokens of a row that keep their loss under a mask

# One entry per finished step: its horizon, and the mean reverse KL of the tokens in the second half of it.
History = list[tuple[int, float]]


# Horizons: (knobs, history) -> (step -> H). The run appends to the history.


def by_schedule(name: str, horizon: float | None = None) -> Callable:
    def horizon_of(knobs, history: History) -> Callable[[int], int]:
        start = knobs.esr_tokens if name == "esr" else horizon
        return make_schedule(name, knobs.max_new_tokens, knobs.steps, start)

    return horizon_of


def adaptive(knobs, history: History, span: int = 4) -> Callable[[int], int]:
    """H doubles when the reverse KL in its second half has stopped falling.

    The criterion: of the last four steps at this H, the later two have more than 0.9 of the KL of the two
    before. It is a ratio because the scale of the KL differs between pairs. This is a simple form, with
    constants of our own, of the idea of arXiv 2605.28396 and 2607.29494.
    """

    def horizon_at(step: int) -> int:
        if not history:
            return masked_tokens(knobs)
        horizon = history[-1][0]
        recent = [kl for h, kl in history if h == horizon][-span:]
        earlier, later = sum(recent[: span // 2]), sum(recent[span // 2 :])
        if len(recent) == span and later > 0.9 * earlier:
            return min(knobs.max_new_tokens, 2 * horizon)
        return horizon

    return horizon_at


# Masks: (rollouts, N, values) -> (B, R) bool, the tokens with a loss; values: (B, R), one number per token.
# Every mask leaves the same number of tokens: the sum of min(N, length) over the rows.


def first(rollouts: Rollout, size: int, values: Tensor | None) -> Tensor:
    """The first N of each row.

    Later tokens change neither these tokens nor their loss, so the gradient has the same distribution as that
    of rollouts cut at N. This control shows what generation beyond N adds, which is cost.
    """
    return rollouts.response_mask & (positions(rollouts) < size)


def last(rollouts: Rollout, size: int, values: Tensor | None) -> Tensor:
    """The last N of each row."""
    start = rollouts.response_mask.sum(1, keepdim=True) - size
    return rollouts.response_mask & (positions(rollouts) >= start)


def window(rollouts: Rollout, size: int, values: Tensor) -> Tensor:
    """N consecutive tokens of each row; the row's first value, in [0, 1), chooses where they start."""
    starts = (rollouts.response_mask.sum(1, keepdim=True) - size + 1).clamp_min(1)  # (B, 1) possible starts
    start = (values[:, :1] * starts).long().minimum(starts - 1)  # the product may round up
    place = positions(rollouts)
    return rollouts.response_mask & (place >= start) & (place < start + size)


def highest(rollouts: Rollout, size: int, values: Tensor) -> Tensor:
    """The tokens with the highest values in the whole step: a row may have many of them, or none."""
    count = int(rollouts.response_mask.sum(1).clamp_max(size).sum())
    candidates = values.masked_fill(~rollouts.response_mask, -torch.inf)
    mask = torch.zeros_like(rollouts.response_mask)
    mask.view(-1)[candidates.flatten().topk(count).indices] = True
    return mask


def positions(rollouts: Rollout) -> Tensor:
    return torch.arange(rollouts.tokens.shape[1], device=rollouts.tokens.device)[None]  # (1, R)


def masked_tokens(knobs) -> int:
    """N in tokens."""
    return max(1, round(SHARE * knobs.max_new_tokens))


# Values that a mask chooses by: (pair, rollouts, knobs, step) -> (B, R).


def noise(pair: train.Pair | None, rollouts: Rollout, knobs, step: int) -> Tensor:
    """Uniform random numbers that depend on seed, step and row alone."""
    keys = [("mask", knobs.seed, step, row) for row in range(len(rollouts.prompts))]
    return sampling_noise(keys, rollouts.tokens.shape[1]).to(rollouts.tokens.device)


def statistic(name: str) -> Callable:
    """One of opd.token_statistics by row and position, 0 after the end: one more forward pass."""

    @torch.no_grad()
    def values_of(pair: train.Pair, rollouts: Rollout, knobs, step: int) -> Tensor:
        _, tokens = train.score(pair, rollouts, temperature=knobs.temperature, micro_batch=knobs.micro_batch)
        values = torch.zeros_like(rollouts.logp)
        values[tokens["row"], tokens["position"]] = tokens[name].to(values.dtype)
        return values

    return values_of


class Arm(NamedTuple):
    horizon: Callable  # (knobs, history) -> (step -> H)
    mask: Callable | None = None  # None: every sampled token has a loss
    values: Callable | None = None  # what the mask chooses by
    lr_scale: float = 1.0

    def loss_mask(self, pair: train.Pair, knobs) -> Callable[[int, Rollout], Tensor] | None:
        """The mask as `train.train` takes it: (step, rollouts) -> (B, R)."""

        def mask(step: int, rollouts: Rollout) -> Tensor:
            values = self.values(pair, rollouts, knobs, step) if self.values else None
            return self.mask(rollouts, masked_tokens(knobs), values)

        return mask if self.mask else None


FULL = by_schedule("full")
TRUNCATED = by_schedule("topd", SHARE)
ARMS = {
    "full": Arm(FULL),
    "popd": Arm(by_schedule("popd")),
    "topd-0.25": Arm(by_schedule("topd", 0.25)),
    "topd-0.1": Arm(TRUNCATED),
    "esr": Arm(by_schedule("esr")),
    "adaptive": Arm(adaptive),
    # A tenth of the learning rate and nothing else. It does not give a token the weight that it has in a full
    # rollout: that is a factor of the loss, which AdamW cancels.
    "topd-0.1-lr-0.1": Arm(TRUNCATED, lr_scale=0.1),
    "first": Arm(FULL, first),
    "window": Arm(FULL, window, noise),
    "last": Arm(FULL, last),
    "random": Arm(FULL, highest, noise),
    "top-kl": Arm(FULL, highest, statistic("reverse_kl")),
    "top-teacher-entropy": Arm(FULL, highest, statistic("teacher_entropy")),
    "top-student-entropy": Arm(FULL, highest, statistic("student_entropy")),
}
SELECTION = ("first", "last", "random", "top-kl", "top-teacher-entropy", "top-student-entropy")
GROUPS = {
    "all": tuple(ARMS),
    "horizons": tuple(ARMS)[:10],
    "selection": ("full", *SELECTION),
    "closing": ("full", "popd", "topd-0.1", "adaptive"),
}
