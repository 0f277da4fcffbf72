"""The batch size of an evaluation, from shapes and free memory."""

import math

import pytest
from helpers import tiny

from support import batch_size
from support.batch_size import Shape, batch_that_fits
from support.cli import BadInput


def test_batch_that_fits(monkeypatch):
    """auto takes what free memory holds; a size that does not fit is refused before anything is sampled."""
    model = tiny()
    prompts = [[1] * 100]
    assert batch_that_fits(model, prompts, 1000, "auto") == 64
    assert batch_that_fits(model, prompts, 1000, "7") == 7
    cache = 2 * 3 * 2 * 4 * 4 * 1100  # keys and values, 2 + 1 layers, 2 heads of 4 fp32 numbers, 1,100 tokens
    row = cache + 100 * (6 * 16 + 3 * 32) * 4 + 20 * 50
    monkeypatch.setattr(batch_size, "free_memory", lambda device: math.ceil(row * 5.5 / 0.9))
    assert batch_that_fits(model, prompts, 1000, "auto") == 5
    with pytest.raises(BadInput, match="6 answers at once need"):
        batch_that_fits(model, prompts, 1000, "6")
    monkeypatch.setattr(batch_size, "free_memory", lambda device: row // 2)
    with pytest.raises(
        BadInput, match="a single answer needs .*: lower --max-new-tokens, or name a smaller model"
    ):
        batch_that_fits(model, prompts, 1000, "auto")


def test_sizes_that_a_config_leaves_out():
    """GPT-2 has no key heads, no head size and no intermediate size of its own."""
    from transformers import GPT2Config

    shape = Shape.of(GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=9), item=2)
    assert (shape.heads_width, shape.cached_width, shape.inner, shape.vocab) == (32, 32, 128, 9)
