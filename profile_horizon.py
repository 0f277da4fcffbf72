"""Where in an answer the gap lies, measured before training, and the horizon that it suggests.

ESR's rule of thumb for N: score about 1,000 full rollouts, take the position at which the cumulative reverse
KL reaches 45 % of its total (Zhou et al., arXiv 2605.27028). Cumulative is here the plain sum over all tokens
of all rollouts: what a budget of supervised tokens sees. A mean over the rollouts that still go on would give
the few longest ones as much weight, late in an answer, as all of them have at its start.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import data
import fast
import memory
from cli import BadInput
from rollout import Rollout


def horizon_of_profile(reverse_kl: Tensor, position: Tensor, share: float = 0.45) -> int:
    """How many tokens from the start hold `share` of all reverse KL; (N,) nats, (N,) positions from 0.

    Raises BadInput where the gap is no more than rounding, 1e-6 nats a token.
    """
    by_position = torch.zeros(int(position.max()) + 1, dtype=torch.double)
    cumulative = by_position.index_add(0, position.cpu(), reverse_kl.cpu().double()).cumsum(0)
    if not cumulative[-1] > 1e-6 * len(reverse_kl):  # `not >` catches NaN too
        what = f"a reverse KL of {cumulative[-1]:g} nats in {len(reverse_kl)} tokens shows no place of a gap"
        raise BadInput(f"{what}: name another teacher, or give --horizon as a number")
    return int((cumulative >= share * cumulative[-1]).nonzero()[0]) + 1


def in_batches(
    model, pair, texts: list[list[int]], horizon: int, temperature: float, seed: int, batch: int
) -> Iterator[Rollout]:
    """Rollouts of `model` after each text, at most `batch` of them together."""
    generator, sampler = torch.Generator(model.device).manual_seed(seed), fast.sampler("", model)
    for start in range(0, len(texts), batch):
        law = temperature, pair.vocab_size, generator
        yield sampler(model, texts[start : start + batch], horizon, pair.ends, *law)


@torch.no_grad()
def measure(
    score: Callable,  # train.score, handed in because train.py may import this file
    pair,
    prompts: list[list[int]],
    knobs,  # train.Knobs: T is max_new_tokens, and temperature, seed and micro_batch count
    rollouts: int = 256,
    batch: int = 64,
) -> dict[str, Tensor]:
    """`token_stats` of full rollouts of the student, with row and position; prompts in training's order."""
    asked = [prompts[i] for i in data.batch(len(prompts), rollouts, 0, knobs.seed)]
    law, stats, done = (knobs.max_new_tokens, knobs.temperature, knobs.seed, batch), [], 0
    for ro in in_batches(pair.student, pair, asked, *law):
        found = score(pair, ro, knobs)[1]
        stats.append(found | {"row": found["row"] + done})
        done += len(ro.prompts)
    return {name: torch.cat([s[name] for s in stats]) for name in stats[0]}


def choose(score: Callable, pair, prompts: list[list[int]], knobs) -> float:
    """The horizon of `--horizon auto`, and a line that says why. Raises BadInput if there is no gap."""
    print("--horizon auto: a profile of the student's full rollouts comes first", flush=True)
    batch = memory.batch_that_fits(pair.student, prompts, knobs.max_new_tokens, "auto")
    stats = measure(score, pair, prompts, knobs, batch=batch)
    n, rows = horizon_of_profile(stats["reverse_kl"], stats["position"]), int(stats["row"].max()) + 1
    what = f"the first {n} tokens hold 45 % of the reverse KL of {rows} rollouts"
    mean, length = stats["reverse_kl"].mean().item(), len(stats["row"]) / rows
    print(f"horizon {n}: {what} ({mean:.3f} nats a token, {length:.0f} tokens long)", flush=True)
    return n if n > 1 else 1 / knobs.max_new_tokens  # as --horizon, a 1 would mean all of T
