"""`--low-memory`: the student learns through LoRA adapters (peft), its own weights stay as they are, in bf16.

A weight W becomes W + (alpha / r) B A, with A (r, in) and B (out, r): a 28th of the 0.5B student's
parameters learn, so masters, gradients and AdamW's state shrink from 16 bytes a parameter to almost nothing.
What it costs: only low-rank changes can be learned, sampling computes each adapter too, and the learning rate
must be higher. r = 32, alpha = 64 are ESR's (arXiv 2605.27028).
"""

import torch
from torch import Tensor

from cli import BadInput

RANK, ALPHA = 32, 64


def add(student) -> None:
    """Put adapters on every linear layer but the output head; nothing else learns. Raises BadInput."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadInput(
            "--low-memory needs peft: pip install peft, or drop it and lower --micro-batch"
        ) from error
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapters for every run, and for one that is resumed
        inject_adapter_in_model(config, student)  # also sets requires_grad


@torch.no_grad()
def merged(student) -> dict[str, Tensor]:
    """The student's weights, adapters added in fp32 and rounded once, by the names they have without LoRA."""
    weights = {name: w for name, w in student.state_dict().items() if "lora_" not in name}
    for name, module in student.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight
            delta = module.get_delta_weight("default").float()
            weights[f"{name}.base_layer.weight"] = (base.float() + delta).to(base.dtype)
    return {name.replace(".base_layer.", "."): w for name, w in weights.items()}
