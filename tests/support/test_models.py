"""Loading of models, and what has to be true of them before training starts."""

import json

import pytest
import torch
import transformers
from helpers import SIZES, V, load_pair, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from rollout import hidden_states
from support import models
from support.cli import BadInput

HEADS = [  # architecture, settings, scale and softcap of its logits
    ("Llama", {}, 1, None),
    ("Qwen2", {}, 1, None),
    ("Qwen3", {"head_dim": 4}, 1, None),
    ("Granite", {"logits_scaling": 8.0}, 1 / 8, None),
    ("Cohere", {"logit_scale": 0.25}, 0.25, None),
    ("Gemma2", {"head_dim": 4, "final_logit_softcapping": 2.0}, 1, 2.0),
    ("Phi", {}, 1, None),  # has a bias
]


def random_model(name, **changes):
    """A tiny model of another architecture."""
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    "dtype, tokens, gap, refused",
    [
        ("bfloat16", 64, 0.12, True),
        ("bfloat16", 3, 0.18, False),  # rounding alone, of a right model: SmolLM2-135M
        ("bfloat16", 3, 0.6, True),
        ("float32", 3, 0.002, True),
    ],
)
def test_a_mean_of_few_tokens_varies_in_bf16(dtype, tokens, gap, refused):
    scored = torch.full((tokens,), -1.0)
    if not refused:
        models.check_sampler(tiny(), scored - gap, scored, dtype)
        return
    with pytest.raises(BadInput, match="by .* nats on average.* --dtype float32"):
        models.check_sampler(tiny(), scored - gap, scored, dtype)


def test_the_limit_grows_as_the_temperature_falls():
    """Rounding of the logits is divided by the temperature; at 0 the log-probabilities are those of 1."""
    scored = torch.full((64,), -1.0)
    models.check_sampler(tiny(), scored - 0.3, scored, "bfloat16", temperature=0.3)
    for temperature in (0, 1, 2):
        with pytest.raises(BadInput, match="by 0.3 nats on average"):
            models.check_sampler(tiny(), scored - 0.3, scored, "bfloat16", temperature=temperature)


def test_tokens_that_one_pass_excludes_count_as_different():
    """They show that the pass has another nucleus (top_p); NaN is found by `check_finite`."""
    scored = torch.full((64,), -1.0)
    excluded = scored.clone()
    excluded[0] = -torch.inf
    excluded[1] = torch.nan
    models.check_sampler(tiny(), scored, excluded, "bfloat16")  # one of 64 may be rounding
    excluded[:32] = -torch.inf
    for temperature in (1, 0.02):
        with pytest.raises(BadInput, match="samples from another distribution"):
            models.check_sampler(tiny(), scored, excluded, "bfloat16", temperature)


@pytest.mark.parametrize("name, changes, scale, softcap", HEADS)
def test_heads_that_are_supported(name, changes, scale, softcap):
    model = random_model(name, **changes)
    if name == "Phi":
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    head = models.checked_head(model, hidden_states, V - 3)
    assert (head.scale, head.softcap) == (scale, softcap)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = head(hidden_states(model, ids)[0])
        assert torch.allclose(logits, model(input_ids=ids).logits[0, :, : V - 3], atol=1e-5)


@pytest.mark.parametrize(
    "change", [lambda logits: logits * 3, lambda logits: 2 * torch.tanh(logits / 2)], ids=["scaled", "capped"]
)
def test_a_head_that_does_more_is_refused_by_name(change):
    model = tiny()
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(BadInput, match="Qwen2ForCausalLM computes its logits in a way"):
        models.checked_head(model, hidden_states, V)


def counted(model):
    """A list that grows by one with every forward of the first layer's attention."""
    calls = []
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    return calls


def gradient(model):
    model.zero_grad()
    hidden = hidden_states(model, torch.arange(4, 20)[None])
    hidden.square().sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.get_decoder().parameters()])


def test_checkpointing_recomputes_in_backward_and_only_there():
    model = tiny()
    plain = gradient(model)
    models.enable_checkpointing(model)
    calls = counted(model)
    assert torch.equal(gradient(model), plain)
    assert len(calls) == 2
    with torch.no_grad():
        hidden_states(model, torch.tensor([[5, 6]]))
    assert len(calls) == 3


