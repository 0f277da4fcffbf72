"""`--dry-run`: how much memory a run needs, estimated before anything is loaded.

From the shapes alone, in bytes. What is counted is written where it is counted; what libraries keep for
themselves, and memory lost to fragmentation, is not.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from extras import lora
from support import data, models
from support.batch_size import Shape, free_memory
from support.cli import BadInput

CHUNK = 128  # tokens whose logits exist at a time: the default of opd.opd_backward


def layer_bytes(shape: Shape, tokens: int) -> int:
    """What one layer keeps for its backward.

    Of each token the inputs of two norms in fp32, their normalised values and outputs, attention's inputs and
    output, and four tensors inside the MLP.
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
    """Bytes of each part of a training run, and `peak`; `prompt` is the length of the longest prompt.

    The peak occurs while sampling, where there are no gradients, in the loss, or in backward, where gradients
    replace the activations: of the first micro-batch, and next to the gradients of the earlier ones in later
    ones.
    """
    item = getattr(torch, knobs.dtype).itemsize
    parameters_, trained = parameters(student_config, knobs.low_memory)
    parameters_of_teacher, _ = parameters(teacher_config, low_memory=False)
    student, teacher = Shape.of(student_config, item), Shape.of(teacher_config, item)
    rows = knobs.batch_size * knobs.rollouts_per_prompt
    length = prompt + horizon
    together = min(max(1, knobs.micro_batch // length), rows)  # rows of a micro-batch
    tokens, micro_batches = together * length, -(-rows // together)
    vocab = min(student.vocab, teacher.vocab)
    head = 0 if knobs.low_memory else vocab * student.width
    chunk = min(CHUNK, together * horizon) * vocab
    found = {
        "student weights": parameters_ * item,
        "fp32 masters": 0 if item == 4 else trained * 4,
        "AdamW": trained * 8,
        "teacher weights": parameters_of_teacher * item,
        "gradients": trained * 4,
        "cache and sampling": student.cache_bytes(rows * length) + student.sampling_bytes(rows),
        "activations": activation_bytes(student, tokens, knobs.checkpointing),
        # a chunk's gradient of the head, and eight fp32 tensors like its logits
        "loss": item * head + 8 * 4 * chunk,
    }
    held = sum(found[k] for k in ("student weights", "fp32 masters", "AdamW", "teacher weights"))
    earlier = found["gradients"] if micro_batches > 1 else 0  # of the micro-batches before
    # One layer's activations recomputed, and its gradients.
    working = layer_bytes(student, tokens) * (3 if knobs.checkpointing else 1) // 2
    loss = max(earlier, 4 * head) + found["activations"] + found["loss"]
    backward = max(earlier + found["activations"], found["gradients"]) + working + 2 * item * head
    sampling = found["cache and sampling"] + student.forward_bytes(rows * prompt)
    return found | {"peak": held + max(loss, backward, sampling)}


def format_estimate(found: dict[str, int], free: int) -> str:
    lines = [f"{name:20}{bytes_ / 1e9:7.2f} GB" for name, bytes_ in found.items()]
    remedy = "lower --micro-batch, --batch-size or --max-new-tokens, or add --low-memory"
    verdict = "fits" if found["peak"] <= free else f"does not fit: {remedy}"
    lines.append(f"estimated, of {free / 1e9:.1f} GB free: {verdict}")
    return "\n".join(lines)


def dry_run(knobs, problems: list, horizon: int, device: torch.device) -> str:
    """The estimate for these settings, from the configs, the tokenizer and the prompts. Raises BadInput.

    With --horizon auto that of its profile, which are full rollouts.
    """
    horizon = knobs.max_new_tokens if knobs.horizon == "auto" else horizon
    tokenizer = models.load_tokenizer(knobs.student)
    prompts = data.render(tokenizer, problems, knobs.instruction, knobs.system_prompt)
    configs = [models.load(AutoConfig, name) for name in (knobs.student, knobs.teacher)]
    found = estimate(knobs, *configs, max(map(len, prompts)), horizon)
    return format_estimate(found, free_memory(device))
