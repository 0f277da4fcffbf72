"""`--dry-run`: how much memory a run needs, estimated before anything is loaded.

The estimate is in bytes, from the shapes alone; the comments say what is counted. The sum of the tensors is
tested; the CUDA context and the fragmentation are allowances, measured on one card (results/gpu_first.csv).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from extras import lora
from support import models
from support.batch_size import Shape, free_memory
from support.cli import BadInput

# What the driver, its libraries and their kernels take of a GPU beside PyTorch's allocator: on an H200.
CONTEXT = 900_000_000
FRAGMENTATION = 0.07  # of the tensors: blocks of the allocator that nothing fits into; measured: 0.06, 0.08
CHUNK = 128  # tokens whose logits exist at a time: the default of opd.opd_backward


def layer_bytes(shape: Shape, tokens: int) -> int:
    """What one layer keeps for its backward.

    For each token: the inputs of two norms in fp32, their normalised values and outputs, attention's inputs
    and output, and four tensors inside the MLP.
    """
    numbers = 4 * shape.width + 2 * shape.heads_width + 2 * shape.cached_width + 4 * shape.inner
    return tokens * (2 * 4 * shape.width + shape.item * numbers)


def activation_bytes(shape: Shape, tokens: int, checkpointing: bool) -> int:
    """Between forward and backward: what all layers keep, or with checkpointing their inputs alone."""
    last_norm = tokens * shape.width * (4 + 2 * shape.item)
    layer = tokens * shape.width * shape.item if checkpointing else layer_bytes(shape, tokens)
    return shape.layers * layer + last_norm


def parameters(config, low_memory: bool) -> tuple[int, int]:
    """How many parameters a model has, and how many are trained; created on the `meta` device.

    Raises BadInput if the model is not supported.
    """
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except models.LOADING_ERRORS as error:  # each kind of unknown config raises an error of its own
            what = f"{type(config).__name__} is not the config of a causal LM ({models.first_line(error)})"
            raise BadInput(f"{what}: name another model") from error
        models.check_architecture(model)
        model.tie_weights()
        if low_memory:
            lora.add_adapters(model)
    every = list(model.parameters())  # a weight that two layers share is listed once
    return sum(p.numel() for p in every), sum(p.numel() for p in every if p.requires_grad)


def estimate(knobs, student_config, teacher_config, prompt: int, horizon: int) -> dict[str, int]:
    """Bytes of each part of a training run; `prompt` is the length of the longest prompt.

    `tensors` is the peak of the tensors, and `peak` that of the device, with the allowances above. The former
    occurs while sampling (without gradients), in the loss, or in backward, where gradients replace
    activations. From the second micro-batch on, the gradients of the earlier ones exist as well.
    """
    item = getattr(torch, knobs.dtype).itemsize
    parameters_, trained = parameters(student_config, knobs.low_memory)
    student, teacher = Shape.of(student_config, item), Shape.of(teacher_config, item)
    rows = knobs.batch_size * knobs.rollouts_per_prompt
    length = prompt + horizon
    together = min(max(1, knobs.micro_batch // length), rows)  # rows of a micro-batch
    tokens, micro_batches = together * length, -(-rows // together)
    vocab = min(student.vocab, teacher.vocab)
    head = 0 if knobs.low_memory else vocab * student.width
    teacher_weights = weights_bytes(knobs, teacher_config)
    if is_elsewhere(knobs):  # only its head is copied to the student's device
        teacher_weights = teacher.vocab * teacher.width * item
    chunk = min(CHUNK, together * horizon) * vocab
    on_gpu = torch.device(knobs.device or "cuda").type == "cuda"
    # The gradient of the head, or of the embedding that is tied to it, next to the sum of the gradients. A
    # CPU adds a bf16 tensor to an fp32 one by way of an fp32 copy, a CUDA kernel converts while it adds.
    beside = head * (item if item == 4 or on_gpu else item + 4)
    found = {
        "student weights": parameters_ * item,
        "fp32 masters": 0 if item == 4 else trained * 4,
        "AdamW": trained * 8,
        "teacher weights": teacher_weights,
        "gradients": trained * 4,
        "cache and sampling": student.cache_bytes(rows * length) + student.sampling_bytes(rows),
        "activations": activation_bytes(student, tokens, knobs.checkpointing),
        # seven fp32 tensors like a chunk's logits, or four and the gradient of the head
        "loss": max(7 * 4 * chunk, 4 * 4 * chunk + beside),
    }
    held = sum(found[k] for k in ("student weights", "fp32 masters", "AdamW", "teacher weights"))
    earlier = found["gradients"] if micro_batches > 1 else 0  # of the micro-batches before
    # One layer's activations recomputed, and its gradients.
    working = layer_bytes(student, tokens) * (3 if knobs.checkpointing else 1) // 2
    loss = max(earlier, 4 * head) + found["activations"] + found["loss"]
    backward = max(earlier + found["activations"], found["gradients"]) + working + beside
    sampling = found["cache and sampling"] + student.forward_bytes(rows * prompt)
    found["tensors"] = held + max(loss, backward, sampling)
    found["fragmentation"] = int(FRAGMENTATION * found["tensors"]) if on_gpu else 0
    found["CUDA context"] = CONTEXT if on_gpu else 0
    return found | {"peak": found["tensors"] + found["fragmentation"] + found["CUDA context"]}


def is_elsewhere(knobs) -> bool:
    """Whether the teacher is on a device of its own; cuda is cuda:0, and the default."""
    here = torch.device(knobs.device or "cuda")
    there = torch.device(knobs.teacher_device or here)
    return (there.type, there.index or 0) != (here.type, here.index or 0)


def weights_bytes(knobs, config) -> int:
    """The bytes of the teacher's weights, quantised or not."""
    item = getattr(torch, knobs.dtype).itemsize
    total, _ = parameters(config, low_memory=False)
    if not knobs.teacher_bits:
        return total * item
    text = config.get_text_config(decoder=True)
    kept = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)  # embedding and head
    return (total - kept) * int(knobs.teacher_bits) // 8 + kept * item


