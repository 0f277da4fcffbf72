"""Transformers' engine against `generate`, against passes over the whole text, and its side effects."""

import logging
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import END, SIZES, pair_of, tiny
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig

import train
from extras import continuous
from extras.continuous import continuous_rollout
from rollout import sampling_noise
from support import run_folder
from support.cli import BadInput
from support.run import Run

FAMILIES = {
    "Qwen2": {},
    "Llama": {},
    "Gemma2": {
        "head_dim": 4,
        "sliding_window": 5,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": None,  # with one it is refused, see below
    },
    "SmolLM3": {"no_rope_layers": [1, 0]},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [8, 4], [9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11], [0]]
NOISE = sampling_noise(range(len(PROMPTS)), 12)
KNOBS = train.Knobs(steps=1, batch_size=4, show_every=0, eval_limit=0, sampler="continuous")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert [thread for thread in set(threading.enumerate()) - before if not thread.daemon] == []


def build(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def written(ro):
    return [tokens[mask].tolist() for tokens, mask in zip(ro.tokens, ro.response_mask)]


@torch.no_grad()
def largest_gap(model, ro, temperature=1.0, vocab_size=None):
    """Between the log-probabilities recorded while sampling and those of one pass over each text."""
    gaps = []
    for row, prompt in enumerate(ro.prompts):
        tokens = ro.tokens[row][ro.response_mask[row]]
        logits = model(input_ids=torch.cat([torch.tensor(prompt), tokens])[None]).logits
        logp = (logits[0, len(prompt) - 1 : -1, :vocab_size] / temperature).log_softmax(-1)
        gaps.append((logp.gather(1, tokens[:, None])[:, 0] - ro.logp[row][ro.response_mask[row]]).abs().max())
    return max(gaps)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generates_greedy(family):
    model = build(family)
    ends = {END, *range(20, 26)}
    ro = continuous_rollout(model, PROMPTS, 12, ends, NOISE, temperature=0)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": sorted(ends)}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert written(ro)[row] == out[0, len(prompt) :].tolist()
    assert largest_gap(model, ro) < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logp_is_that_of_a_pass_over_the_text(family, temperature):
    model = build(family)
    ro = continuous_rollout(model, PROMPTS, 12, {END}, NOISE, temperature=temperature)
    assert largest_gap(model, ro, temperature) < 1e-4
    assert ro.response_mask.shape == ro.tokens.shape == ro.logp.shape and ro.logp.dtype == torch.float32
    assert (ro.tokens[~ro.response_mask] == 0).all() and (ro.logp[~ro.response_mask] == 0).all()


def test_tokens_have_the_models_frequencies(monkeypatch):
    """At another temperature and with fewer ids too."""
    monkeypatch.setattr(continuous, "PAGE", 4)
    model = tiny()
    rows = 1000
    options = {"temperature": 1.5, "vocab_size": 20}
    ro = continuous_rollout(model, [[5, 6]] * rows, 1, {END}, sampling_noise([0], 1), **options)
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[5, 6]])).logits[0, -1, :20] / 1.5).softmax(-1)
    found = torch.bincount(ro.tokens[:, 0], minlength=20) / rows
    assert len(found) == 20
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / rows).sqrt() + 1e-4).all()


def test_ids_beyond_the_shared_vocabulary():
    model = tiny()
    ro = continuous_rollout(model, PROMPTS, 12, set(), NOISE, vocab_size=10)
    assert ro.tokens.max() < 10 and ro.response_mask.all() and not ro.finished.any()
    assert largest_gap(model, ro, vocab_size=10) < 1e-4


def test_every_eos_id_ends_a_row_and_belongs_to_it():
    ends = {END, *range(20, 40)}
    ro = continuous_rollout(tiny(), PROMPTS * 4, 12, ends, NOISE)
    used = set()
    for tokens, finished in zip(written(ro), ro.finished.tolist()):
        assert not ends & set(tokens[:-1]) and finished == (tokens[-1] in ends)
        assert finished or len(tokens) == 12
        used |= ends & set(tokens)
    assert len(used) > 3 and 0 < ro.finished.sum() <= len(ro.finished)


def test_the_noise_decides_and_the_global_generator_is_left_alone():
    model = tiny()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = continuous_rollout(model, PROMPTS, 12, {END}, NOISE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = continuous_rollout(model, PROMPTS, 12, {END}, NOISE)
    other = continuous_rollout(model, PROMPTS, 12, {END}, NOISE.flip(0))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logp, again.logp)
    assert written(first) != written(other)


def test_the_checkpoints_generation_config_is_ignored():
    model = tiny()
    expected = written(continuous_rollout(model, PROMPTS, 12, {END}, NOISE))
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[5, 6], **settings)
    before = model.generation_config.to_dict()
    assert written(continuous_rollout(model, PROMPTS, 12, {END}, NOISE)) == expected
    assert model.generation_config.to_dict() == before


