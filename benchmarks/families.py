"""Every causal LM family of the installed transformers, tiny and with random weights: right, or refused?

    python benchmarks/families.py --out results/families.csv      about 5 minutes

right       the sampled log-probabilities are those of each row alone, without a cache
refused     one line says why, when the model is loaded, or at the first step
wrong       neither
not built   the family's config could not be made small by the settings below
"""

import signal
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from rollout import Rollout, rollout, sampling_noise
from support import models, run_folder
from support.cli import BadInput, knob, parse, run_main

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33]]
EOS_IDS = set(range(40, 50))  # rows end one by one
SECONDS = 60  # for one family
LARGEST = 2e8  # parameters
SMALL = {  # settings by the names that configs use; those that a config lacks are skipped
    32: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "attention_hidden_size"),
    48: ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim"),
    4: ("num_hidden_layers", "num_attention_heads", "n_layer", "n_head", "num_heads", "num_experts"),
    2: ("num_key_value_heads", "num_experts_per_tok", "decoder_layers", "linear_num_key_heads"),
    1: ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups", "mamba_n_groups"),
    8: ("sliding_window", "state_size", "linear_key_head_dim", "linear_value_head_dim", "chunk_size"),
    16: ("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"),
    64: ("vocab_size",),
    128: ("max_position_embeddings", "n_positions"),
    0.3: ("initializer_range",),
}
ALSO = {4: ("num_local_experts", "n_routed_experts", "decoder_attention_heads", "rotary_dim")}
ALSO |= {2: ("linear_num_value_heads",), 0: ("pad_token_id",), 3: ("eos_token_id",)}


@dataclass(frozen=True)
class Knobs:
    family: tuple[str, ...] = knob((), "default: all", choices=sorted(FAMILIES))
    out: str = knob("", "CSV file with one row per family")


def small_config(family: str):
    """The family's default config with small sizes."""
    config = transformers.CONFIG_MAPPING[family]()
    text = config.get_text_config()
    for settings in (SMALL, ALSO):
        for size, names in settings.items():
            for name in names:
                if hasattr(text, name):
                    setattr(text, name, size)
    if hasattr(text, "qk_rope_head_dim"):  # latent attention, as DeepSeek's
        text.num_key_value_heads = 4
    elif hasattr(text, "head_dim"):
        text.head_dim = 8
    if kinds := list(dict.fromkeys(getattr(text, "layer_types", None) or [])):
        text.layer_types = (kinds * 4)[:4]
    return config


@torch.no_grad()
def largest_gap(model, rollouts: Rollout) -> float:
    """Largest difference to the model's own log-probabilities of each row alone, in nats."""
    gaps = []
    for prompt, tokens, mask, logp in zip(
        rollouts.prompts, rollouts.tokens, rollouts.response_mask, rollouts.logp
    ):
        ids = torch.cat([torch.tensor(prompt), tokens[mask]])[None]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        alone = logits[:, :64].log_softmax(-1).gather(-1, tokens[mask][:, None]).squeeze(-1)
        gaps.append((alone - logp[mask]).abs().max().item())
    return max(gaps)


def verdict(model) -> tuple[str, str]:
    """The verdict on a random model in fp32, and what it rests on."""
    try:
        models.check_architecture(model)
        models.check_cache(model)
        teacher = deepcopy(model).requires_grad_(False)
        pair = train.make_pair(model, teacher, None, 64, EOS_IDS)
        rollouts = rollout(model, PROMPTS * 2, 24, EOS_IDS, sampling_noise(range(6), 24), vocab_size=64)
        _, statistics = train.score(pair, rollouts)
        sampled = rollouts.logp[statistics["row"], statistics["position"]]
        models.check_sampler(model, sampled, statistics["student_logp"])
    except BadInput as error:
        return "refused", str(error)
    gap = largest_gap(model, rollouts)
    return ("right" if gap < 2e-3 else "wrong"), f"differs by {gap:.1e} nats at most"


def try_family(family: str) -> dict[str, str]:
    def give_up(number, frame) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    torch.manual_seed(0)
    name = ""
    try:
        model = transformers.AutoModelForCausalLM.from_config(small_config(family)).eval()
        name = type(model).__name__
        if model.num_parameters() > LARGEST:
            raise ValueError(f"{model.num_parameters():,} parameters")
        found, why = verdict(model)
    except Exception as error:  # the families' own errors for settings that do not suit them
        found, why = "not built", f"{type(error).__name__}: {models.first_line(error)}"
    finally:
        signal.alarm(0)
    return {"family": family, "class": name, "verdict": found, "reason": why[:160]}


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    if knobs.out:
        run_folder.prepare_file(Path(knobs.out), "--out")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for family in knobs.family or sorted(FAMILIES):
        rows.append(try_family(family))
        print("{verdict:10} {family:24} {class:32} {reason}".format(**rows[-1]), flush=True)
    counts = Counter(row["verdict"] for row in rows)
    print(f"transformers {transformers.__version__}:", ", ".join(f"{n} {v}" for v, n in counts.items()))
    if knobs.out:
        run_folder.write_csv(Path(knobs.out), list(rows[0]), rows)


if __name__ == "__main__":
    run_main(main)