def format_estimate(found: dict[str, int], free: int) -> str:
    """The parts, and whether they fit; `free` on a GPU already excludes this process's CUDA context."""
    lines = [f"{name:20}{bytes_ / 1e9:7.2f} GB" for name, bytes_ in found.items()]
    remedy = "lower --micro-batch, --batch-size or --max-new-tokens, or add --low-memory"
    needed = found["tensors"] + found["fragmentation"]
    verdict = "fits" if needed <= free else f"does not fit: {remedy}"
    lines.append(f"estimated, of {free / 1e9:.1f} GB free: {verdict}")
    return "\n".join(lines)


def dry_run(knobs, problems: list, test: list, horizon_at: Callable, device: torch.device) -> str:
    """The estimate for these settings, from the configs, the tokenizer and the prompts. Raises BadInput.

    With --horizon auto it is that of the profile, which takes full rollouts.
    """
    longest = max(map(horizon_at, range(knobs.steps)))
    horizon = knobs.max_new_tokens if knobs.horizon == "auto" else longest
    knobs = replace(knobs, device=str(device))
    tokenizer, teacher_tokenizer = models.load_tokenizers(knobs.student, knobs.teacher, knobs.divergence)
    configs = [models.load(AutoConfig, name) for name in (knobs.student, knobs.teacher)]
    readers = configs[:1] if teacher_tokenizer else configs
    prompts = models.render_prompts(tokenizer, problems, knobs, readers)
    models.render_prompts(tokenizer, test, knobs, readers)  # to be checked
    found = estimate(knobs, *configs, max(map(len, prompts)), horizon)
    lines = [format_estimate(found, free_memory(device))]
    if is_elsewhere(knobs):
        needed = weights_bytes(knobs, configs[1])
        free = free_memory(torch.device(knobs.teacher_device))
        verdict = "fits" if needed <= free else "does not fit: name another --teacher-device"
        where = f"the teacher's weights on {knobs.teacher_device}, {needed / 1e9:.2f} GB"
        lines.append(f"{where} of {free / 1e9:.1f} GB free: {verdict}")
    return "\n".join(lines)
