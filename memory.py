"""How much memory a run takes: `train.py --dry-run` adds it up before anything is loaded.

An estimate from the shapes alone, in bytes. What is counted is written where it is counted; what a library
keeps for itself, and pieces too small to use again, is not.
"""

from dataclasses import dataclass

import psutil
import torch
from transformers import AutoModelForCausalLM

import lora
from cli import BadInput
from opd import BLOCK, CHUNK


def free_memory(device: torch.device) -> int:
    """Bytes that may still be used."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free, to us
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


@dataclass(frozen=True)
class Shape:
    """What of a model's config decides about memory; `item` is the bytes of a number."""

    layers: int
    width: int  # D
    heads_width: int  # of all query heads together
    cached_width: int  # of all key heads together
    inner: int  # of the MLP
    vocab: int
    item: int

    @classmethod
    def of(cls, config, item: int) -> "Shape":
        c = config.get_text_config()
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        cached = (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * size
        inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
        heads = c.num_attention_heads * size
        return cls(c.num_hidden_layers, c.hidden_size, heads, cached, inner, c.vocab_size, item)

    def cache(self, tokens: int) -> int:
        """Keys and values, and one layer's once more while it grows."""
        return 2 * (self.layers + 1) * self.cached_width * self.item * tokens

    def passing(self, tokens: int) -> int:
        """Forward without gradient: the widest layer's tensors."""
        return tokens * (6 * self.width + 3 * self.inner) * self.item

    def layer(self, tokens: int) -> int:
        """What one layer keeps for its backward: of each token two norms' inputs in fp32, what they
        normalise and give out, attention's inputs and output, four tensors of the MLP's inside.
        """
        numbers = 4 * self.width + 2 * self.heads_width + 2 * self.cached_width + 4 * self.inner
        return tokens * (2 * 4 * self.width + self.item * numbers)

    def kept(self, tokens: int, checkpointing: bool) -> int:
        """Activations between forward and backward: all layers', or with checkpointing their inputs alone."""
        last_norm = tokens * self.width * (4 + 2 * self.item)
        layer = tokens * self.width * self.item if checkpointing else self.layer(tokens)
        return self.layers * layer + last_norm

    def sampling(self, rows: int) -> int:
        """The sampler's tensors of the vocabulary's width, in fp32."""
        return 5 * 4 * self.vocab * rows


def batch_that_fits(model, prompts: list[list[int]], max_new_tokens: int, asked: int | str) -> int:
    """Rows to sample together: `asked`, or for "auto" as many as free memory holds, at most 64.

    Counts the KV cache at its longest, the prompts' activations, and the sampler's rows of the vocabulary.
    Raises BadInput with the bytes if not even that many, or one, would fit.
    """
    shape, longest = Shape.of(model.config, model.dtype.itemsize), max(map(len, prompts), default=0)
    row = shape.cache(longest + max_new_tokens) + shape.passing(longest) + shape.sampling(1)
    free = int(0.9 * free_memory(model.device))
    if model.device.type == "cpu" and model.dtype == torch.bfloat16:  # fast.py packs a copy of the weights
        free -= sum(p.nbytes for p in model.parameters())
    size = min(64, free // row) if asked == "auto" else int(asked)
    if size * row > free or size < 1:
        rows = max(size, 1)
        what = f"{rows} answers at once need {rows * row / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        raise BadInput(f"{what}: lower the batch size (auto takes what fits) or --max-new-tokens")
    return size


def parameters(config, low_memory: bool) -> tuple[int, int]:
    """How many a model has, and how many of them learn; made without memory, on the `meta` device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        if low_memory:
            lora.add(model)
    every = list(model.parameters())  # a weight that two layers share is listed once
    return sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)


def estimate(knobs, student_config, teacher_config, prompt: int, horizon: int) -> dict[str, int]:
    """Bytes of each part of a training run, and `peak`; prompt: tokens of the longest.

    The peak comes while sampling, where there are no gradients, in the loss, or in backward, where the
    gradients take the place of the activations: of the first micro-batch, and beside those of later ones.
    """
    item = getattr(torch, knobs.dtype).itemsize
    student, teacher = Shape.of(student_config, item), Shape.of(teacher_config, item)
    every, learning = parameters(student_config, knobs.low_memory)
    rows = knobs.batch_size * knobs.rollouts_per_prompt
    length = prompt + horizon
    together = min(max(1, knobs.micro_batch // length), rows)  # rows of a micro-batch
    tokens, parts = together * length, -(-rows // together)
    vocab = min(student.vocab, teacher.vocab)
    head = 0 if knobs.low_memory else vocab * student.width
    size = min(max(1, CHUNK // vocab) * vocab, together * horizon * vocab)
    found = {
        "student weights": every * item,
        "fp32 masters": 0 if item == 4 else learning * 4,
        "AdamW": learning * 8,
        "teacher weights": parameters(teacher_config, False)[0] * item,
        "gradients": learning * 4,
        "cache and sampling": student.cache(rows * length) + student.sampling(rows),
        "activations": student.kept(tokens, knobs.checkpointing),
        "loss": item * head + min(BLOCK * size, together * horizon * vocab) * item + 7 * 4 * size,
    }
    held = sum(found[k] for k in ("student weights", "fp32 masters", "AdamW", "teacher weights"))
    before = found["gradients"] if parts > 1 else 0  # of the micro-batches that came before
    working = student.layer(tokens) * (3 if knobs.checkpointing else 1) // 2  # a layer anew, and gradients
    losing = before + found["activations"] + found["loss"]
    backward = max(before + found["activations"], found["gradients"]) + working + 2 * item * head
    sampling = found["cache and sampling"] + student.passing(rows * prompt)
    if knobs.device == "cpu" and item == 2:  # packed weights; evaluation samples from the teacher too
        sampling += found["teacher weights"] if knobs.eval_limit else found["student weights"]
    if knobs.device == "cuda" and knobs.sampler == "fast":
        held += student.cache(rows * length)  # stays for the next step
    return found | {"peak": held + max(losing, backward, sampling)}


def tell(found: dict[str, int], free: int) -> str:
    lines = [f"{name:20}{bytes_ / 1e9:7.2f} GB" for name, bytes_ in found.items()]
    remedy = "lower --micro-batch, --batch-size or --max-new-tokens, or add --low-memory"
    verdict = "fits" if found["peak"] <= free else f"does not fit: {remedy}"
    lines.append(f"estimated, of {free / 1e9:.1f} GB free: {verdict}")
    return "\n".join(lines)