@torch.no_grad()
def test_weights_changed_in_place_are_seen(monkeypatch):
    """A kept engine would reuse its prefixes; pages are short enough here for a prompt to fill some."""
    monkeypatch.setattr(continuous, "PAGE", 4)
    model = tiny()
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10, 11, 12, 13, 15]]
    greedy = GenerationConfig(do_sample=False, max_new_tokens=2, eos_token_id=-1)
    engine = ContinuousBatchingConfig(page_size=4, num_blocks=20, max_batch_tokens=40, return_logprobs=True)
    model.generate_batch(prompts, greedy, engine, persistent_manager=True)
    for _ in range(2):
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        ro = continuous_rollout(model, prompts, 8, {END}, NOISE)
        assert largest_gap(model, ro) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_mode_and_attention_are_left_as_they_were(family):
    model = build(family)
    attention = model.config._attn_implementation
    continuous_rollout(model, PROMPTS, 2, {END}, NOISE)
    assert not model.training and model.config._attn_implementation == attention
    model.train()
    with pytest.raises(ValueError, match="call model.eval"):
        continuous_rollout(model, PROMPTS, 2, {END}, NOISE)
    assert all(module.training for module in model.modules())


def test_ctrl_c_leaves_no_thread(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinuousBatchingManager, "get_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        continuous_rollout(tiny(), PROMPTS, 50, set(), NOISE)


def failing(error):
    model = tiny()

    def forward(*args, **options):
        raise error

    model.forward = forward
    return model


def of_class(name, **settings):
    model = getattr(transformers, name)
    return model(model.config_class(**(SIZES | settings))).eval()


def without_flash():
    """An installed flash attention whose library does not load, as it was built for another torch."""
    model = tiny()

    def init(*args):
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10")

    model.init_continuous_batching = init
    return model


REFUSED = {  # some at once, the others when they run
    "Gemma2ForCausalLM": lambda: of_class("Gemma2ForCausalLM", head_dim=4),  # log-probabilities would be off
    "MambaForCausalLM": lambda: of_class("MambaForCausalLM"),
    "GPT2LMHeadModel": lambda: of_class("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=4),
    "OPTForCausalLM": lambda: of_class("OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16),
    "Qwen2ForCausalLM": lambda: failing(RuntimeError("a reason\nof two lines")),
}


@pytest.mark.parametrize("name, model", [*REFUSED.items(), ("Qwen2ForCausalLM", without_flash)])
def test_models_that_the_engine_cannot_run(name, model, caplog, monkeypatch):
    """In one line: the engine itself would log a traceback."""
    monkeypatch.setattr(logging.getLogger("ContinuousBatchingLogger"), "handlers", [caplog.handler])
    model = model()
    match = rf"\A{name} does not run in transformers' continuous batching \(.+\): drop --sampler continuous\Z"
    with pytest.raises(BadInput, match=match):
        continuous_rollout(model, PROMPTS, 3, {END}, NOISE)
    assert caplog.records == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")])
def test_out_of_memory_is_not_the_familys_fault(error):
    with pytest.raises(type(error), match="full"):
        continuous_rollout(failing(error), PROMPTS, 3, {END}, NOISE)


def test_the_cache_is_as_large_as_the_rows_need():
    config = continuous.engine_config(tiny(), [[5] * 300, [5]], 100, seed=0)
    assert config.num_blocks == (2 + 1) + (1 + 1)
    assert config.max_batch_tokens == 301


def test_flash_attention_is_for_16_bits_and_gpus_and_graphs_are_for_gpus():
    """With a GPU beside it, the engine would switch a model on the CPU to flash attention."""
    for dtype, device, switch in (
        (torch.bfloat16, "cuda", True),
        (torch.float32, "cuda", False),
        (torch.bfloat16, "cpu", False),
    ):
        stand_in = SimpleNamespace(dtype=dtype, device=torch.device(device))
        config = continuous.engine_config(stand_in, [[5]], 8, seed=0)
        assert config.auto_switch_to_flash == switch
        assert config.use_cuda_graph == (device == "cuda")


def test_a_run(world, tmp_path, monkeypatch, capsys):
    continuous.say_slow.cache_clear()
    flags = f"--preset toy --steps 3 --eval-limit 0 --sampler continuous --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    rows = run_folder.read_csv(tmp_path / "run" / "metrics.csv")
    assert len(rows) == 3 and all(0 < float(row["reverse_kl"]) < 20 for row in rows)
    assert capsys.readouterr().out.count("on a CPU it is slower") == 1


@pytest.mark.parametrize("dtype, wrong", [(torch.float32, 1.05), (torch.bfloat16, 2.0)])
def test_another_distribution_is_refused_before_the_first_update(dtype, wrong, monkeypatch):
    """The comparison of step 0 covers this sampler, and accepts it at the right temperature."""
    pair = pair_of(tiny(), tiny(seed=1), dtype)
    right = continuous.sampling_config
    before = {name: p.detach().clone() for name, p in pair.masters.items()}

    def step():
        run = Run(pair.student.device)
        knobs = replace(KNOBS, lr=0.0)
        sampler = continuous.continuous_rollout
        train.train(pair, train.adamw(pair, knobs), PROMPTS, lambda step: 9, knobs, run, sampler=sampler)

    step()

    def changed(model, horizon, ends, temperature, size):
        return right(model, horizon, ends, wrong, size)

    monkeypatch.setattr(continuous, "sampling_config", changed)
    match = "samples from another distribution .*: drop --sampler continuous$"
    with pytest.raises(BadInput, match=match):
        step()
    assert all(torch.equal(p, before[name]) for name, p in pair.masters.items())
