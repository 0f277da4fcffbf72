"""Tiny random models, tokenizers, and programs in processes of their own."""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import train
from support import cli, report

torch.set_num_threads(1)  # the models are tiny
DEVICE = torch.device(os.environ["TEST_DEVICE"])  # --device, for the tests of the five files
V = 50  # vocabulary size of the tiny models
END = 3  # their eos token
SIZES = {  # settings of a tiny model of any architecture
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}


def tiny(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """A random model of two layers in evaluation mode; `changes` are settings of its config."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**(SIZES | {"bos_token_id": None} | changes))).eval().to(DEVICE)


def pair_of(student, teacher, dtype: torch.dtype = torch.float32, ends=(END,)) -> train.Pair:
    """A pair without a tokenizer, as `train.load_pair` makes it; `ends` are its eos ids."""
    vocab_size = min(student.config.vocab_size, teacher.config.vocab_size)
    teacher.requires_grad_(False)
    for model in (student, teacher):
        for weight in model.parameters():  # not buffers: from_pretrained keeps the rotary frequencies in fp32
            weight.data = weight.data.to(dtype)
    return train.make_pair(student, teacher, None, vocab_size, set(ends))


def load_pair(student: Path | str, teacher: Path | str) -> train.Pair:
    """`train.load_pair` of two folders, in fp32."""
    knobs = train.Knobs(student=str(student), teacher=str(teacher), dtype="float32")
    return train.load_pair(knobs, DEVICE)


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "extras.shard"])


def in_process(main: Callable[[], int | None], flags: list, output: Path) -> multiprocessing.Process:
    """A started process that runs `main`, forked from a server that has imported everything.

    Its exit code is the program's; what it prints goes to the file `output`.
    """
    process = CONTEXT.Process(target=run_program, args=(main, list(map(str, flags)), output))
    process.start()
    return process


def run_program(main: Callable[[], int | None], flags: list[str], output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    report.draw_curve = lambda *run: None
    sys.argv = ["program", *flags]
    cli.run_main(main)


def renumbered(world, folder):
    """The toy's teacher with other ids for the same tokens: another tokenizer, the same texts."""
    shutil.copytree(world / "teacher", folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    first, last = max(token["id"] for token in state["added_tokens"]) + 1, max(vocabulary.values())
    for token, i in vocabulary.items():
        vocabulary[token] = first + last - i if i >= first else i
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.get_input_embeddings().weight.data
    weight[first : last + 1] = weight[first : last + 1].flip(0)
    model.save_pretrained(folder)
    return folder


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, tokens):
        return bytes(tokens if isinstance(tokens, list) else tokens.tolist()).decode(errors="replace")