def test_checkpointing_leaves_dropout_off():
    """OPT's layers drop out by their own flag: with it set, sampling and training would be noisy."""
    config = OPTConfig(vocab_size=V, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2)
    config.word_embed_proj_dim, config.dropout, config.attention_dropout = 16, 0.5, 0.5
    model = OPTForCausalLM(config).eval()
    ids = torch.arange(4, 20)[None]
    plain = hidden_states(model, ids)
    models.enable_checkpointing(model)
    assert torch.equal(hidden_states(model, ids), plain)
    with torch.no_grad():
        assert torch.equal(hidden_states(model, ids), plain)
    assert not any(module.training for module in model.modules())


def test_checkpointing_of_a_model_without_such_layers_is_refused():
    with pytest.raises(BadInput, match="^Linear cannot recompute activations: add --no-checkpointing$"):
        models.enable_checkpointing(torch.nn.Linear(2, 2))


def test_every_eos_id_of_every_model(world):
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    own = tokenizer.eos_token_id
    model.generation_config.eos_token_id = [3, 5]
    other = tiny()
    other.generation_config.eos_token_id = 7
    assert models.eos_ids(tokenizer, model, other) == {own, 3, 5, 7}
    model.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.chat_template = None
    with pytest.raises(BadInput, match="no eos token"):
        models.eos_ids(tokenizer, model)


def test_the_end_of_turn_of_the_chat_template_is_an_eos_id(world):
    """Base models name <|endoftext|> alone, and a template that ends turns otherwise: they never stopped."""
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    other = next(i for i in sorted(tokenizer.all_special_ids) if i != tokenizer.eos_token_id)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}" + tokenizer.decode(other) + "\n{% endfor %}"
    )
    model = tiny()
    model.generation_config.eos_token_id = None
    assert models.eos_ids(tokenizer, model) == {tokenizer.eos_token_id, other}
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert models.eos_ids(tokenizer, model) == {tokenizer.eos_token_id}
    for template in ("{{ raise_exception('no roles') }}", "{{ 1 + messages[0].content }}", {"rag": "x"}):
        tokenizer.chat_template = template
        assert models.eos_ids(tokenizer, model) == {tokenizer.eos_token_id}


def test_an_end_of_turn_that_is_special_without_a_name_is_an_eos_id(world, tmp_path):
    """As in Llama 3's tokenizers, where tokenizer.json alone says that it is special."""
    AutoTokenizer.from_pretrained(world / "student").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"eos_token": "<|endoftext|>"}
    named = ("additional_special_tokens", "extra_special_tokens")
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in named}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in tokenizer.all_special_ids and end in models.eos_ids(tokenizer, tiny())


def test_a_smaller_teacher_is_allowed_and_reported(world, capsys):
    load_pair(world / "teacher", world / "student")
    assert "teacher is smaller" in capsys.readouterr().out


def test_a_tokenizer_that_needs_a_missing_library_is_one_line():
    class Tokenizer:
        @staticmethod
        def from_pretrained(name, **options):
            raise ImportError("needs sentencepiece\npip install it")

    with pytest.raises(BadInput, match="cannot load x/y .needs sentencepiece.: give"):
        models.load(Tokenizer, "x/y")


