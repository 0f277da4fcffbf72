"""Rollouts: the student samples its own responses token by token, with a KV cache.

Shapes: B rows, b of them unfinished, P longest prompt, R longest response, H horizon, V vocabulary; M rows of
a micro-batch, L longest input of a micro-batch, D hidden size.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache


@dataclass
class Rollout:
    """B sampled responses. The mask cannot be computed from the tokens: the padding 0 is also a valid id."""

    prompts: list[list[int]]
    tokens: Tensor  # (B, R) int64, 0 after the end
    response_mask: Tensor  # (B, R) bool, True on sampled tokens, the eos token included
    logp: Tensor | None  # (B, R) fp32, of each token when it was sampled; None if another model wrote it
    finished: Tensor  # (B,) bool, True if the row ended with an eos token, False if the horizon cut it


def sampling_noise(keys: Iterable[object], horizon: int) -> Tensor:
    """One uniform number in [0, 1) per row and token, (B, H). Each row has a generator seeded by its own key.

    Training uses the key (seed, step, row): a row's noise depends neither on the other rows of the batch nor
    on the horizon, and no generator state has to be saved. The row's tokens depend on the batch through
    rounding alone: the last digits of the logits differ with the number of rows.
    """
    rows = []
    for key in keys:
        seed = random.Random(repr(key)).getrandbits(32)  # not `hash`, which differs between processes
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(horizon, generator=generator))
    return torch.stack(rows)


def sampling_logp(logits: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """The distribution that `sample` draws from, as fp32 log-probabilities: (b, V) -> (b, V).

    A top_p below 1 keeps the fewest tokens that together reach it, renormalised; the others get -inf.
    Temperature 0, greedy sampling, has the log-probabilities of temperature 1, and does not use top_p.
    """
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    logp = torch.log_softmax(logits, dim=-1, dtype=torch.float)
    if temperature == 0 or top_p >= 1:
        return logp
    ordered, ids = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # the probability of all more likely tokens
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return logp.scatter(-1, ids, ordered).log_softmax(-1)


def sample(logits: Tensor, temperature: float, uniform: Tensor, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row from `sampling_logp`, the argmax at temperature 0.

    (b, V) logits, (b,) uniform numbers -> tokens (b,), logp (b,). The token is the first whose cumulative
    probability exceeds the uniform number (inverse transform sampling), so one of probability 0 is never
    drawn. NaN logits give a NaN logp.
    """
    logp = sampling_logp(logits, temperature, top_p)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:
        cumulative = logp.exp().cumsum_(-1)
        threshold = uniform[:, None] * cumulative[:, -1:]  # scaled by the last sum, which is not exactly 1
        token = torch.searchsorted(cumulative, threshold, right=True)
        token = token.clamp_max(logp.shape[-1] - 1)  # with NaN logits, searchsorted returns V
    return token.squeeze(-1), logp.gather(-1, token).squeeze(-1)


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, P) int64 each. Left padding puts the last token of every prompt last."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


@torch.no_grad()
def rollout(
    model,  # a Hugging Face causal LM in evaluation mode
    prompts: list[list[int]],
    horizon: int,
    eos_ids: set[int],
    noise: Tensor,  # (B, H) uniform numbers from `sampling_noise`
    temperature: float = 1.0,
    vocab_size: int | None = None,
    top_p: float = 1.0,  # for evaluation only: the loss in training is that of the whole distribution
) -> Rollout:
    """Sample at most `horizon` tokens after each prompt; every id of `eos_ids` ends a row.

    The distribution is softmax(logits[:, :vocab_size] / temperature); the checkpoint's generation config is
    not used. Finished rows are dropped from the batch and from the cache, so they cost no compute. Raises
    ValueError if the model is in training mode or does not use the cache.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
    device = model.device
    ids, mask = pad_left(prompts, device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # each row counts from its own first token
    noise = noise.to(device)
    tokens = ids.new_zeros(len(prompts), horizon)
    response_mask = torch.zeros_like(tokens, dtype=torch.bool)
    logp = torch.zeros_like(tokens, dtype=torch.float)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    active = torch.arange(len(prompts), device=device)  # (b,) the rows without an eos token so far
    eos = torch.tensor(sorted(eos_ids), device=device)
    cache = DynamicCache(config=model.config)
    for t in range(horizon):  # ids: whole prompts (B, P) at t = 0, then the newest token of each row (b, 1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        # The argument `cache` was called `past_key_values` before transformers 5.24.
        output = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
        if cache.get_seq_length() != mask.shape[1]:  # P + t, all tokens so far
            raise ValueError(f"{type(model).__name__} does not keep a KV cache: use another model")
        logits = output.logits[:, -1, :vocab_size]  # (b, V)
        token, token_logp = sample(logits, temperature, noise[active, t], top_p)  # (b,) each
        tokens[active, t] = token
        logp[active, t] = token_logp
        response_mask[active, t] = True
        ended = torch.isin(token, eos)
        finished[active] = ended
        keep = (~ended).nonzero().squeeze(-1)
        if len(keep) == 0:
            break
        if len(keep) < len(active):
            active = active[keep]
            token = token[keep]
            mask = mask[keep]
            cache.reorder_cache(keep)  # made for beam search: it selects any rows
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
    length = int(response_mask.any(0).sum())  # R
    return Rollout(prompts, tokens[:, :length], response_mask[:, :length], logp[:, :length], finished)


def micro_batches(rollouts: Rollout, max_tokens: int) -> list[list[int]]:
    """Row numbers in groups of at most `max_tokens` tokens, padding included; a longer row is a group alone.

    Longest first, so that if a micro-batch does not fit into memory, the first one fails. Rows of similar
    length share a group, so there is little padding.
    """
    response_lengths = rollouts.response_mask.sum(1).tolist()
    lengths = [len(prompt) + n for prompt, n in zip(rollouts.prompts, response_lengths)]
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups = []
    while rows:
        size = max(1, max_tokens // lengths[rows[0]])  # all rows of the group are padded to its first one
        groups.append(rows[:size])
        rows = rows[size:]
    return groups


def model_inputs(rollouts: Rollout, rows: list[int], loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Input ids (M, L) of `rows`, and predicts (M, L) bool: which hidden states predict a token with a loss.

    `loss_mask` is (B, R) bool, True on response tokens only. The hidden state at place i predicts the token
    at place i + 1: the state of the last prompt token predicts the first response token. `hidden[predicts]`
    has the order of `rollouts.tokens[rows][loss_mask[rows]]`. Padding is on the right, where causal attention
    never looks, so no attention mask is needed. An example, the prompt 1 2 with the response 7 8 9:

        ids        1  2  7  8    without 9, which predicts nothing
        predicts   .  x  x  x
        predicted     7  8  9
    """
    ids = []
    predicts = []
    for row in rows:
        prompt = rollouts.tokens.new_tensor(rollouts.prompts[row])
        is_response = rollouts.response_mask[row]
        sequence = torch.cat([prompt, rollouts.tokens[row][is_response]])
        ids.append(sequence[:-1])
        no_loss = loss_mask.new_zeros(len(prompt) - 1)  # all prompt tokens but the last predict prompt tokens
        predicts.append(torch.cat([no_loss, loss_mask[row][is_response]]))
    return pad_sequence(ids, batch_first=True), pad_sequence(predicts, batch_first=True)


def hidden_states(model, ids: Tensor) -> Tensor:
    """The final hidden states, (M, L) -> (M, L, D), on the device of `ids`."""
    hidden = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return hidden.to(ids.device)
