"""What goes in: problems, prompts, and a pair of models that speak the same tokens."""

import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from cli import BadInput
from opd import Head

QUESTION_COLUMNS, ANSWER_COLUMNS = ("question", "problem"), ("answer", "final_answer")
SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Problem(NamedTuple):
    question: str
    answer: str  # the final answer alone


def read_problems(source: str, split: str) -> list[Problem]:
    """Problems of a file (JSONL, JSON, CSV, parquet), a folder holding `split`.*, or a hub data set.

    A hub data set may name its configuration: `openai/gsm8k:main`. Raises BadInput.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.stem == split and p.suffix in SUFFIXES)
        if not found:
            raise BadInput(f"folder {source} has no {split}.jsonl, .json, .csv or .parquet: name a file")
        path = found[0]
    if path.is_file():
        rows = read_jsonl(path) if path.suffix == ".jsonl" else read_with_datasets(source, path, split)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise BadInput(f"data {source} does not exist: give a file, a folder, or the name of a hub data set")
    else:
        rows = read_with_datasets(source, None, split)
    if not rows:
        raise BadInput(f"data {path if path.exists() else source} is empty: it needs a problem a row")
    return [to_problem(row, f"{path.name} row {i}") for i, row in enumerate(rows, 1)]


def read_jsonl(path: Path) -> list[dict]:
    """By hand for the line number: a library's error names neither line nor text."""
    rows = []
    with path.open(encoding="utf-8-sig") as file:  # not str.splitlines: it also breaks lines at U+2028
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(
                    f"{path} line {number} is not JSON ({error.msg}): {line[:40]!r}; mend or drop it"
                )
            if not isinstance(row, dict):
                raise BadInput(f"{path} line {number} is not a JSON object: {line[:40]!r}; mend or drop it")
            rows.append(row)
    return rows


def whole_batches(path: Path, total: int) -> list[dict]:
    """What a stopped evaluation left of `total` answers: records of the batches that it finished.

    A line that was cut, and the batch that it belongs to, leave the file: that batch is sampled again.
    """
    content = path.read_bytes() if path.exists() else b""
    if b"\n" not in content:
        return []
    whole = path.with_suffix(".part")
    whole.write_bytes(content[: content.rindex(b"\n") + 1])
    records = read_jsonl(whole)
    size = records[0]["batch_size"]
    if len(records) < total:
        records = records[: len(records) // size * size]
    whole.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    whole.replace(path)
    return records


def read_with_datasets(source: str, path: Path | None, split: str) -> list[dict]:
    import datasets  # here and not above: a JSONL file needs no such library

    try:
        if path is not None:
            if path.suffix not in SUFFIXES:
                raise BadInput(f"data {source} is no {', '.join(SUFFIXES)} file: convert it to one of them")
            files = {"data_files": str(path)}
            return datasets.load_dataset(SUFFIXES[path.suffix], split="train", **files).to_list()
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split).to_list()
    except BadInput:
        raise
    except Exception as error:  # pyarrow, pandas and the hub client each raise classes of their own
        what = f"cannot read data {source} ({type(error).__name__}: {str(error)[:120]})"
        raise BadInput(f"{what}: give a local file, or check the name and the network") from error


def to_problem(row: dict, where: str) -> Problem:
    question = next((row[c] for c in QUESTION_COLUMNS if row.get(c) is not None), None)
    answer = next((row[c] for c in ANSWER_COLUMNS if row.get(c) is not None), None)
    if question is None or answer is None:
        missing = "question (or problem)" if question is None else "answer"
        raise BadInput(f"{where} has no column {missing}, only {', '.join(map(str, row))}: rename the column")
    if isinstance(answer, list):  # OlympiadBench: an answer may have parts
        answer = ", ".join(map(str, answer))
    # GSM8K keeps its rationale in the answer, and the number itself after ####
    return Problem(str(question), str(answer).rpartition("####")[2].strip())


def subset(problems: list[Problem], limit: int, seed: int) -> list[Problem]:
    """`limit` problems chosen at random by `seed`, all if 0: the head of a file may be its easy part."""
    if not limit or limit >= len(problems):
        return problems
    return random.Random(seed).sample(problems, limit)


