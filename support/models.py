"""Loading and saving of models and tokenizers, and the checks that they must pass before training starts."""

import shutil
import timeit
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from support.cli import BadInput
from support.prompts import TEMPLATE_ERRORS, hidden_ids, render

# Settings of a generation config that apply to sampling alone.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
LOADING_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)
LOADING_ERRORS += (SafetensorError,)


def load(auto_class: type, name: str, **options: Any) -> Any:
    """An object from a folder or from the hub; no code from there is executed. Raises BadInput."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise BadInput(f"model folder {name} does not exist: give a folder, or the name of a hub model")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong is reported once, below
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except LOADING_ERRORS as error:  # each kind of broken folder raises an error of its own
        what = f"cannot load {name} ({first_line(error)})"
        raise BadInput(f"{what}: give a complete model folder, or check name and network") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def load_tokenizer(name: str):
    return load(AutoTokenizer, name)


def load_model(name: str, dtype: torch.dtype, device: torch.device, bits: str = ""):
    """A causal LM in evaluation mode, with weights from safetensors only.

    With `bits`, "8" or "4", bitsandbytes quantises all but its embedding and output head, which keep `dtype`.
    Raises BadInput if a weight is missing, NaN or infinite, or if the architecture is not supported. Names
    the weights that the architecture does not use.
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if bits:
        options |= {"quantization_config": quantization(bits, dtype), "device_map": {"": device}}
    model, info = load(AutoModelForCausalLM, name, **options)
    if missing := sorted(info["missing_keys"]):
        what = f"{name} lacks {len(missing)} weights, such as {missing[0]}"
        raise BadInput(f"{what}: give a complete model folder")
    if ignored := sorted(info["unexpected_keys"]):
        what = f"{len(ignored)} weights of {name} have no place in its architecture, such as {ignored[0]}"
        print(f"{what}: they are ignored; look at its config.json", flush=True)
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            raise BadInput(f"{name} has NaN or infinite weights, in {weight}: download or train it again")
    if not bits:  # quantised weights are on the device already
        model = model.to(device)
    model.eval()
    check_architecture(model)
    check_cache(model)
    return model


def quantization(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """int8, or 4-bit normal floats whose matmuls have `dtype`."""
    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_bits(bits: str) -> None:
    """Raises BadInput if what --teacher-bits `bits` needs is not installed."""
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise BadInput(f"--teacher-bits {bits} needs {names}: pip install {names}, or drop the flag")


def check_architecture(model) -> None:
    """Raises BadInput if the model is not a text-only causal LM: a stack of attention layers and a head."""
    name = type(model).__name__
    config = model.config
    if config.get_text_config(decoder=True) is not config:
        raise BadInput(f"{name} is not a text-only causal LM: name a model without image or audio parts")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder is model:
        raise BadInput(f"{name} does not give its decoder, and with it the hidden states: name another model")
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point():
        raise BadInput(f"the output head of {name} is not a linear layer, or quantised: name another model")


@torch.no_grad()
def check_cache(model) -> None:
    """Raises BadInput if the model keeps no KV cache: it would sample tokens without the text before them.

    A model without an argument `cache` ignores it.
    """
    name = type(model).__name__
    try:
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.tensor([[1, 2]], device=model.device), cache=cache, use_cache=True)
        length = cache.get_seq_length()
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # models with their own cache
        what = f"{name} does not take a KV cache ({first_line(error)})"
        raise BadInput(f"{what}: name another model") from error
    if length != 2:
        raise BadInput(f"{name} does not keep a KV cache: name another model")


def save_model(model, tokenizer, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write an ordinary Hugging Face folder, which gets its name only when it is complete."""
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    saved = copy(model)
    saved.generation_config = deepcopy(model.generation_config)
    if not saved.generation_config.do_sample:  # transformers refuses to save the settings of sampling then
        saved.generation_config.update(**dict.fromkeys(SAMPLING))
    saved.save_pretrained(part, state_dict=state_dict)
    tokenizer.save_pretrained(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def enable_checkpointing(model) -> None:
    """Recompute the activations of each layer in backward. Raises BadInput if the model has no such layers.

    Transformers recomputes in training mode only, where dropout and router noise would change the
    distribution. The forward of each layer is wrapped instead, and the model stays in evaluation mode.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"{type(model).__name__} cannot recompute activations: add --no-checkpointing")
    for layer in layers:
        layer.forward = partial(recomputed, layer.forward)


def recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """The output of `forward`, whose activations are not kept but computed again in backward."""
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


class LinearFP32(torch.autograd.Function):
    """hidden @ weight.T of bf16 tensors on a CUDA device, with fp32 results.

    Rounding logits to bf16 changes the gradient, more so the closer student and teacher are (RESULTS.md
    has figures). `torch.mm` with `out_dtype` has no derivative of its own.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        # Rounding a gradient to bf16 is harmless: its relative error is at most 2**-8. Rounding a logit is
        # not: one of 20 changes by up to 0.06, and so the token's probability by 6 %.
        grad_logits = grad_logits.to(weight.dtype)
        grad_hidden = grad_logits @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_logits.T @ hidden if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight


@dataclass(frozen=True)
class OutputHead:
    """The last layer of a causal LM, from hidden states to the logits of the first `vocab_size` ids."""

    weight: Tensor  # (V or more, D)
    bias: Tensor | None
    scale: float  # a constant factor of the logits
    softcap: float | None  # Gemma 2: logits = softcap * tanh(logits / softcap)
    vocab_size: int | None  # V: logits of the first V ids are returned; None: of all

    @classmethod
    def of(cls, model, vocab_size: int | None) -> "OutputHead":
        """The head of a Hugging Face causal LM."""
        linear = model.get_output_embeddings()
        config = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale = scale / getattr(config, "logits_scaling", 1.0)  # Granite divides
        return cls(
            weight=linear.weight,
            bias=getattr(linear, "bias", None),
            scale=scale,
            softcap=getattr(config, "final_logit_softcapping", None),
            vocab_size=vocab_size,
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """(C, D) -> (C, V) fp32 logits. Without CUDA, bf16 matmuls round them to bf16 first."""
        if hidden.is_cuda and hidden.dtype == torch.bfloat16:
            logits = LinearFP32.apply(hidden, self.weight)
        else:
            logits = F.linear(hidden, self.weight)
        logits = logits[:, : self.vocab_size].float()
        if self.bias is not None:  # some models forbid ids with -inf, for which p log p would be NaN
            logits = logits + self.bias[: self.vocab_size].clamp_min(-1e4)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@torch.no_grad()
def checked_head(model, hidden_states: Callable, vocab_size: int | None) -> OutputHead:
    """The output head of a model, compared with the model's own logits; both get the same ids.

    The tolerance is a rounding error of bf16 or fp32, relative to the logits: a soft cap of 30 changes a
    logit of 6 by 1.3 %. Raises BadInput, naming the model's class, if the model computes its logits in a way
    that the head does not.
    """
    head = OutputHead.of(model, vocab_size)
    weight = head.weight
    vocab_size = vocab_size or len(weight)
    length = min(64, context_length(model.config))
    ids = torch.arange(length, device=weight.device)[None] * 7919 % vocab_size
    theirs = model(input_ids=ids, use_cache=False).logits[0, :, :vocab_size].float()
    ours = head(hidden_states(model, ids)[0])
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2**-7
    largest = theirs[theirs > -1e4].abs().max().item()  # ids that a model forbids have -inf
    if not torch.allclose(ours, theirs.clamp_min(-1e4), rtol=tolerance, atol=tolerance / 2 * largest):
        what = f"{type(model).__name__} computes its logits in a way that OutputHead does not support"
        raise BadInput(f"{what}: name another model")
    return head


def move_head(head: OutputHead, device: torch.device) -> OutputHead:
    """The head on `device`, with the same weight if it is there already."""
    bias = None if head.bias is None else head.bias.to(device)
    return replace(head, weight=head.weight.to(device), bias=bias)


def note_smaller_teacher(student, teacher) -> None:
    """Print a line if the teacher is the smaller model of the two."""
    if teacher.num_parameters() < student.num_parameters():
        print("the teacher is smaller than the student: fine if it is the better one", flush=True)


# The largest mean difference of two ways to compute the same log-probabilities at temperature 1, in nats.
# Correct models had up to 2e-5 in fp32, and in bf16 up to 0.041 (SmolLM2) and 0.094 (random mixtures of
# experts); wrong ones had above 2e-3, so in bf16 some of them stay below the limit.
SAMPLER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_sampler(
    model, sampled: Tensor, scored: Tensor, dtype_name: str = "", temperature: float = 1.0
) -> None:
    """Compare the log-probabilities recorded while sampling with those of one pass over the text, (N,) each.

    They are the same numbers unless cache, padding or positions are wrong, or the model's forward is random.
    Raises BadInput, naming the model's class. NaN is not compared. `dtype_name` is that of the matmuls, if
    the weights have another one.
    """
    gap = (sampled.float() - scored.float()).abs()
    gap = gap[~gap.isnan()]
    dtype = getattr(torch, dtype_name) if dtype_name else model.dtype
    # Rounding errors of logits are divided by the temperature; at 0 the log-probabilities are those of 1.
    scale = 1 / min(temperature or 1, 1)
    gap = gap.where(gap.isfinite(), scale)  # top_p excludes the token in one pass alone; rounding may do so
    tolerance = SAMPLER_TOLERANCE[dtype] * scale
    if dtype == torch.bfloat16 and 0 < len(gap) < 64:  # single tokens differ more than their mean
        tolerance *= (64 / len(gap)) ** 0.5
    if gap.mean() > tolerance:
        what = f"{type(model).__name__} samples from another distribution than a pass over the text gives"
        size = f"log-probabilities differ by {gap.mean():.2g} nats on average, by {gap.max():.2g} at most"
        remedy = "drop --sampler graphs if it was given, use --dtype float32, or name another model"
        raise BadInput(f"{what}, {size}: {remedy}")


def check_rollouts(model, rollouts, statistics: dict[str, Tensor], knobs) -> None:
    """`check_sampler` for rollouts that the student has sampled, and the statistics of their tokens."""
    if rollouts.logp is not None:
        sampled = rollouts.logp[statistics["row"], statistics["position"]]
        check_sampler(model, sampled, statistics["student_logp"], knobs.dtype, knobs.temperature)


def check_finite(model, logp: Tensor, questions: list[str]) -> None:
    """Raises BadInput, with the problem, if a token of (B, R) was sampled from a non-finite distribution."""
    finite = logp.isfinite().all(1)
    if not finite.all():
        question = questions[int(finite.int().argmin())]
        what = f"{type(model).__name__} has non-finite log-probabilities after {question[:60]!r}"
        raise BadInput(f"{what}: raise --temperature, use --dtype float32, or repair the weights")


def load_tokenizers(student: str, teacher: str, divergence: str = "") -> tuple[Any, Any | None]:
    """The tokenizer of the student, and that of the teacher if an id means another token to it, else None.

    Raises BadInput if they differ and the divergence is another than `sampled`.
    """
    tokenizers = [load_tokenizer(name) for name in (student, teacher)]
    entries = [set(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    differing = len(entries[0] ^ entries[1])
    if differing and divergence != "sampled":
        what = f"{student} and {teacher} have different tokenizers ({differing} entries differ)"
        raise BadInput(f"{what}: name another teacher, or use train.py with --divergence sampled")
    return tokenizers[0], tokenizers[1] if differing else None


def shared_vocabulary(student, teacher) -> int:
    """The number of ids that both models score."""
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        print(f"vocabularies of {sizes[0]} and {sizes[1]} rows, one tokenizer: using the first {min(sizes)}")
    return min(sizes)


def eos_ids(tokenizer, *models) -> set[int]:
    """Every id that ends a response of any of the models; chat models have several. Raises BadInput.

    The configs of base models may lack the id with which their chat template ends a turn.
    """
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for model in models:
        listed = model.generation_config.eos_token_id
        found |= set(listed) if isinstance(listed, list) else {listed}
    if found == {None}:
        name = tokenizer.name_or_path
        raise BadInput(f"{name} has no eos token, so no answer would end: set eos_token_id in its config")
    return found - {None}


def end_of_turn(tokenizer) -> int | None:
    """The special id that follows an answer in the chat template, if there is one."""
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "An answer."}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except TEMPLATE_ERRORS:  # the template has other roles
        return None
    after = tokenizer(text.rpartition("An answer.")[2], add_special_tokens=False)["input_ids"]
    return after[0] if after and after[0] in hidden_ids(tokenizer) else None


def context_length(config) -> int:
    """The longest sequence that a model of this config has positions for.

    Rotary frequencies of the type longrope change for all rows of a batch when one of them exceeds a
    length: up to that length alone, a row's distribution does not depend on the other rows.
    """
    config = config.get_text_config(decoder=True)
    lengths = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # the values are dicts if the types of layers differ in it
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            lengths.append(part.get("original_max_position_embeddings"))
    return min(filter(None, lengths), default=1 << 30)


def check_context(configs: list, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises BadInput if a prompt and a full response do not fit into the context of every model.

    Also if an id has no embedding: tokens were added to the tokenizer, and the model was not resized.
    """
    rows = min(config.get_text_config(decoder=True).vocab_size for config in configs)
    largest = max(map(max, prompts), default=0)
    if largest >= rows:
        what = f"a prompt has the token id {largest}, and a model has {rows} embeddings"
        raise BadInput(f"{what}: resize its embeddings to its tokenizer, or name another model")
    longest = max(map(len, prompts), default=0)
    context = min(map(context_length, configs))
    if longest + max_new_tokens > context:
        what = f"the longest prompt, {longest} tokens, and --max-new-tokens {max_new_tokens}"
        remedy = "lower --max-new-tokens or remove that problem"
        if longest >= context:
            remedy = "remove that problem"
        raise BadInput(f"{what} exceed the context of {context} tokens: {remedy}")


