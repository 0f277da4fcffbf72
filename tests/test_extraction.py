"""The final answer of a response: which rule finds it, on odd and on hostile text."""

import time

import pytest

from eval_math import boxed, extract, has_box, is_correct
from support.grading import Grader

EXTRACTED = [  # response, its answer
    (r"so \boxed{42}", "42"),
    (r"first \boxed{7} and then, never stopping, \boxed{8}", "7"),
    (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\left\{ x \mid x>0 \right.}", r"\left\{ x \mid x>0 \right."),
    (r"\boxed{} then \boxed{5}", "5"),
    (r"\boxed{42 and \boxed{43}", "43"),
    (r"} } \boxed{5}", "5"),
    (r"#### 3 but \boxed{4}", "4"),
    ("6 * 7 = 42\n#### 42", "42"),
    ("#### 42\nQuestion: more\n#### 43", "42"),
    ("The answer is 42.", "42"),
    ("The final answer is: **3.5** meters", "3.5** meters"),
    ("answer: $\\frac{1}{2}$.\nThanks", "$\\frac{1}{2}$"),
    ("#### Step 1: Find x\nso\nThe answer is 5.", "5"),
    ("##### Solution\n so 10-15", "15"),
    ("The answer is 42, which is 6 times 7", "42"),
    ("Answer: " + " " * 4000 + "y" * 300, None),
    ("That makes 40 and 2, so 1,042 in all", "1,042"),
    ("it costs $-3.50", "-3.50"),
    ("I do not know", None),
    ("", None),
    (r"\boxed{42", "42"),
    (r"\boxed{" + "x" * 501 + "}", None),
]
HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{\int_0^1 x^{x^{x^x}} dx}",
    r"\boxed{" + "(" * 400 + "}",
    "{" * 100_000,
    "}" * 100_000,
    r"\boxed{" * 20_000,
    r"\boxed{x}" * 12_000,
    "9" * 100_000,
    "9," * 50_000,
    "answer is " * 10_000,
    "answer is " + " " * 100_000,
    "#### " * 20_000,
    r"\boxed{NaN}",
    r"\boxed{\x00\ud800}",
    r"\boxed{\frac{1}{}",
    "\\" * 100_000,
    "−½√" * 30_000,
]


@pytest.mark.parametrize("response, answer", EXTRACTED)
def test_extracted(response, answer):
    assert extract(response) == answer


def test_first_box_and_last_box():
    """A reported collapse of full rollouts was a last-box extractor reading what came after the answer."""
    response = r"\boxed{7}. Again: \boxed{8}"
    assert extract(response) == "7"
    assert extract(response, last_box=True) == "8"
    assert boxed(r"\boxed{1} \fbox{2} {\boxed {3}}") == ["1", "2", "3"]


@pytest.mark.parametrize("response", HOSTILE)
def test_hostile_text_is_wrong_in_bounded_time(response):
    started = time.time()
    assert not is_correct(response, "42")
    assert time.time() - started < 10


def test_correct_by_three_rules():
    """By the first box or another rule, by a box alone, and by the last box."""
    responses = ["#### 5", r"\boxed{5} \boxed{6}", r"\boxed{6} \boxed{5}", "no"]
    with Grader(extract, has_box, workers=1) as grader:
        graded = grader.grade(responses, ["5"] * 4)
    assert [one["correct"] for one in graded] == [True, True, False, False]
    assert [one["correct_strict"] for one in graded] == [False, True, False, False]
    assert [one["correct_last"] for one in graded] == [True, False, True, False]
    assert [one["extracted"] for one in graded] == ["5", "5", "6", None]
    assert graded[3]["verdict"] == "no answer"
    assert [is_correct(response, "5") for response in responses] == [True, True, False, False]
