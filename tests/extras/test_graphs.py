"""The sampler with a CUDA graph against the plain one; with --device cuda it records and replays one."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import DEVICE, END, SIZES, pair_of, tiny
from transformers import GenerationConfig

import train
from extras import graphs, lora
from extras.graphs import graph_rollout
from rollout import rollout, sampling_noise
from support import run_folder
from support.cli import BadInput
from support.run import Run

FAMILIES = {
    "Qwen2": {},
    "Llama": {},
    "Gemma2": {"head_dim": 4, "sliding_window": 5, "final_logit_softcapping": 2.0},
    "Mistral": {"sliding_window": 4},  # shorter than the answers
    "SmolLM3": {"no_rope_layers": [1, 0]},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [8, 4], [9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11], [0]]
HORIZON = 40  # beyond graphs.LOOK
NOISE = sampling_noise(range(len(PROMPTS)), HORIZON)
ENDS = {END, 20, 21}


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().to(DEVICE)


def assert_same(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.response_mask, expected.response_mask)
    assert torch.equal(found.finished, expected.finished)
    assert torch.allclose(found.logp, expected.logp, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sample_is_that_of_the_plain_sampler(family, temperature):
    model = build(family)
    expected = rollout(model, PROMPTS, HORIZON, ENDS, NOISE, temperature)
    assert_same(graph_rollout(model, PROMPTS, HORIZON, ENDS, NOISE, temperature), expected)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_short_horizons(horizon):
    """Without a token after the first, without a recorded one, and with one."""
    model = tiny()
    expected = rollout(model, PROMPTS, horizon, ENDS, NOISE)
    assert_same(graph_rollout(model, PROMPTS, horizon, ENDS, NOISE), expected)


def test_it_stops_soon_after_all_rows_have_ended(monkeypatch):
    calls = []
    original = graphs.sample
    monkeypatch.setattr(graphs, "sample", lambda *given: calls.append(0) or original(*given))
    monkeypatch.setattr(graphs, "LOOK", 4)
    assert graph_rollout(tiny(), PROMPTS, HORIZON, set(range(50)), NOISE).finished.all()
    assert len(calls) <= 4


def test_a_finished_row_does_not_change_the_others():
    """Some rotary embeddings depend on the largest position in the batch."""
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 24, "rope_theta": 1e4}
    scaling |= {"short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0]}
    model = tiny(rope_parameters=scaling)
    prompts = [list(range(5, 25)), [8, 4], [0]]  # after three tokens the first row is at position 23
    ends = {int(rollout(model, prompts, 3, set(), NOISE[:3]).tokens[0, 2])}
    expected = rollout(model, prompts, 20, ends, NOISE[:3])
    assert expected.response_mask.sum(1).tolist()[0] == 3 < len(expected.tokens[0])
    assert_same(graph_rollout(model, prompts, 20, ends, NOISE[:3]), expected)


def test_it_decides_alone():
    """Neither the global generator nor the checkpoint's generation config is used."""
    model = tiny()
    expected = rollout(model, PROMPTS, HORIZON, ENDS, NOISE)
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[5, 6], **settings)
    state = torch.get_rng_state()
    assert_same(graph_rollout(model, PROMPTS, HORIZON, ENDS, NOISE), expected)
    assert torch.equal(torch.get_rng_state(), state) and not model.training


def test_adapters():
    pytest.importorskip("peft")
    model = tiny()
    lora.add_adapters(model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.3)
    expected = rollout(model, PROMPTS, HORIZON, ENDS, NOISE)
    assert_same(graph_rollout(model, PROMPTS, HORIZON, ENDS, NOISE), expected)


def test_ids_beyond_the_shared_vocabulary():
    model = tiny()
    expected = rollout(model, PROMPTS, HORIZON, {9}, NOISE, vocab_size=10)
    assert_same(graph_rollout(model, PROMPTS, HORIZON, {9}, NOISE, vocab_size=10), expected)


