"""`--sampler graphs`: the plain sampler with a CUDA graph that computes a whole token.

In `rollout.rollout` a GPU mostly waits for Python, which launches several hundred small kernels for each
token, one by one. A CUDA graph records them once, and then launches all of them together. Tensors must keep
their places in memory, so the cache has its full length from the start, and finished rows stay in the batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from rollout import Rollout, pad_left, sample
from support.cli import BadInput
from support.models import first_line
from support.run_folder import is_out_of_memory

LOOK = 32  # tokens between two checks of whether all rows have ended


@torch.no_grad()
def graph_rollout(
    model,  # a Hugging Face causal LM in evaluation mode
    prompts: list[list[int]],
    horizon: int,
    eos_ids: set[int],
    noise: Tensor,  # (B, H) from `sampling_noise`
    temperature: float = 1.0,
    vocab_size: int | None = None,
    top_p: float = 1.0,
) -> Rollout:
    """The arguments, the distribution and, up to rounding, the sample of `rollout.rollout`.

    On a CPU the same operations run without a graph. Raises ValueError if the model is in training mode,
    BadInput if its cache cannot have a fixed length, or if it computes on the CPU or waits for the GPU.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
    device = model.device
    ids, mask = pad_left(prompts, device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = fixed_cache(model, ids.shape[1] + horizon)
    mask = F.pad(mask, (0, horizon), value=1)  # the causal mask hides places that are not written yet
    noise = noise.to(device)
    eos = torch.tensor(sorted(eos_ids), device=device)
    tokens = ids.new_zeros(len(prompts), horizon)
    logp = torch.zeros_like(tokens, dtype=torch.float)
    response_mask = torch.zeros_like(tokens, dtype=torch.bool)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)  # a tensor, as a graph does not run Python

    def next_token(ids: Tensor, positions: Tensor) -> Tensor:
        """Sample token t of every row, (B, 1), and write it into the tensors above."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1, :vocab_size]
        token, token_logp = sample(logits, temperature, noise.index_select(1, t).squeeze(1), top_p)
        tokens.index_copy_(1, t, token[:, None])
        logp.index_copy_(1, t, token_logp[:, None])
        response_mask.index_copy_(1, t, ~finished[:, None])
        finished.logical_or_((token[:, None] == eos).any(1))  # `torch.isin` may wait for the GPU
        t.add_(1)
        return token[:, None]

    newest = next_token(ids, positions)
    # Finished rows have position 0, as some rotary embeddings (longrope) depend on the batch's largest one.
    position = (positions[:, -1:] + 1) * ~finished[:, None]

    def decode() -> None:
        newest.copy_(next_token(newest, position))
        position.add_(1).mul_(~finished[:, None])

    step = 1
    while step < horizon and not (step % LOOK == 0 and finished.all()):
        if step == 2 and device.type == "cuda":  # after a first call, in which libraries allocate memory
            decode = recorded(model, decode, device)
        decode()
        step += 1
    if t.item() != step:
        raise refusal(model, "its recording is empty")
    length = int(response_mask.any(0).sum())
    tokens = tokens.where(response_mask, 0)[:, :length]
    logp = logp.where(response_mask, 0)[:, :length]
    return Rollout(prompts, tokens, response_mask[:, :length], logp, finished)


def recorded(model, function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A call that replays the kernels that `function` launches. Recording them does not run them."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):  # records a stream of the current device
            function()
    except RuntimeError as error:
        cause = error.__context__ or error  # after an error, the end of the recording raises another one
        if is_out_of_memory(cause):
            raise cause from None
        raise refusal(model, first_line(cause)) from error
    return graph.replay


def fixed_cache(model, length: int) -> StaticCache:
    """A KV cache that has room for `length` tokens in every layer, also where attention has a window.

    The library's layers with a window count in Python, which a graph does not run.
    """
    try:
        cache = StaticCache(config=model.config, max_cache_len=length)
    except KeyError as error:
        raise refusal(model, f"its cache has no fixed form of {error}") from error
    for layer in cache.layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise refusal(model, f"its cache has a {type(layer).__name__}")
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]
    return cache


def refusal(model, reason: str) -> BadInput:
    return BadInput(f"{type(model).__name__} does not run in a CUDA graph ({reason}): drop --sampler graphs")
