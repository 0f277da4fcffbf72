"""Sampling against uncached forward passes and against Hugging Face's own `generate`."""

import pytest
import torch
from helpers import DEVICE, END, V, tiny
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rollout import micro_batches, model_inputs, rollout, sample, sampling_noise
from support.models import enable_checkpointing

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]]  # unequal lengths, and ids equal to padding


def uncached_greedy(model, prompt, steps, ends):
    text = list(prompt)
    for _ in range(steps):
        text.append(
            model(input_ids=torch.tensor([text], device=DEVICE), use_cache=False)
            .logits[0, -1]
            .argmax()
            .item()
        )
        if text[-1] in ends:
            break
    return text[len(prompt) :]


def noise_of(rows, horizon, seed=0):
    return sampling_noise([(seed, row) for row in range(rows)], horizon)


def written(ro, row):
    return ro.tokens[row][ro.response_mask[row]].tolist()


@pytest.mark.parametrize(
    "changes", [{}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}]
)
def test_cached_greedy_is_uncached_greedy(changes):
    """Cache bugs gave every row the same token, or lost a row's cache when others left the batch."""
    model = tiny(**changes)
    first = [uncached_greedy(model, p, 12, set()) for p in PROMPTS]
    ends = {first[0][3], first[2][7]}  # rows leave the batch at different steps
    ro = rollout(model, PROMPTS, 12, ends, noise_of(4, 12), temperature=0)
    assert [written(ro, i) for i in range(4)] == [uncached_greedy(model, p, 12, ends) for p in PROMPTS]
    assert len({len(written(ro, i)) for i in range(4)}) > 1


