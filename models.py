"""A pair of models that speak the same tokens, and what it takes to run them."""

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import lora
from cli import BadInput
from head import Head, head_of
from rollout import Rollout


def load(auto_class: type, name: str, **how: Any) -> Any:
    """What the library loads from a folder or the hub, with no code of that folder run. Raises BadInput."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise BadInput(f"model folder {name} does not exist: give a folder, or the name of a hub model")
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong is said once, below
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **how)
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        what = f"cannot load {name} ({first_line(error)})"  # every kind of broken folder raises its own
        raise BadInput(f"{what}: give a whole model folder, or check name and network") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def load_tokenizer(name: str):
    return load(AutoTokenizer, name)


def load_model(name: str, dtype: torch.dtype, device: torch.device):
    """A causal LM in eval mode, weights from safetensors alone. Raises BadInput if any is missing or NaN."""
    how = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, info = load(AutoModelForCausalLM, name, **how)
    if missing := sorted(info["missing_keys"]):
        raise BadInput(
            f"{name} lacks {len(missing)} weights, such as {missing[0]}: give a whole model folder"
        )
    for weight, values in model.named_parameters():
        if not values.isfinite().all():
            raise BadInput(f"{name} has weights that are no numbers, in {weight}: fetch or train it again")
    return model.to(device).eval()


def shared_vocab(student: str, teacher: str, student_tokenizer, teacher_tokenizer) -> int:
    """How many ids both models can score. Raises BadInput if the same id means different tokens."""
    if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        ours, theirs = set(student_tokenizer.get_vocab().items()), set(teacher_tokenizer.get_vocab().items())
        raise BadInput(
            f"{student} and {teacher} have different tokenizers ({len(ours ^ theirs)} entries differ): "
            "a teacher scores token ids, so choose one of the student's family"
        )
    sizes = [load(AutoConfig, name).get_text_config().vocab_size for name in (student, teacher)]
    if sizes[0] != sizes[1]:
        print(f"vocabularies of {sizes[0]} and {sizes[1]} rows, one tokenizer: using the first {min(sizes)}")
    return min(sizes)


def end_ids(tokenizer, *models) -> set[int]:
    """Every id that ends a response of any of the models: chat models list several. Raises BadInput."""
    found = {tokenizer.eos_token_id}
    for model in models:
        listed = model.generation_config.eos_token_id
        found |= set(listed) if isinstance(listed, list) else {listed}
    if found == {None}:
        name = tokenizer.name_or_path
        raise BadInput(f"{name} names no end token, so no answer would end: set eos_token_id in its config")
    return found - {None}


def context_length(model) -> int:
    """The longest text that the model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def find_device(name: str) -> torch.device:
    """The named device, or a CUDA GPU if there is one, else the CPU. Raises BadInput."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} is not to be had ({first_line(error)}): try cpu") from error
    return device


def dtype_name(asked: str, device: torch.device) -> str:
    """`asked`, or if that is empty the name of the dtype in which this device multiplies fastest."""
    return asked or str(fastest_dtype(device)).removeprefix("torch.")


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; on a CPU bf16 or fp32, whichever multiplies faster here and now."""
    if device.type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.randn(64, 1024).to(dtype), torch.randn(4096, 1024).to(dtype)
        runs = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            runs.append(time.perf_counter() - start)
        return min(runs)

    return min(torch.bfloat16, torch.float32, key=seconds)


@dataclass(frozen=True)
class Pair:
    """Student and teacher, both in `dtype`, the student's fp32 masters, and the token ids they share.

    A bf16 weight keeps 8 bits: a step of 1e-6 would round to nothing. So the optimizer moves fp32 masters,
    which collect the gradients too, and the student computes with bf16 copies of them, cast once a step.
    In fp32 the masters are the student's own weights.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    masters: dict[str, Tensor]  # fp32, of every weight that learns, by name
    student_head: Head
    teacher_head: Head
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # ids that both models can score
    ends: set[int]  # ids that end a response

    @torch.no_grad()
    def publish(self) -> None:
        """Give the masters' values to the weights that the student computes with."""
        for name, weight in self.student.named_parameters():
            if name in self.masters and weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def seconds_since(self, start: float) -> float:
        """Wall time since `start`, once the GPU has done what it was given."""
        if self.student.device.type == "cuda":
            torch.cuda.synchronize(self.student.device)
        return time.perf_counter() - start

    def save_student(self, folder: Path) -> None:
        """An ordinary Hugging Face folder, in the dtype that the student computed in; fp32 stays behind."""
        part, old = folder.with_suffix(".part"), folder.with_suffix(".old")
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        self.student.save_pretrained(part, state_dict=lora.merged(self.student))
        self.tokenizer.save_pretrained(part)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)  # seen under its name only when it is whole
        shutil.rmtree(old, ignore_errors=True)