def test_weights_that_are_ignored_are_named(tmp_path, capsys):
    """Three layers that a config calls two were loaded as two in silence."""
    tiny(num_hidden_layers=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    models.load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    said = capsys.readouterr().out
    assert "such as model.layers.2.input_layernorm.weight: they are ignored" in said
    tiny().save_pretrained(tmp_path)
    models.load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    assert "ignored" not in capsys.readouterr().out


def test_a_saved_model_replaces_the_one_before(world, tmp_path):
    """The folder gets its name when it is complete; leftovers of a save that was killed do not matter."""
    tokenizer = models.load_tokenizer(str(world / "student"))
    (tmp_path / ".student.part").mkdir()
    (tmp_path / "student.old").mkdir()  # a copy by the user
    for seed in (0, 1):
        models.save_model(tiny(seed), tokenizer, tmp_path / "student")
    assert {p.name for p in tmp_path.iterdir()} == {"student", "student.old"}
    loaded = models.load_model(str(tmp_path / "student"), torch.float32, torch.device("cpu"))
    weights = tiny(seed=1).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("length, fits", [(24, True), (25, False)])
def test_context(length, fits):
    """A prompt and a full response fit into the 64 positions of every model, or the run is refused."""
    prompts = [[1], [1] * length]
    if fits:
        models.check_context([tiny().config, tiny(max_position_embeddings=99).config], prompts, 40)
    else:
        with pytest.raises(BadInput, match="25 tokens, and --max-new-tokens 40 exceed .* 64 tokens: lower"):
            models.check_context([tiny().config, tiny(max_position_embeddings=99).config], prompts, 40)
        with pytest.raises(BadInput, match="context of 64 tokens: remove that problem"):
            models.check_context([tiny().config], [[1] * 64], 40)


@pytest.mark.parametrize("kind, context", [("longrope", 32), ("dynamic", 64), ("yarn", 64)])
def test_a_context_within_which_rows_of_a_batch_do_not_change_each_other(kind, context):
    """Beyond it, a long row changes the rotary frequencies of all: the same text got other probabilities."""
    config = tiny().config
    config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 32}
    assert models.context_length(config) == context
    config.rope_parameters = {"full_attention": config.rope_parameters, "sliding_attention": {}}
    assert models.context_length(config) == context


def test_prompts_with_ids_beyond_the_embeddings():
    """Tokens that were added to a tokenizer alone: an IndexError in the first forward pass."""
    configs = [tiny(vocab_size=V + 1).config, tiny().config]
    models.check_context(configs, [[1], [V - 1, 2]], 4)
    models.check_context(configs[:1], [[V]], 4)
    with pytest.raises(BadInput, match=f"token id {V}, and a model has {V} embeddings: resize"):
        models.check_context(configs, [[1], [V, 2]], 4)


def test_a_teacher_in_few_bits_is_loaded_by_bitsandbytes(monkeypatch):
    """What the library gets; the weights are made on the device, and are not moved."""
    given = {}

    def load(auto_class, name, **options):
        given.update(options)
        model = tiny()
        model.to = None  # bitsandbytes refuses it
        return model, {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    monkeypatch.setattr(models, "BitsAndBytesConfig", dict)  # it asks for the library's version
    cpu = torch.device("cpu")
    for bits in ("8", "4"):
        models.load_model("x", torch.bfloat16, cpu, bits)
        config = given["quantization_config"]
        assert config[f"load_in_{bits}bit"] is True
        assert given["device_map"] == {"": cpu}
    assert config["bnb_4bit_compute_dtype"] == torch.bfloat16


def test_few_bits_without_the_library_are_refused(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(
        BadInput, match="--teacher-bits 4 needs bitsandbytes: pip install bitsandbytes, or drop"
    ):
        models.check_bits("4")


def test_a_quantised_head_is_refused():
    model = tiny()
    model.lm_head.weight = torch.nn.Parameter(torch.ones(50, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match="not a linear layer, or quantised"):
        models.check_architecture(model)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_rounded_logits_are_said_where_they_are_rounded(device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert models.dtype_name("bfloat16", torch.device(device)) == "bfloat16"
    assert (f"bf16 on {device}: logits are rounded" in capsys.readouterr().out) == (device != "cuda")
    assert models.dtype_name("float32", torch.device(device)) == "float32"
    assert capsys.readouterr().out == ""


def test_a_card_without_bf16_says_what_runs(monkeypatch, capsys):
    capability = {torch.device("cuda:0"): (8, 0), torch.device("cuda:1"): (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    card = torch.device("cuda:1")
    assert models.dtype_name("", card) == "float32"
    assert capsys.readouterr().out == "Tesla T4 has no bf16: --dtype float32, which takes more memory\n"
    assert models.dtype_name("float32", card) == "float32" and not capsys.readouterr().out
    with pytest.raises(BadInput, match="Tesla T4 has no bf16: use --dtype float32"):
        models.dtype_name("bfloat16", card)
    other = torch.device("cuda:0")
    assert models.dtype_name("", other) == models.dtype_name("bfloat16", other) == "bfloat16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cudnn_attention_is_off_on_a_gpu():
    models.find_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
