"""Tiny random models for every test, and the toy world, built once and cached, for those that train."""

import os

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import models
import toy

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
V, END = 50, 3


def tiny(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"eos_token_id": END, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.5}
    return Qwen2ForCausalLM(Qwen2Config(**(sizes | heads | ids | changes))).eval()


def pair_of(student, teacher, dtype=torch.float32, ends=(END,)) -> models.Pair:
    vocab = min(student.config.vocab_size, teacher.config.vocab_size)
    teacher = teacher.to(dtype).requires_grad_(False)
    return models.make_pair(student, teacher, None, vocab, set(ends), dtype)


@pytest.fixture(scope="session")
def world():
    return toy.build("opening")


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=1, help="how often a training run and an evaluation are killed"
    )