@torch.no_grad()
def test_weights_changed_in_place_are_seen():
    model = tiny()
    for _ in range(2):
        expected = rollout(model, PROMPTS, HORIZON, ENDS, NOISE)
        assert_same(graph_rollout(model, PROMPTS, HORIZON, ENDS, NOISE), expected)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_state_of_the_cache_is_pythons(family, monkeypatch):
    """A graph replays kernels alone: a count that Python keeps would stay what it was at the recording."""
    counts = []
    caches = []
    original = graphs.fixed_cache
    monkeypatch.setattr(graphs, "fixed_cache", lambda *given: caches.append(original(*given)) or caches[-1])
    for horizon in (3, 12):
        graph_rollout(build(family), PROMPTS, horizon, {END}, NOISE)
        layers = [vars(layer).items() for layer in caches[-1].layers]
        counts.append([{k: v for k, v in layer if isinstance(v, int) and "max" not in k} for layer in layers])
    assert counts[0] == counts[1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="on a CPU nothing is recorded")
def test_an_empty_recording_is_refused(monkeypatch):
    """As that of a stream on another device would be."""
    monkeypatch.setattr(graphs, "recorded", lambda model, function, device: lambda: None)
    with pytest.raises(BadInput, match="its recording is empty"):
        graph_rollout(tiny(), PROMPTS, HORIZON, {END}, NOISE)


def test_a_recording_that_fails_names_the_first_error(monkeypatch):
    class Recording:
        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("the end of the recording")

    def fails(error):
        raise error

    for name in ("CUDAGraph", "device", "graph"):
        monkeypatch.setattr(
            torch.cuda, name, lambda *given: Recording() if given != (DEVICE,) else nullcontext()
        )
    with pytest.raises(BadInput, match=r"does not run in a CUDA graph \(a read on the host\)"):
        graphs.recorded(tiny(), lambda: fails(RuntimeError("a read on the host")), DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.recorded(tiny(), lambda: fails(torch.OutOfMemoryError("full")), DEVICE)


def test_models_that_it_cannot_run():
    settings = SIZES | {"full_attn_idxs": [1], "conv_L_cache": 3}
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**settings)).eval().to(DEVICE)
    match = r"\ALfm2ForCausalLM does not run in a CUDA graph \(.+\): drop --sampler graphs\Z"
    with pytest.raises(BadInput, match=match):
        graph_rollout(model, PROMPTS, 3, {END}, NOISE)
    with pytest.raises(ValueError, match="call model.eval"):
        graph_rollout(tiny().train(), PROMPTS, 3, {END}, NOISE)


def test_a_run_has_the_plain_samplers_numbers(world, tmp_path, monkeypatch):
    found = []
    calls = []
    original = graphs.graph_rollout
    monkeypatch.setattr(graphs, "graph_rollout", lambda *a, **k: calls.append(0) or original(*a, **k))
    for sampler in ("plain", "graphs"):
        folder = tmp_path / sampler
        flags = f"--preset toy --steps 3 --eval-limit 0 --dtype float32 --sampler {sampler} --out {folder}"
        monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), "--device", str(DEVICE)])
        train.main()
        assert bool(calls) == (sampler == "graphs")
        rows = run_folder.read_csv(folder / "metrics.csv")
        found.append([[float(row[name]) for name in ("reverse_kl", "response_tokens")] for row in rows])
    assert len(found[0]) == 3 and torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3)


def test_another_distribution_is_refused_before_the_first_update(monkeypatch):
    """The comparison of sampled and scored log-probabilities covers this sampler."""
    pair = pair_of(tiny(), tiny(seed=1))
    knobs = replace(train.Knobs(), steps=1, batch_size=4, show_every=0, eval_limit=0, sampler="graphs")
    original = graphs.sample
    monkeypatch.setattr(graphs, "sample", lambda logits, temperature, *given: original(logits, 1.05, *given))
    with pytest.raises(BadInput, match="samples from another distribution .*: drop --sampler graphs"):
        optimizer = train.adamw(pair, knobs)
        run = Run(pair.student.device)
        train.train(pair, optimizer, PROMPTS, lambda step: 9, knobs, run, sampler=graph_rollout)
