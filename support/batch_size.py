"""How many answers an evaluation samples together, from the shapes of the model and the free memory."""

from dataclasses import dataclass

import psutil
import torch

from support.cli import BadInput


def free_memory(device: torch.device) -> int:
    """Bytes that may still be used, the free blocks of PyTorch's allocator included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Shape:
    """The numbers of a model's config that decide how much memory it needs."""

    layers: int
    width: int  # hidden size
    heads_width: int  # of all query heads together
    cached_width: int  # of all key heads together
    inner: int  # intermediate size of the MLP
    vocab: int
    item: int  # bytes of a number

    @classmethod
    def of(cls, config, item: int) -> "Shape":
        """Raises BadInput for a model without attention, or whose layers differ in these numbers."""
        c = config.get_text_config(decoder=True)
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
        optional = ("intermediate_size", "head_dim", "num_key_value_heads")
        try:
            sizes = {name: getattr(c, name, None) for name in names}
            sizes |= {name: getattr(c, name, None) or 0 for name in optional}
        except RuntimeError:  # raised by transformers if a setting differs from layer to layer
            sizes = {"sizes": "that differ from layer to layer"}
        unknown = [f"{name} {str(size)[:40]}" for name, size in sizes.items() if not isinstance(size, int)]
        if unknown:
            what = f"a model of type {c.model_type} is not supported (its config has {', '.join(unknown)})"
            raise BadInput(f"{what}: choose a model whose layers all have attention and one size")
        head = sizes["head_dim"] or c.hidden_size // c.num_attention_heads
        return cls(
            layers=c.num_hidden_layers,
            width=c.hidden_size,
            heads_width=c.num_attention_heads * head,
            cached_width=(sizes["num_key_value_heads"] or c.num_attention_heads) * head,
            inner=sizes["intermediate_size"] or 4 * c.hidden_size,
            vocab=c.vocab_size,
            item=item,
        )

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of all layers, and those of one layer once more while they are copied to grow."""
        return 2 * (self.layers + 1) * self.cached_width * self.item * tokens

    def forward_bytes(self, tokens: int) -> int:
        """A forward pass without gradients: the tensors of the widest layer."""
        return tokens * (6 * self.width + 3 * self.inner) * self.item

    def sampling_bytes(self, rows: int) -> int:
        """The sampler's fp32 tensors of the vocabulary's width."""
        return 5 * 4 * self.vocab * rows


def batch_that_fits(model, prompts: list[list[int]], max_new_tokens: int, requested: int | str) -> int:
    """Rows to sample together: `requested`, or for "auto" as many as fit into free memory, at most 64.

    Counts the KV cache at its longest, the prompts' activations, and the sampler's tensors. Raises BadInput
    with the number of bytes if the requested rows, or a single one, do not fit.
    """
    shape = Shape.of(model.config, model.dtype.itemsize)
    longest = max(map(len, prompts), default=0)
    row = shape.cache_bytes(longest + max_new_tokens) + shape.forward_bytes(longest) + shape.sampling_bytes(1)
    free = int(0.9 * free_memory(model.device))
    size = min(64, free // row) if requested == "auto" else int(requested)
    if row > free:
        what = f"a single answer needs {row / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        raise BadInput(f"{what}: lower --max-new-tokens, or name a smaller model")
    if size * row > free:
        what = f"{size} answers at once need {size * row / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        raise BadInput(f"{what}: lower the batch size (auto takes what fits) or --max-new-tokens")
    return size
