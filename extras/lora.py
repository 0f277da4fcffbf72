"""`--low-memory`: LoRA adapters (peft) are trained; the student's own weights stay fixed, in bf16.

A weight W becomes W + (alpha / r) B A, with A (r, in) and B (out, r). Of the 0.5B student's parameters 1/28
are trained, so masters, gradients and AdamW's state shrink from 16 bytes per parameter to almost nothing. In
return only low-rank changes can be learned, sampling computes each adapter too, and the learning rate must be
higher. r = 32 and alpha = 64 are ESR's (arXiv 2605.27028).
"""

import torch
from torch import Tensor
from torch.nn import Linear
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, whose weight is transposed

from support.cli import BadInput
from support.models import first_line

RANK, ALPHA = 32, 64


def add_adapters(student) -> None:
    """Add adapters to every linear layer but the output head; nothing else is trained. Raises BadInput.

    The fused experts and the router of a mixture of experts are not linear layers, and stay fixed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise BadInput(
            "--low-memory needs peft: pip install peft, or drop it and lower --micro-batch"
        ) from error
    head = student.get_output_embeddings()
    names = [name for name, m in student.named_modules() if type(m) in (Linear, Conv1D) and m is not head]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapters for every run, and for one that is resumed
        try:
            inject_adapter_in_model(config, student)  # also sets requires_grad
        except (ValueError, TypeError, AttributeError) as error:
            what = f"peft cannot add adapters to {type(student).__name__} ({first_line(error)})"
            raise BadInput(f"{what}: drop --low-memory, and lower --micro-batch instead") from error
    if any(hasattr(module, "parameter_name") for module in student.modules()):  # peft's wrapped experts
        what = f"peft adapts more of {type(student).__name__} than its linear layers"
        raise BadInput(f"{what}, which cannot be merged: drop --low-memory")


@torch.no_grad()
def merged(student) -> dict[str, Tensor]:
    """The student's weights with the adapters added, by the names they have without LoRA; sums in fp32."""
    weights = {name: w for name, w in student.state_dict().items() if "lora_" not in name}
    for name, module in student.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight
            delta = module.get_delta_weight("default").float()
            weights[f"{name}.base_layer.weight"] = (base.float() + delta).to(base.dtype)
    return {name.replace(".base_layer.", "."): w for name, w in weights.items()}
