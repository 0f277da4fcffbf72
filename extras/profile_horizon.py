"""`--horizon auto`: where in an answer the reverse KL is, before training, and the horizon it suggests.

ESR's rule of thumb for N: score about 1,000 full rollouts and take the position at which the cumulative
reverse KL reaches 45 % of its total (Zhou et al., arXiv 2605.27028). Cumulative means the plain sum over all
tokens of all rollouts. A mean over the unfinished rollouts would give the few longest ones as much weight,
late in an answer, as all of them have at its start.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rollout import Rollout, rollout, sampling_noise
from support import batch_size, data
from support.cli import BadInput


def horizon_of_profile(reverse_kl: Tensor, position: Tensor, share: float = 0.45) -> int:
    """How many tokens from the start hold `share` of all reverse KL; (N,) nats, (N,) positions from 0.

    Raises BadInput where the reverse KL is no more than rounding, 1e-6 nats a token.
    """
    by_position = torch.zeros(int(position.max()) + 1, dtype=torch.double)
    cumulative = by_position.index_add(0, position.cpu(), reverse_kl.cpu().double()).cumsum(0)
    if not cumulative[-1] > 1e-6 * len(reverse_kl):  # `not >` also catches NaN
        what = f"a reverse KL of {cumulative[-1]:g} nats in {len(reverse_kl)} tokens suggests no horizon"
        raise BadInput(f"{what}: name another teacher, or give --horizon as a number")
    return int((cumulative >= share * cumulative[-1]).nonzero()[0]) + 1


def in_batches(
    model, pair, texts: list[list[int]], horizon: int, temperature: float, stream: object, batch: int
) -> Iterator[Rollout]:
    """Rollouts of `model` after each text, at most `batch` together; each `stream` has its own noise."""
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        noise = sampling_noise([(stream, start + row) for row in range(len(part))], horizon)
        yield rollout(model, part, horizon, pair.eos_ids, noise, temperature, pair.vocab_size)


@torch.no_grad()
def scored(score: Callable, pair, parts: Iterable[Rollout], **settings: Any) -> dict[str, Tensor]:
    """`token_statistics` of all rollouts, with row and position; rows are numbered throughout."""
    statistics = []
    done = 0
    for part in parts:
        _, tokens = score(pair, part, **settings)
        statistics.append(tokens | {"row": tokens["row"] + done})
        done += len(part.prompts)
    return {name: torch.cat([part[name] for part in statistics]) for name in statistics[0]}


def measure(
    score: Callable,  # train.score
    pair,
    prompts: list[list[int]],
    knobs,  # train.Knobs
    rollouts: int = 256,
    batch: int = 64,
    writer=None,  # the model whose rollouts are scored; default: the student
) -> dict[str, Tensor]:
    """`token_statistics` of full rollouts, with row and position; prompts in training order."""
    texts = [prompts[i] for i in data.batch_indices(len(prompts), rollouts, 0, knobs.seed)]
    writer = writer or pair.student
    stream = f"profile {knobs.seed}"
    parts = in_batches(writer, pair, texts, knobs.max_new_tokens, knobs.temperature, stream, batch)
    return scored(score, pair, parts, temperature=knobs.temperature, micro_batch=knobs.micro_batch)


def choose(score: Callable, pair, prompts: list[list[int]], knobs) -> float:
    """The horizon of `--horizon auto`, and a line that explains it. Raises BadInput if it is undefined."""
    print("--horizon auto: measuring the student's full rollouts", flush=True)
    batch = batch_size.batch_that_fits(pair.student, prompts, knobs.max_new_tokens, "auto")
    tokens = measure(score, pair, prompts, knobs, batch=batch)
    n = horizon_of_profile(tokens["reverse_kl"], tokens["position"])
    rows = int(tokens["row"].max()) + 1
    what = f"the first {n} tokens hold 45 % of the reverse KL of {rows} rollouts"
    mean, length = tokens["reverse_kl"].mean().item(), len(tokens["row"]) / rows
    print(f"horizon {n}: {what} ({mean:.3f} nats per token, {length:.0f} tokens each)", flush=True)
    return n if n > 1 else 1 / knobs.max_new_tokens  # --horizon 1 would mean the whole budget
