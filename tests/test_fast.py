"""The fast sampler against the plain one: the same tokens, the same log-probabilities, no row mixed up."""

import pytest
import torch
from conftest import END, V, pair_of, tiny
from test_rollout import PROMPTS, uncached_greedy, written

import fast
import train
from cli import BadInput
from rollout import rollout

MANY = (END, *range(20, 30))  # rows leave at many different steps


def both(model, sampler, prompts, horizon, ends, temperature):
    how = {"temperature": temperature, "vocab_size": V - 1}
    seeds = [torch.Generator().manual_seed(7) for _ in "ab"]
    plain = rollout(model, prompts, horizon, set(ends), generator=seeds[0], **how)
    return plain, sampler(model, prompts, horizon, set(ends), generator=seeds[1], **how)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ends", [MANY, (V + 1,), range(V)])
def test_fast_is_plain_on_a_cpu(temperature, ends):
    """Also when it samples: both ask for the same random numbers for the same rows."""
    plain, ours = both(tiny(), fast.Sampler(), PROMPTS * 3, 14, ends, temperature)
    assert torch.equal(plain.tokens, ours.tokens) and torch.equal(plain.response_mask, ours.response_mask)
    assert torch.equal(plain.finished, ours.finished)
    assert torch.allclose(plain.logp, ours.logp, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("check, span", [(4, 8), (3, 1), (16, 16), (2, 5)])
def test_the_steps_of_a_gpu_never_mix_rows(check, span, rows):
    """On a GPU ended rows stay for some steps, and attention sees masked columns: greedy, row by row."""
    model = tiny()
    prompts = [[i, *p] for i, p in enumerate(PROMPTS * 3)][:rows]
    plain, ours = both(model, fast.Sampler(check, span), prompts, 14, MANY, 0.0)
    assert rows < 12 or len(set(plain.response_mask.sum(1).tolist())) > 3
    for row, prompt in enumerate(prompts):
        assert written(ours, row) == written(plain, row)
        if V - 1 not in (text := uncached_greedy(model, prompt, 14, set(MANY))):
            assert written(ours, row) == text
    assert torch.equal(plain.response_mask, ours.response_mask) and torch.equal(plain.finished, ours.finished)
    assert torch.equal(plain.tokens, ours.tokens) and torch.allclose(plain.logp, ours.logp, atol=1e-5)


def test_buffers_that_are_used_again_hold_nothing_of_the_call_before(monkeypatch):
    """As on a GPU: fewer rows, other prompts, another horizon; room is made anew only if it must be."""
    monkeypatch.setattr(fast, "ROUND", 16)
    model, sampler, made = tiny(), fast.Sampler(check=3, span=8, reuse=True), []
    for prompts, horizon in ((PROMPTS * 3, 8), (PROMPTS[:2], 10), (PROMPTS[2:], 6), (PROMPTS * 4, 14)):
        plain, ours = both(model, sampler, prompts, horizon, MANY, 0.0)
        assert torch.equal(plain.tokens, ours.tokens) and torch.allclose(plain.logp, ours.logp, atol=1e-5)
        made.append(sampler.buffers)
    assert made[0] is made[1] is made[2] is not made[3]
    assert made[3].rows == 16 and made[3].columns == 32


def test_few_sizes_are_stepped_in(monkeypatch):
    """What a GPU would capture: the rows are halved, not taken out one by one, and columns come in spans."""
    seen, step = set(), fast.Buffers.step

    def watched(self, b, column, columns):
        seen.add((b, columns))
        return step(self, b, column, columns)

    monkeypatch.setattr(fast.Buffers, "step", watched)
    plain, _ = both(tiny(), fast.Sampler(2, 16), PROMPTS * 4, 20, MANY, 0.0)
    assert len(set(plain.response_mask.sum(1).tolist())) > 3
    assert {b for b, _ in seen} <= {16, 8, 4, 2, 1} and len({b for b, _ in seen}) > 1
    assert {columns for _, columns in seen} <= {16, 32}


def test_staying():
    alive = torch.tensor([False, True, False, False, True, False, False, False])
    assert fast.staying(alive, exact=True).tolist() == [1, 4]
    assert fast.staying(alive, exact=False).tolist() == [1, 4]
    alive[7] = True
    assert fast.staying(alive, exact=True).tolist() == [1, 4, 7]
    assert fast.staying(alive, exact=False).tolist() == [0, 1, 4, 7]  # a half of 8 holds the three
    assert fast.staying(torch.zeros(3, dtype=torch.bool), exact=False).tolist() == []
    assert fast.staying(torch.tensor([False, False, True]), exact=False).tolist() == [
        2
    ]  # it once went on for ever
    assert fast.staying(torch.tensor([True]), exact=False).tolist() == [0]


def test_packed_bf16_gives_the_same_law_and_leaves_the_model_as_it_was():
    model = tiny(initializer_range=0.1).bfloat16().train()
    forwards = [m.forward for m in model.modules()]
    plain, ours = both(model, fast.Sampler(), PROMPTS, 10, MANY, 1.0)
    assert [m.forward for m in model.modules()] == forwards and model.training
    same = plain.tokens[:, 0] == ours.tokens[:, 0]
    assert same.any() and torch.allclose(plain.logp[same, 0], ours.logp[same, 0], atol=0.02)


def test_packing_follows_the_weights_of_each_step():
    """A copy that outlived an update would sample from an old student."""
    pair = pair_of(tiny(), tiny(seed=1), dtype=torch.bfloat16)
    sampler = fast.Sampler()
    sampler(pair.student, PROMPTS, 4, {V + 1}, 0.0)
    for master in pair.masters.values():
        master.data.neg_()
    pair.publish()
    assert torch.equal(
        sampler(pair.student, PROMPTS, 6, {V + 1}, 0.0).tokens,
        rollout(pair.student, PROMPTS, 6, {V + 1}, 0.0).tokens,
    )


def test_fast_sampler_and_trainer_agree():
    pair = pair_of(tiny(initializer_range=0.1), tiny(seed=1), dtype=torch.bfloat16)
    ro = fast.Sampler()(pair.student, PROMPTS, 9, pair.ends, generator=torch.Generator().manual_seed(0))
    _, stats, _ = train.score(pair, ro, train.Knobs())
    gap = stats["student_logp"] - ro.logp[stats["row"], stats["position"]]
    assert gap.abs().mean() < 0.05


def test_which_sampler():
    window = tiny(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert isinstance(fast.sampler("", tiny()), fast.Sampler) and fast.sampler("plain", tiny()) is rollout
    eager = tiny()
    eager.set_attn_implementation("eager")  # adds its mask: ours, of true and false, would be wrong there
    alibi = tiny()
    alibi.config.alibi = True
    reasons = {"layers of a sliding window": window, "attention by eager": eager, "alibi": alibi}
    for reason, model in reasons.items():
        assert fast.sampler("", model) is rollout
        with pytest.raises(BadInput, match=f"{reason}.*: use --sampler plain"):
            fast.sampler("fast", model)
