"""Rollouts: the student writes its own answers, token by token, with a KV cache.

Shapes: B rows, b of them still going, P longest prompt, R longest response, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class Rollout:
    """B sampled responses. The mask is the sampler's own record: ids can't tell padding from a real token."""

    prompts: list[list[int]]
    tokens: Tensor  # (B, R) int64, 0 after the end
    response_mask: Tensor  # (B, R) bool: true on sampled tokens, the end token included
    logp: Tensor  # (B, R) fp32 log-probability of each token under the law it was sampled from
    finished: Tensor  # (B,) bool: ended with an end token, was not cut at the horizon


def sample(
    logits: Tensor, temperature: float, generator: torch.Generator | None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A token a row from softmax(logits / temperature), at 0 the likeliest: (b, V) -> token (b,), logp (b,).

    One uniform number a row, looked up in the cumulative sum: `torch.multinomial` draws V of them. A token
    of probability 0 is never hit. NaN logits give a token with logp NaN, for the loss to stop the run.
    """
    logits = logits if temperature in (0, 1) else logits.float() / temperature
    logp = torch.log_softmax(logits, dim=-1, dtype=torch.float)  # fp32, without a copy of the logits
    if temperature == 0:
        token = logp.argmax(-1)
        return token, logp.gather(-1, token[:, None]).squeeze(-1)
    if top_p < 1:  # keep the likeliest tokens that hold this share, the last of them whole
        ordered, ids = logp.sort(-1, descending=True)
        kept = ordered.exp().cumsum(-1) - ordered.exp() < top_p
        logp = logp.masked_fill(~kept.gather(-1, ids.argsort(-1)), -torch.inf).log_softmax(-1)
    cumulative = logp.exp().cumsum_(-1)
    uniform = torch.rand(len(logp), 1, device=logp.device, generator=generator) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform, right=True).squeeze(-1).clamp_max(logp.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


@torch.no_grad()
def rollout(
    model,  # any Hugging Face causal LM
    prompts: list[list[int]],
    horizon: int,
    end_ids: set[int],
    temperature: float = 1.0,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
    top_p: float = 1.0,  # evaluation only: the loss differentiates the whole law
) -> Rollout:
    """Sample at most `horizon` tokens after each prompt; every id of `end_ids` ends a row.

    The law is softmax(logits[:vocab_size] / temperature); the checkpoint's generation config is not read.
    Rows that end leave the batch, and so does their cache: padding costs no compute.
    """
    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    # Padding goes to the left, so that each row's next token comes last: (B, P) both.
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # each row counts from its own first token
    tokens = ids.new_zeros(len(prompts), horizon)
    response_mask, logp = tokens.bool(), tokens.float()  # all zero still
    going = torch.arange(len(prompts), device=device)  # rows still in the batch
    finished, ends = torch.zeros_like(going, dtype=torch.bool), torch.tensor(sorted(end_ids), device=device)
    cache, was_training = DynamicCache(config=model.config), model.training
    model.eval()  # dropout off, and gradient checkpointing, which would turn the cache off
    try:
        for t in range(horizon):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            out = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1, :vocab_size]  # (b, V)
            token, token_logp = sample(logits, temperature, generator, top_p)  # (b,) both
            tokens[going, t], logp[going, t], response_mask[going, t] = token, token_logp, True
            finished[going] = ended = torch.isin(token, ends)
            keep = (~ended).nonzero().squeeze(-1)
            if len(keep) == 0:
                break
            if len(keep) < len(going):
                going, token, mask, positions = going[keep], token[keep], mask[keep], positions[keep]
                cache.reorder_cache(keep)  # selects rows, here fewer than there were
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    finally:
        model.train(was_training)
    return Rollout(prompts, tokens[:, : t + 1], response_mask[:, : t + 1], logp[:, : t + 1], finished)
