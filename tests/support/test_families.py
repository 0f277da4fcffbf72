"""Model families, tiny and with random weights: each is right, or refused in one line."""

import pytest
import torch
import transformers
from helpers import END, SIZES, V, pair_of

import train
from extras import lora
from rollout import hidden_states, rollout, sampling_noise
from support import models
from support.cli import BadInput

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [8, 4], [9, 10, 11, 12]]
EXPERTS = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4}
SUPPORTED = {  # family: settings apart from the sizes
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 4},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"head_dim": 4, "sliding_window": 5, "final_logit_softcapping": 2.0},
    "Gemma3": {"head_dim": 4, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Olmo2": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Granite": {"logits_scaling": 8.0, "attention_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Qwen3Moe": {"head_dim": 4, "num_experts": 4} | EXPERTS,
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "Qwen3Next": {
        "head_dim": 4,
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
        "linear_value_head_dim": 4,
    }
    | EXPERTS
    | LINEAR
    | {"layer_types": ["linear_attention", "full_attention"]},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "PhiMoE": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str, **settings):
    name = {"GPT2": "GPT2LMHeadModel", "PhiMoE": "PhimoeForCausalLM"}.get(family, f"{family}ForCausalLM")
    config_name = {"Gemma3": "Gemma3TextConfig", "PhiMoE": "PhimoeConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, config_name)(**(SIZES | settings))
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("family", SUPPORTED)
def test_supported(family, tmp_path):
    """The sampler's log-probabilities are those of the loss; rows have unequal lengths and end one by one."""
    build(family, **SUPPORTED[family]).save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    model, teacher = (models.load_model(str(tmp_path), torch.float32, cpu) for _ in range(2))
    models.enable_checkpointing(model)
    pair = pair_of(model, teacher)
    noise = sampling_noise([1, 2, 3], 12)
    rollouts = rollout(model, PROMPTS, 12, {END, *range(20, 30)}, noise)
    assert 0 < rollouts.finished.sum() < 3 or len(set(rollouts.response_mask.sum(1).tolist())) > 1
    loss, statistics = train.score(pair, rollouts)
    sampled = rollouts.logp[statistics["row"], statistics["position"]]
    assert torch.allclose(sampled, statistics["student_logp"], atol=2e-4)
    models.check_sampler(model, sampled, statistics["student_logp"])
    assert abs(loss) < 1e-4  # the teacher has the same weights


KEPT_IN_FP32 = {  # families of which transformers keeps some weights in fp32, whatever dtype is asked for
    "Glm4Moe": {"n_routed_experts": 4, "head_dim": 4, "first_k_dense_replace": 0, "n_group": 1} | EXPERTS,
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 4},
}


@pytest.mark.parametrize("family", KEPT_IN_FP32)
def test_weights_that_stay_in_fp32(family, tmp_path):
    """In bf16 both models keep them; rounding the student's router would send tokens to other experts."""
    build(family, **KEPT_IN_FP32[family]).save_pretrained(tmp_path)
    student, teacher = (
        models.load_model(str(tmp_path), torch.bfloat16, torch.device("cpu")) for _ in range(2)
    )
    pair = train.make_pair(student, teacher.requires_grad_(False), None, V, {END})
    dtypes = {name: weight.dtype for name, weight in student.named_parameters()}
    assert dtypes == {name: weight.dtype for name, weight in teacher.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert {master.dtype for master in pair.masters.values()} == {torch.float32}
    rollouts = rollout(student, PROMPTS, 12, {END}, sampling_noise([1, 2, 3], 12))
    loss, _ = train.score(pair, rollouts)
    assert loss == 0 and all(master.grad.abs().max() == 0 for master in pair.masters.values())


@pytest.mark.parametrize("family", SUPPORTED)
def test_merged_adapters(family, tmp_path):
    """`--low-memory` saves what it trained; fused experts once failed after the last step."""
    model = build(family, **SUPPORTED[family])
    if family == "Qwen3Next":
        with pytest.raises(BadInput, match="^peft adapts more of Qwen3NextForCausalLM .* drop --low-memory$"):
            lora.add_adapters(model)
        return
    lora.add_adapters(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path, state_dict=lora.merged(model))
    saved = models.load_model(str(tmp_path), torch.float32, torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, saved(input_ids=ids).logits, atol=1e-4)


def size_of(name, **settings):
    """A random model by the name of its class."""
    torch.manual_seed(0)
    model = getattr(transformers, name)
    return model(model.config_class(**(SIZES | settings))).eval()


REFUSED_ON_LOADING = {
    "Mamba2ForCausalLM": ({"num_heads": 8, "head_dim": 4, "state_size": 8}, "does not take a KV cache"),
    "OpenAIGPTLMHeadModel": ({"n_embd": 16, "n_layer": 2, "n_head": 4}, "does not keep a KV cache"),
    "MiniMaxForCausalLM": ({"head_dim": 4, "num_local_experts": 2}, "does not take a KV cache"),
    "ModernBertDecoderForCausalLM": ({}, "does not give its decoder"),
    "Llama4ForCausalLM": ({"head_dim": 4, "num_local_experts": 2}, "does not give its decoder"),
}


@pytest.mark.parametrize("name", REFUSED_ON_LOADING)
def test_refused_on_loading(name, tmp_path):
    settings, reason = REFUSED_ON_LOADING[name]
    size_of(name, **settings).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=f"{name} {reason}"):
        models.load_model(str(tmp_path), torch.float32, torch.device("cpu"))


def test_a_vision_language_model_is_refused(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Gemma3Config(
        text_config=SIZES | {"head_dim": 4, "sliding_window": 5},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="Gemma3ForConditionalGeneration is not a text-only causal LM"):
        models.load_model(str(tmp_path), torch.float32, torch.device("cpu"))


RECURRENT = {"lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}
REFUSED_HEADS = {
    "RobertaForCausalLM": {"is_decoder": True},  # a dense layer before its head
    "RecurrentGemmaForCausalLM": RECURRENT | {"logits_soft_cap": 30.0},  # a cap under a name of its own
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_refused_by_the_head(name):
    model = size_of(name, **REFUSED_HEADS[name])
    with pytest.raises(BadInput, match=f"{name} computes its logits in a way that OutputHead does not"):
        models.checked_head(model, hidden_states, V)


BART = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
REFUSED_AFTER_SAMPLING = {
    "BartForCausalLM": BART | {"init_std": 0.5},  # its positions do not skip the padding
    "BertGenerationDecoder": {"is_decoder": False},  # looks at later tokens
}


@pytest.mark.parametrize("name", REFUSED_AFTER_SAMPLING)
def test_refused_by_the_guard(name):
    model = size_of(name, **REFUSED_AFTER_SAMPLING[name])
    pair = pair_of(model, size_of(name, **REFUSED_AFTER_SAMPLING[name]))
    rollouts = rollout(model, PROMPTS, 12, {END}, sampling_noise([1, 2, 3], 12))
    with torch.no_grad():
        _, statistics = train.score(pair, rollouts)
    sampled = rollouts.logp[statistics["row"], statistics["position"]]
    with pytest.raises(BadInput, match=f"{name} samples from another distribution .* nats on average"):
        models.check_sampler(model, sampled, statistics["student_logp"])