def render(
    tokenizer,
    problems: list[Problem],
    instruction: str,
    system_prompt: str = "",
    thinking: bool = False,
    few_shot: str = "",
) -> list[list[int]]:
    """The one prompt of each problem, as the ids that student and teacher both see.

    Without a chat template it is plain text after the examples of `few_shot`. Raises BadInput if it has none.
    """
    if tokenizer.chat_template is None:
        if not few_shot:
            name = tokenizer.name_or_path
            raise BadInput(f"the tokenizer of {name} has no chat template: give an instruction-tuned model")
        return [tokenizer(f"{few_shot}Question: {p.question}\nAnswer:")["input_ids"] for p in problems]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    # enable_thinking is a switch of Qwen3's template; other templates do not read it
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "enable_thinking": thinking}
    users = [{"role": "user", "content": problem.question + instruction} for problem in problems]
    return [list(tokenizer.apply_chat_template([*system, user], **how)) for user in users]


def load_tokenizer(name: str):
    """Raises BadInput if `name` is no model folder, or cannot be fetched."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise BadInput(f"model folder {name} does not exist: give a folder, or the name of a hub model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot load {name} ({str(error).splitlines()[0]}): give a local folder, or check name and net"
        ) from error
    return tokenizer


def load_model(name: str, dtype: torch.dtype, device: torch.device):
    """A causal LM in eval mode, weights from safetensors alone. Raises BadInput."""
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load {name} ({str(error).splitlines()[0]}): give a complete model") from error
    return model.to(device).eval()


def shared_vocab(student: str, teacher: str, student_tokenizer, teacher_tokenizer) -> int:
    """How many ids both models can score. Raises BadInput if the same id means different tokens."""
    if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        ours, theirs = set(student_tokenizer.get_vocab().items()), set(teacher_tokenizer.get_vocab().items())
        raise BadInput(
            f"{student} and {teacher} have different tokenizers ({len(ours ^ theirs)} entries differ): "
            "a teacher scores token ids, so choose one of the student's family"
        )
    sizes = [AutoConfig.from_pretrained(name).get_text_config().vocab_size for name in (student, teacher)]
    if sizes[0] != sizes[1]:
        print(f"vocabularies of {sizes[0]} and {sizes[1]} rows, one tokenizer: using the first {min(sizes)}")
    return min(sizes)


def end_ids(model, tokenizer) -> set[int]:
    """Every id that ends a response: chat models list several, and two models may prefer different ones."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {i for i in [*listed, tokenizer.eos_token_id] if i is not None}


def context_length(model) -> int:
    """The longest text that the model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def find_device(name: str) -> torch.device:
    """The named device, or a CUDA GPU if there is one, else the CPU. Raises BadInput."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} is not to be had ({str(error).splitlines()[0]}): try cpu") from error
    return device


def dtype_name(asked: str, device: torch.device) -> str:
    """`asked`, or if that is empty the name of the dtype in which this device multiplies fastest."""
    return asked or str(fastest_dtype(device)).removeprefix("torch.")


def free_memory(device: torch.device) -> int:
    """Bytes that may still be used."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def batch_that_fits(model, prompts: list[list[int]], max_new_tokens: int, asked: str) -> int:
    """Rows to sample together: `asked`, or for "auto" as many as free memory holds, at most 64.

    Counts the KV cache at its longest, the prompts' activations, and the sampler's rows of the vocabulary.
    Raises BadInput with the bytes if not even that many, or one, would fit.
    """
    c, item, longest = model.config.get_text_config(), model.dtype.itemsize, max(map(len, prompts), default=0)
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = 2 * (c.num_hidden_layers + 1) * heads * head_dim * item * (longest + max_new_tokens)
    row = cache + longest * (6 * c.hidden_size + 3 * c.intermediate_size) * item + 5 * 4 * c.vocab_size
    free = int(0.9 * free_memory(model.device))
    size = min(64, free // row) if asked == "auto" else int(asked)
    if size * row > free or size < 1:
        rows = max(size, 1)
        what = f"{rows} answers at once need {rows * row / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        raise BadInput(f"{what}: lower --batch-size (auto takes what fits) or --max-new-tokens")
    return size


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
    """Student (fp32 weights, trainable) and teacher (frozen), and the token ids they share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    student_head: Head
    teacher_head: Head
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # ids that both models can score
    ends: set[int]  # ids that end a response
    dtype: torch.dtype  # of matmuls

    def compute(self, cache_weights: bool = False):
        """A context in which matmuls run in `dtype`: in bf16 the student's fp32 weights are cast on use.

        Sampling reads each weight a hundred times, so it keeps the cast, which has no gradient. Training must
        not meet such a copy, and adds up its gradients in fp32: it casts anew.
        """
        enabled = self.dtype == torch.bfloat16
        return torch.autocast(self.student.device.type, self.dtype, enabled, cache_enabled=cache_weights)

    def seconds_since(self, start: float) -> float:
        """Wall time since `start`, once the GPU has done what it was given."""
        if self.student.device.type == "cuda":
            torch.cuda.synchronize(self.student.device)
        return time.perf_counter() - start

    def save_student(self, folder: Path) -> None:
        """An ordinary Hugging Face folder, in the dtype that the student computed in; fp32 stays behind."""
        weights = {name: w.to(self.dtype) for name, w in self.student.state_dict().items()}
        self.student.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


