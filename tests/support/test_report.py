"""What a run shows: the teacher's gap on each token, means by position, the table, the curve."""

import math
import re

import pytest
import torch
from helpers import Bytes

from support import report


def test_gap_text_shows_a_character_of_two_tokens_once():
    tokens = torch.tensor(list("aé!".encode()) + [0, 0])  # and padding
    text = report.gap_text(Bytes(), tokens, torch.tensor([0.0, -1.0, -2.0, 0.0]), colour=False)
    assert text == "a[-1.0]é[-2.0]!"


def test_gap_text_escapes_what_a_terminal_would_obey():
    """A model may write the sequence that clears the screen."""
    tokens = torch.tensor(list("\x1b[2Jé\r\n".encode()))
    text = report.gap_text(Bytes(), tokens, torch.zeros(len(tokens)), colour=False)
    assert text == r"\x1b[2Jé\x0d" + "\n"


class Pieces:
    """A tokenizer that drops the space before the first token, as SentencePiece does."""

    def decode(self, tokens):
        return "".join((" a", " b", "c")[i] for i in tokens).removeprefix(" ")


@pytest.mark.parametrize(
    "tokenizer, tokens, texts",
    [
        (Bytes(), "é!".encode(), ["", "é", "!"]),
        (Bytes(), "a😀b".encode(), ["a", "", "", "", "😀", "b"]),
        (Bytes(), "a😀".encode()[:3], ["a", "", ""]),  # cut by the horizon
        (Pieces(), [0, 1, 2, 1], ["a", " b", "c", " b"]),
        (Bytes(), b"", []),
    ],
)
def test_the_text_that_each_token_adds(tokenizer, tokens, texts):
    assert report.token_texts(tokenizer, torch.tensor(list(tokens), dtype=torch.long)) == texts


def test_gap_text_is_redder_the_lower_the_teachers_probability_and_is_cut():
    tokens = torch.tensor(list(b"abcdef"))
    gap = torch.tensor([1.0, 0.0, -1.0, -3.0, -9.0, 0.0])
    text = report.gap_text(Bytes(), tokens, gap, colour=True, most=5)
    assert re.findall(r"2;255;(\d+);", text) == ["255", "255", "195", "75", "75"]
    assert text.endswith(" ...") and "f" not in text


def test_rows_by_position():
    statistics = {"row": torch.tensor([0, 1, 0]), "position": torch.tensor([0, 0, 2])}
    statistics |= {
        "reverse_kl": torch.tensor([1.0, 3.0, 5.0]),
        "agreement": torch.tensor([True, True, False]),
    }
    rows = report.rows_by_position(7, statistics, 4)
    assert rows[0] == {"step": 7, "position": 0, "tokens": 2, "reverse_kl": 2, "agreement": 1}
    assert rows[2] == {"step": 7, "position": 2, "tokens": 1, "reverse_kl": 5, "agreement": 0}
    for row in (rows[1], rows[3]):
        assert row["tokens"] == 0 and math.isnan(row["reverse_kl"])


SCORES = {"accuracy": 0.5, "se": 0.1, "truncated": 0.25, "mean_length": 40.0, "n": 20}


def test_table():
    change = {"difference": 0.1, "se": 0.05, "interval": [0.0, 0.2], "better": 3, "worse": 1, "p": 0.6}
    summary = dict.fromkeys(("before", "after", "teacher"), SCORES) | {"change": change}
    lines = report.table(summary)
    assert [line.split()[-5:] for line in lines[1:4]] == [["50.0%", "10.0%", "25.0%", "40", "20"]] * 3
    assert lines[4].startswith("change          +10.0% +- 5.0%") and len(lines) == 5


FELL, ROSE = ([{"reverse_kl": str(x), "horizon": 9} for x in xs] for xs in (range(20, 0, -1), range(20)))
GREW = [row | {"horizon": i} for i, row in enumerate(FELL)]
BLANK = [*FELL[:-1], {"reverse_kl": "nan", "horizon": 9}]
BETTER = {"accuracy": 0.8, "se": 0.1, "truncated": 0.0, "n": 20}
WORSE = BETTER | {"accuracy": 0.2}


@pytest.mark.parametrize(
    "rows, teacher, change, cut, words",
    [
        (FELL, BETTER, [0.1, 0.5], 0, ["it fell", "Accuracy rose"]),
        (ROSE, BETTER, [-0.5, -0.1], 0, ["lower --lr, or raise", "Accuracy fell"]),
        (FELL, BETTER, [-0.1, 0.3], 0, ["it fell", "with 20 problems, only changes of about 20%"]),
        (FELL, BETTER, [0.0, 0.0], 0, ["it fell", "No verdict changed on 20 problems"]),
        (FELL, BETTER, [1.0, 1.0], 0, ["it fell", "Accuracy rose"]),  # every verdict changed
        (FELL, WORSE | {"n": 4}, [1.0, 1.0], 0, ["it fell", "(sign test, p = 0.12)", "teacher is not"]),
        (FELL, BETTER | {"n": 4}, [0.4, 1.0], 0, ["it fell", "not significant (sign test, p = 0.12)"]),
        (GREW, BETTER, [0.1, 0.5], 0, ["not comparable as the horizon changed", "Accuracy rose"]),
        (BLANK, BETTER, [0.1, 0.5], 0, ["in a step no token had a loss.", "Accuracy rose"]),
        (FELL, WORSE, [0.1, 0.5], 0.5, ["it fell", "Accuracy rose", "teacher is not better"]),
        (FELL, BETTER, [0.1, 0.5], 0.5, ["it fell", "Accuracy rose", "50% of the answers were cut, 0% b"]),
    ],
)
def test_advice(rows, teacher, change, cut, words):
    after = WORSE | {"truncated": cut}
    change = {"interval": change, "p": 0.5 ** (teacher["n"] - 1)}  # the sign test if all changed alike
    summary = {"before": WORSE, "after": after, "teacher": teacher, "change": change}
    lines = [report.advice_on_kl(rows), *report.advice_on_accuracy(summary)]
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines))
    assert report.advice_on_kl(rows[:2]).endswith("too few steps to tell.")


def test_curves_with_and_without_an_evaluation(curves, tmp_path):
    columns = {"reverse_kl": "0.5", "horizon": "4", "response_length": "3.5", "truncated": "1"}
    rows = [columns | {"accuracy": accuracy} for accuracy in ("", "0.6", "")]
    drawn = []
    for scores in (None, SCORES):
        report.draw_curve(rows, dict.fromkeys(("before", "after", "teacher"), scores), tmp_path)
        drawn.append((tmp_path / "curve.png").read_bytes())
    assert drawn[0][:4] == b"\x89PNG" and drawn[0] != drawn[1]