def load_pair(
    student_name: str,
    teacher_name: str,
    dtype_name: str,
    device: torch.device,
    checkpointing: bool = False,
    low_memory: bool = False,
) -> Pair:
    """Raises BadInput if either is not to be had, or if they do not share a tokenizer."""
    tokenizer, dtype = load_tokenizer(student_name), getattr(torch, dtype_name)
    vocab_size = shared_vocab(student_name, teacher_name, tokenizer, load_tokenizer(teacher_name))
    student = load_model(student_name, dtype if low_memory else torch.float32, device)
    teacher = load_model(teacher_name, dtype, device).requires_grad_(False)
    if teacher.num_parameters() < student.num_parameters():
        print("the teacher is smaller than the student: fine if it is the better one", flush=True)
    if low_memory:
        lora.add(student)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    # A teacher may end its answers with an id that the student's own list lacks: the student will learn it.
    ends = end_ids(tokenizer, student, teacher)
    student.generation_config.eos_token_id = sorted(ends)
    return make_pair(student, teacher, tokenizer, vocab_size, ends, dtype)


def make_pair(student, teacher, tokenizer, vocab_size: int, ends: set[int], dtype: torch.dtype) -> Pair:
    """A pair of a student, in fp32 where it learns, and a teacher that are loaded already."""
    for module in student.modules():  # the loss must differentiate the law that was sampled, without dropout
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    masters = masters_of(student, dtype)
    heads = head_of(student, vocab_size), head_of(teacher, vocab_size)
    return Pair(student, teacher, masters, *heads, tokenizer, vocab_size, ends)


def masters_of(student, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the student's weights to `dtype`, and keep those that learn in fp32, by name.

    A weight's gradient goes to its master as soon as backward has it: micro-batches add up in fp32.
    """
    masters = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    for name, weight in student.named_parameters():
        if dtype == torch.float32:
            weight.data = weight.data.float()
            continue
        if name in masters:
            masters[name] = torch.nn.Parameter(weight.detach().float())
            weight.register_post_accumulate_grad_hook(partial(hand_over, masters[name]))
        weight.data = weight.data.to(dtype)  # buffers stay in fp32: rotary frequencies must
    return masters


def hand_over(master: Tensor, weight: Tensor) -> None:
    gradient = weight.grad.to(master.dtype)
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    weight.grad = None


def sequences(ro: Rollout, rows: list[int], loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Model input for `rows`: ids (b, L), and predicts (b, L): which states predict a token with a loss.

    `hidden[predicts]` is in the order of `ro.tokens[rows][loss_mask[rows]]`. Padding goes right, where
    causal attention never looks: scoring needs no attention mask.
    """
    texts = [ro.prompts[row] + ro.tokens[row][ro.response_mask[row]].tolist() for row in rows]
    ids = ro.tokens.new_zeros(len(rows), max(map(len, texts)) - 1)  # nothing to predict from the last
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, text) in enumerate(zip(rows, texts)):
        ids[i, : len(text) - 1] = ids.new_tensor(text[:-1])
        wanted = loss_mask[row][ro.response_mask[row]]
        predicts[i, len(ro.prompts[row]) - 1 : len(text) - 1] = wanted  # state t predicts token t + 1
    return ids, predicts


def micro_batches(ro: Rollout, budget: int) -> list[list[int]]:
    """Row numbers in groups of at most `budget` tokens, padding included, or of one row that has more.

    Longest first: what does not fit into memory fails at once. Like lengths together: little is padding.
    """
    lengths = [len(p) + n for p, n in zip(ro.prompts, ro.response_mask.sum(1).tolist())]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(row)
    return groups


def hidden_states(model, ids: Tensor, predicts: Tensor) -> Tensor:
    """The last hidden states that predict a response token: (b, L), (b, L) -> (N, D)."""
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[predicts]


def check_context(models: list, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises BadInput if a prompt and a full response do not fit into the context of every model."""
    longest, room = max(map(len, prompts)), min(map(context_length, models))
    if longest + max_new_tokens > room:
        raise BadInput(
            f"the longest prompt, {longest} tokens, and --max-new-tokens {max_new_tokens} exceed the context "
            f"of {room} tokens: lower --max-new-tokens or drop that problem"
        )