def load_pair(
    student_name: str, teacher_name: str, dtype_name: str, device: torch.device, checkpointing: bool
) -> Pair:
    """Raises BadInput if either is not to be had, or if they do not share a tokenizer."""
    tokenizer, dtype = load_tokenizer(student_name), getattr(torch, dtype_name)
    vocab_size = shared_vocab(student_name, teacher_name, tokenizer, load_tokenizer(teacher_name))
    student = load_model(student_name, torch.float32, device)
    teacher = load_model(teacher_name, dtype, device).requires_grad_(False)
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    # A teacher may end its answers with an id that the student's own list lacks: the student will learn it.
    ends = end_ids(student, tokenizer) | end_ids(teacher, tokenizer)
    student.generation_config.eos_token_id = sorted(ends)
    heads = head_of(student, vocab_size), head_of(teacher, vocab_size)
    return Pair(student, teacher, *heads, tokenizer, vocab_size, ends, dtype)


def hidden_states(model, ids: Tensor, predicts: Tensor) -> Tensor:
    """The last hidden states that predict a response token: (b, L), (b, L) -> (N, D)."""
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[predicts]


def batches(prompts: list[list[int]], size: int, seed: int) -> Iterator[list[list[int]]]:
    """Prompts in a new random order every epoch, for ever; a batch may span two epochs."""
    order: list[int] = []
    for epoch in itertools.count():
        order += random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts))
        while len(order) >= size:
            yield [prompts[i] for i in order[:size]]
            order = order[size:]


def check_context(models: list, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises BadInput if a prompt and a full response do not fit into the context of every model."""
    longest, room = max(map(len, prompts)), min(map(context_length, models))
    if longest + max_new_tokens > room:
        raise BadInput(
            f"the longest prompt, {longest} tokens, and --max-new-tokens {max_new_tokens} exceed the context "
            f"of {room} tokens: lower --max-new-tokens or drop that problem"
        )


@torch.no_grad()
def head_of(model, vocab_size: int) -> Head:
    """A model's output head, checked against the model's own logits.

    Raises BadInput, naming the model's class, if that does more than matmul, bias and soft cap.
    """
    linear, softcap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    head = Head(linear.weight, getattr(linear, "bias", None), softcap, vocab_size)
    ids = torch.arange(8, device=linear.weight.device)[None] % vocab_size
    theirs = model(input_ids=ids, use_cache=False).logits[..., :vocab_size].float()
    ours = head.logits(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item()):
        raise BadInput(
            f"{type(model).__name__} changes its logits in a way that opd.Head lacks: add it there"
        )
    return head


def train_and_test(source: str, held_out: str, limit: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and at most `limit` others to evaluate on. Raises BadInput.

    The others come from `held_out`, else from the test split of `source`; a single file gives up some of
    its own.
    """
    problems = read_problems(source, "train")
    if limit == 0:
        return problems, []
    if held_out or not Path(source).is_file():
        return problems, subset(read_problems(held_out or source, "test"), limit, seed)
    if len(problems) <= limit:
        raise BadInput(
            f"{source} has {len(problems)} problems, none left after {limit} held out: lower --eval-limit"
        )
    test = set(random.Random(seed).sample(range(len(problems)), limit))
    return [p for i, p in enumerate(problems) if i not in test], [problems[i] for i in sorted(test)]