def render_prompts(tokenizer, problems: list, knobs, configs: list) -> list[list[int]]:
    """The prompts of a training run, for models with these `configs`. Raises BadInput as `check_context`."""
    prompts = render(tokenizer, problems, knobs.instruction, knobs.system_prompt)
    check_context(configs, prompts, knobs.max_new_tokens)
    return prompts


def find_device(name: str) -> torch.device:
    """The named device; by default a CUDA GPU if there is one, else the CPU. Raises BadInput.

    For a CUDA device cuDNN's attention is switched off in this process: it takes about 70 ms to prepare for
    each new pair of batch size and length, and every sampled token has a new length.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # ImportError: hpu without its library
        raise BadInput(f"device {name!r} is not available ({first_line(error)}): use cpu") from error
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def dtype_name(requested: str, device: torch.device) -> str:
    """`requested`, or if that is empty the name of the dtype in which this device multiplies faster.

    Raises BadInput for bf16 on a GPU that lacks it; without a request, fp32 is used there and a line says so.
    Another line says where bf16 logits are rounded.
    """
    # torch.cuda.is_bf16_supported asks the current device, whichever is named.
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        card = torch.cuda.get_device_name(device)
        if requested == "bfloat16":
            raise BadInput(f"{card} has no bf16: use --dtype float32, which takes more memory")
        if not requested:
            print(f"{card} has no bf16: --dtype float32, which takes more memory", flush=True)
        return "float32"
    name = requested or str(fastest_dtype(device)).removeprefix("torch.")
    if name == "bfloat16" and device.type != "cuda":
        what = f"bf16 on {device.type}: logits are rounded to bf16, see RESULTS.md"
        print(f"{what}; --dtype float32 avoids it", flush=True)
    return name


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; on a CPU bf16 or fp32, whichever is faster in a short measurement."""
    if device.type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(64, 1024).to(dtype)
        b = torch.randn(4096, 1024).to(dtype)
        return min(timeit.repeat(lambda: F.linear(a, b), number=1, repeat=4))

    return min(torch.bfloat16, torch.float32, key=seconds)
