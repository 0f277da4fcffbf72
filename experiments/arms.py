"""The arms of a comparison: how long rollouts are, and which of their tokens have a loss.

Shapes: B rows, R longest response. T: `--max-new-tokens`. N: a tenth of T. A new arm is one entry of ARMS.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import models
import train
from rollout import Rollout
from schedules import make_schedule

SHARE = 0.1  # N / T: the horizon of topd-0.1, and the tokens of a row that a mask leaves with a loss


# Horizons: (place, knobs, seen) -> H. `place` is the step, `seen` what the run's earlier steps have shown:
# pairs of H and the mean reverse KL in its second half.


def by_schedule(name: str, horizon: float | None = None) -> Callable:
    def law(place: int, knobs, seen: list[tuple[int, float]]) -> int:
        start = knobs.esr_tokens if name == "esr" else horizon
        return make_schedule(name, knobs.max_new_tokens, knobs.steps, start)(place)

    return law


def adaptive(place: int, knobs, seen: list[tuple[int, float]], span: int = 4) -> int:
    """H doubles once the boundary is learned: the reverse KL in its second half no longer falls.

    That is, of the last four steps at this H, the later two have more than 0.9 of the KL of the two before. A
    ratio, because nats differ from pair to pair. A simple form, with numbers of our own, of the idea of
    arXiv 2605.28396 and 2607.29494.
    """
    if not seen:
        return max(1, round(SHARE * knobs.max_new_tokens))
    horizon = seen[-1][0]
    here = [kl for h, kl in seen if h == horizon][-span:]
    settled = len(here) == span and sum(here[span // 2 :]) > 0.9 * sum(here[: span // 2])
    return min(knobs.max_new_tokens, 2 * horizon) if settled else horizon


# Masks: (rollout, N, rng, look) -> (B, R) bool, the tokens with a loss; `look(name)` gives a statistic of
# each token, (B, R), for one more forward pass. Every mask leaves as many tokens: the sum of min(N, length).


def first(ro: Rollout, size: int, rng: torch.Generator, look: Callable) -> Tensor:
    """The first N of each row.

    What comes later changes neither these tokens nor their loss, so the gradient has the law of rollouts that
    are cut at N: the control that shows what generation beyond N adds, which is cost.
    """
    return ro.response_mask & (positions(ro) < size)


def last(ro: Rollout, size: int, rng: torch.Generator, look: Callable) -> Tensor:
    """The last N of each row."""
    return ro.response_mask & (positions(ro) >= ro.response_mask.sum(1, keepdim=True) - size)


def window(ro: Rollout, size: int, rng: torch.Generator, look: Callable) -> Tensor:
    """N consecutive tokens of each row, from a start drawn at random."""
    starts = (ro.response_mask.sum(1, keepdim=True) - size + 1).clamp_min(1)  # (B, 1) how many there are
    uniform = torch.rand(starts.shape, generator=rng, device=starts.device)
    start = (uniform * starts).long().minimum(starts - 1)  # the product may round up
    return ro.response_mask & (positions(ro) >= start) & (positions(ro) < start + size)


def scattered(ro: Rollout, size: int, rng: torch.Generator, look: Callable) -> Tensor:
    """Tokens at random, wherever they are."""
    return highest(torch.rand(ro.tokens.shape, generator=rng, device=ro.tokens.device), ro, size)


def by_statistic(name: str) -> Callable:
    def mask(ro: Rollout, size: int, rng: torch.Generator, look: Callable) -> Tensor:
        return highest(look(name), ro, size)

    return mask


def positions(ro: Rollout) -> Tensor:
    return torch.arange(ro.tokens.shape[1], device=ro.tokens.device)[None]  # (1, R)


def highest(values: Tensor, ro: Rollout, size: int) -> Tensor:
    """The tokens of the highest values, (B, R), chosen over the whole step: a row may have many, or none."""
    count = int(ro.response_mask.sum(1).clamp_max(size).sum())
    chosen = values.masked_fill(~ro.response_mask, -torch.inf).flatten().topk(count).indices
    mask = torch.zeros_like(ro.response_mask)
    mask.view(-1)[chosen] = True
    return mask


def token_values(pair: models.Pair, ro: Rollout, knobs, name: str) -> Tensor:
    """One of `token_stats`, by row and position: (B, R), 0 after the end."""
    with torch.no_grad():
        _, stats, _ = train.score(pair, ro, knobs)
    values = ro.logp.new_zeros(ro.tokens.shape)
    values[stats["row"], stats["position"]] = stats[name].to(values.dtype)
    return values


class Arm(NamedTuple):
    horizon: Callable
    mask: Callable | None = None  # None: every sampled token has a loss
    rate: float = 1.0  # times the learning rate


FULL, CUT = by_schedule("full"), by_schedule("topd", SHARE)
ARMS = {
    "full": Arm(FULL),
    "popd": Arm(by_schedule("popd")),
    "topd-0.25": Arm(by_schedule("topd", 0.25)),
    "topd-0.1": Arm(CUT),
    "esr": Arm(by_schedule("esr")),
    "adaptive": Arm(adaptive),
    # Weight 1/T: each token of a cut rollout counts as in a full one, H/T of its weight in the mean over the
    # cut. AdamW divides a constant factor of the loss out again; on the learning rate it stays.
    "topd-0.1-weight": Arm(CUT, rate=SHARE),
    "first": Arm(FULL, first),
    "window": Arm(FULL, window),
    "last": Arm(FULL, last),
    "random": Arm(FULL, scattered),
    "top-kl": Arm(FULL, by_statistic("reverse_kl")),
    "top-teacher-entropy": Arm(FULL, by_statistic("teacher_entropy")),
    "top-student-entropy": Arm(FULL, by_statistic("student_entropy")),
}
SELECTION = ("first", "last", "random", "top-kl", "top-teacher-entropy", "top-student-entropy")
GROUPS = {
    "all": tuple(ARMS),
    "horizons": tuple(ARMS)[:10],
    "selection": ("full", *SELECTION),
    "closing": ("full", "popd", "topd-0.1", "adaptive"),
}