def test_greedy_is_generates_greedy_on_another_architecture():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.5, eos_token_id=END)
    )
    model = model.eval().to(DEVICE)
    ro = rollout(model, PROMPTS, 10, {END}, noise_of(4, 10), temperature=0)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt], device=DEVICE)
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0)
        assert written(ro, row) == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_the_trainers_logp(temperature):
    """The distribution sampled must be the one in the loss, whatever the checkpoint's generation config."""
    model = tiny()
    model.generation_config.update(temperature=0.1, top_k=2, top_p=0.5, repetition_penalty=2.0)
    ro = rollout(model, PROMPTS, 10, {END}, noise_of(4, 10), temperature, V - 5)
    assert ro.tokens.max() < V - 5
    for row, prompt in enumerate(PROMPTS):
        text = prompt + written(ro, row)
        ids = torch.tensor([text], device=DEVICE)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1, : V - 5]
        logp = (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        assert torch.allclose(ro.logp[row][ro.response_mask[row]], logp, atol=1e-5)


def test_sample_draws_from_the_distribution():
    """200,000 draws from a known distribution, within 5 standard errors; probability 0 is never drawn."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 200_000
    token, logp = sample(p.log().expand(n, 6), 1.0, sampling_noise(["draws"], n)[0])
    share = torch.bincount(token, minlength=6) / n
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert torch.allclose(logp, p.log()[token])


def test_sample_at_the_ends_of_the_noise():
    p = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.2501, 2), (1 - 2**-24, 2)):
        assert sample(p.log(), 1.0, torch.tensor([uniform]))[0].item() == token


def test_top_p_keeps_the_most_likely_tokens_and_their_ratios():
    p = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    uniform = sampling_noise(["top p"], 50_000)[0]
    token, logp = sample(p.log().expand(50_000, 5), 1.0, uniform, top_p=0.7)
    share = torch.bincount(token, minlength=5) / 50_000
    assert share[[0, 2, 4]].sum() == 0 and abs(share[1] - 0.625) < 0.015
    assert torch.allclose(logp.exp(), torch.tensor([0.0, 0.625, 0.0, 0.375, 0.0])[token])
    only = sample(p.log().expand(99, 5), 1.0, uniform[:99], top_p=0.01)[0]
    assert set(only.tolist()) == {1}


def test_rows_of_one_prompt_differ_and_a_seed_repeats():
    one, two = (rollout(tiny(), [[5, 6]] * 8, 10, {END}, noise_of(8, 10, seed=1)) for _ in range(2))
    assert len({tuple(written(one, i)) for i in range(8)}) > 1
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.logp, two.logp)


def test_a_row_depends_neither_on_the_other_rows_nor_on_the_horizon():
    """A step can be split over processes, and a truncated rollout is the start of the full one."""
    noise = sampling_noise([(0, 7, row) for row in range(4)], 12)
    assert torch.equal(noise[2:, :5], sampling_noise([(0, 7, 2), (0, 7, 3)], 5))
    whole = rollout(tiny(), PROMPTS, 12, {END}, noise)
    for rows in ([0], [2, 1]):
        part = rollout(tiny(), [PROMPTS[row] for row in rows], 12, {END}, noise[rows])
        assert [written(part, i) for i in range(len(rows))] == [written(whole, row) for row in rows]
    short = rollout(tiny(), PROMPTS, 5, {END}, noise)
    assert [written(short, i) for i in range(4)] == [written(whole, i)[:5] for i in range(4)]


def test_noise_is_uniform_and_keys_are_independent():
    noise = sampling_noise([(0, step, row) for step in range(10) for row in range(10)], 1000)
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 5 * (1 / 12 / noise.numel()) ** 0.5
    correlations = torch.corrcoef(noise) - torch.eye(100)
    assert correlations.abs().max() < 5.5 / 1000**0.5


def test_end_token_is_in_the_mask_and_padding_is_not():
    """[a, b, END, pad, pad] has 3 loss tokens. With pad == END, a mask made from ids would lose the END."""
    model = tiny()
    first = uncached_greedy(model, PROMPTS[0], 6, set())
    end = first[2]
    assert end not in first[:2]
    ro = rollout(model, [PROMPTS[0], PROMPTS[1]], 6, {end}, noise_of(2, 6), temperature=0)
    assert ro.response_mask[0].tolist() == [True] * 3 + [False] * (ro.tokens.shape[1] - 3)
    assert ro.tokens[0, 2] == end and ro.finished[0]


def test_every_end_id_stops_a_row():
    """Qwen has two end ids, and student and teacher may prefer different ones."""
    model = tiny()
    text = uncached_greedy(model, PROMPTS[0], 8, set())
    for end in set(text):
        ro = rollout(model, [PROMPTS[0]], 8, {end, V - 1}, noise_of(1, 8), temperature=0)
        assert written(ro, 0) == text[: text.index(end) + 1]


def test_all_rows_may_finish_at_once():
    ro = rollout(tiny(), PROMPTS, 10, set(range(V)), noise_of(4, 10))
    assert ro.tokens.shape == (4, 1) and ro.finished.all() and ro.response_mask.all()


def test_truncated_rows_have_no_end_and_nothing_appended():
    ro = rollout(tiny(), PROMPTS, 5, {V + 1}, noise_of(4, 5))
    assert ro.tokens.shape == (4, 5) and ro.response_mask.all() and not ro.finished.any()


def test_the_cache_is_used_also_with_checkpointing():
    """Gradient checkpointing turned the cache off, so sampling was quadratic: a step must feed one token."""
    model = tiny(attention_dropout=0.5)
    enable_checkpointing(model)
    widths = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    checkpointed = rollout(model, PROMPTS, 4, {V + 1}, noise_of(4, 4))
    hook.remove()
    assert widths == [5, 1, 1, 1]
    plain = rollout(tiny(), PROMPTS, 4, {V + 1}, noise_of(4, 4))  # and dropout is off
    assert torch.equal(checkpointed.tokens, plain.tokens) and torch.equal(checkpointed.logp, plain.logp)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="model.eval"):
        rollout(tiny(attention_dropout=0.5).train(), PROMPTS, 4, {END}, noise_of(4, 4))


def test_a_model_that_ignores_the_cache_is_refused():
    """A renamed argument is swallowed by **kwargs: every token after the first lost its prompt, silently."""
    model = tiny()
    forward = model.forward
    model.forward = lambda cache=None, **inputs: forward(**inputs)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM"):
        rollout(model, PROMPTS, 4, {V + 1}, noise_of(4, 4))


def test_finished_rows_cost_nothing():
    """Rows that ended leave the batch and its cache."""
    model = tiny()
    first = uncached_greedy(model, PROMPTS[0], 1, set())[0]
    batches = []
    hook = model.register_forward_pre_hook(
        lambda m, a, kw: batches.append((len(kw["input_ids"]), kw["cache"])), with_kwargs=True
    )
    rollout(model, [PROMPTS[0]] * 3 + [PROMPTS[2]], 4, {first}, noise_of(4, 4), temperature=0)
    hook.remove()
    assert [n for n, _ in batches] == [4, 1, 1, 1]
    cache = batches[-1][1]
    assert isinstance(cache, DynamicCache) and cache.layers[0].keys.shape[0] == 1


def test_model_inputs_select_the_states_that_predict_the_response():
    """Slicing by the longest prompt drops tokens of short prompts; shifts are off by one."""
    model = tiny()
    ro = rollout(model, PROMPTS, 6, {END}, noise_of(4, 6))
    rows = [2, 0, 3, 1]
    ids, predicts = model_inputs(ro, rows, ro.response_mask)
    logp = model(input_ids=ids).logits.log_softmax(-1)[predicts]
    tokens, mask = ro.tokens[rows], ro.response_mask[rows]
    assert torch.allclose(logp.gather(-1, tokens[mask][:, None])[:, 0], ro.logp[rows][mask], atol=1e-5)


def test_a_loss_mask_selects_tokens_in_their_order():
    ro = rollout(tiny(), PROMPTS, 6, {V + 1}, noise_of(4, 6))
    mask = torch.zeros_like(ro.response_mask)
    mask[0, 2] = mask[2, 0] = mask[2, 5] = True
    ids, predicts = model_inputs(ro, [2, 0], mask)
    following = torch.cat([ids[:, 1:], ids.new_full((2, 1), -1)], dim=1)  # the token that each state predicts
    following[0, len(PROMPTS[2]) + 4] = ro.tokens[2, 5]  # the last token of a row is not an input
    assert following[predicts].tolist() == ro.tokens[[2, 0]][mask[[2, 0]]].tolist()


def test_micro_batches_hold_every_row_once_within_their_budget():
    """Longest first, so that what does not fit fails at once; a row beyond the budget is alone."""
    ro = rollout(tiny(), PROMPTS * 3, 6, {END, *range(20, 30)}, noise_of(12, 6))
    lengths = [len(p) + int(n) for p, n in zip(ro.prompts, ro.response_mask.sum(1))]
    for budget in (1, 20, 40, 999):
        groups = micro_batches(ro, budget)
        assert sorted(sum(groups, [])) == list(range(12))
        assert all(len(g) * max(lengths[row] for row in g) <= budget or len(g) == 1 for g in groups)
        order = [lengths[row] for row in sum(groups, [])]
        assert order == sorted(order, reverse=True)
    assert len(micro_batches(ro, 999)) == 1 and len(micro_batches(ro, 1)) == 12
