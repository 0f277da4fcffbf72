"""The toy world: its answers, its tokenizer, its cache."""

import pytest
from transformers import AutoTokenizer

from support import toy
from support.cli import BadInput


def test_answers(world):
    """Correct answers are right, the others wrong, and the saved tokenizer is the one that was trained."""
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    for start, add, times in toy.all_problems(toy.Recipe())[:50]:
        for name in toy.WORLDS:
            text, right = toy.answer(start, add, times, name, correct=True)
            _, wrong = toy.answer(start, add, times, name, correct=False)
            assert right == (start + add * times) % 10 != wrong
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert 100 < len(tokenizer.encode(text)) < toy.PRESET["max_new_tokens"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="writable"):
        toy.build("opening", cache=tmp_path / "file")
