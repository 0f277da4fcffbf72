"""Statistics of graded answers: standard errors, intervals, pass@k, paired differences, warnings."""

import json
import random
import statistics
from itertools import combinations

import pytest

from eval_math import boxed, extract
from support.cli import BadInput
from support.scores import difference, format_scores, is_repeating, regrade, score_answers, summarize, wilson


def record(index=0, correct=True, extracted="1", **changes):
    """An answer as an evaluation writes it."""
    usual = {
        "index": index,
        "correct": correct,
        "correct_strict": correct,
        "correct_last": correct,
        "gold": "1",
        "extracted": extracted,
        "verdict": "right" if correct else "wrong",
        "response": "x",
        "length": 4,
        "finished": True,
        "seconds": 0.5,
        "batch_size": 2,
    }
    return usual | changes


def test_scores_of_one_answer_each():
    s = score_answers([record(0), record(1), record(2, False, None, finished=False, length=40, gold="?")])
    assert s["accuracy"] == pytest.approx(2 / 3)
    assert s["n"] == 3
    assert s["se"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert s["truncated"] == s["no_answer"] == pytest.approx(1 / 3)
    assert (s["mean_length"], s["p95_length"], s["tokens_per_second"]) == (16, 40, 32)


def test_standard_error_is_clustered_by_problem():
    """Four answers to each of two problems, all alike within one: two observations, not eight."""
    s = score_answers([record(i, correct=i == 0) for i in (0, 1) for _ in range(4)])
    assert s["n"] == 2
    assert s["se"] == pytest.approx(statistics.stdev([1, 0]) / 2**0.5) == pytest.approx(0.5)


def test_problems_with_different_numbers_of_answers():
    """Those of a stopped evaluation, graded again: K is the smallest number, pass@1 is the accuracy."""
    for sizes in ((4, 2), (2, 4)):
        s = score_answers([record(i) for i, size in enumerate(sizes) for _ in range(size)])
        assert s["samples"] == 2 and s["pass_at"] == {1: 1.0, 2: 1.0} and s["accuracy"] == 1


def test_pass_at_k_is_unbiased():
    """Against the mean over every subset of k of the K answers, by enumeration."""
    right = {0: [True, False, False, True, False], 1: [False] * 5, 2: [True] * 5}
    s = score_answers([record(i, c, "1" if c else "2") for i, answers in right.items() for c in answers])
    for k in (1, 2, 4, 5):
        each = [statistics.fmean(any(subset) for subset in combinations(a, k)) for a in right.values()]
        assert s["pass_at"][k] == pytest.approx(statistics.fmean(each))
    assert s["majority"] == pytest.approx(1 / 3)  # problem 0: three say 2, two say 1


def test_majority_counts_answers_of_equal_text():
    group = [
        record(0, True, r"\dfrac12"),
        record(0, True, r"\frac{1}{2}"),
        record(0, False, "3"),
        record(0, False, None),
    ]
    assert score_answers(group)["majority"] == 1
    assert score_answers([record(0, False, None)] * 2)["majority"] == 0


def test_one_right_answer_does_not_make_a_majority_of_wrong_ones_right():
    """Of fifteen answers 50 and one 50 %, to the gold answer 1/2: without their units they are one text."""
    group = [record(0, False, "50")] * 15 + [record(0, True, r"50\%")]
    assert score_answers(group)["majority"] == 0
    assert score_answers(group[-1:] * 16 + group[:15])["majority"] == 1


def test_interval_covers_the_true_accuracy_95_times_of_100():
    """Simulated; and it is not a point where every answer is right, as accuracy +- 1.96 se would be."""
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        low, high = score_answers([record(i, rng.random() < 0.3) for i in range(60)])["interval"]
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 1000 <= 0.975
    low, high = wilson(1.0, 20)
    assert low == pytest.approx(0.8389, abs=1e-4)
    assert high == pytest.approx(1.0)


def test_interval_contains_its_share_in_spite_of_rounding():
    """The curve's error bars are the distances of the share to both ends, and may not be negative."""
    for n in range(1, 2000):
        for p in (0.0, 1 / n, 1 - 1 / n, 1.0):
            low, high = wilson(p, n)
            assert 0 <= low <= p <= high <= 1, (p, n)


def test_interval_of_many_answers_to_few_problems():
    """Few problems, equally hard by chance, are no more than 48 answers: coverage was 83 of 100."""
    rng = random.Random(0)
    covered = 0
    for _ in range(300):
        answers = [record(i, rng.random() < 0.5) for i in range(3) for _ in range(16)]
        low, high = score_answers(answers)["interval"]
        covered += low <= 0.5 <= high
    assert covered / 300 >= 0.93
    answers = [record(i, k < 8 + i) for i in range(2) for k in range(16)]
    assert score_answers(answers)["interval"] == wilson(17 / 32, 32)


def test_difference_is_paired():
    """On the same problems most of the chance cancels: here B is right where A is, and on eight more."""
    a = [record(i, i < 50) for i in range(100)]
    b = [record(i, i < 58) for i in range(100)]
    d = difference(a, b)
    assert d["difference"] == pytest.approx(0.08)
    assert (d["better"], d["worse"]) == (8, 0)
    assert d["p"] == pytest.approx(2 / 2**8)
    assert d["interval"][0] > 0
    same = {"difference": 0, "se": 0, "interval": [0, 0], "better": 0, "worse": 0, "p": 1.0}
    assert difference(a, a) == same


@pytest.mark.parametrize(
    "better, worse, p", [(8, 2, 0.109375), (5, 5, 1.0), (1, 0, 1.0), (10, 0, 0.001953125)]
)
def test_sign_test(better, worse, p):
    first = [record(i, i >= better) for i in range(better + worse)]
    second = [record(i, i < better) for i in range(better + worse)]
    assert difference(first, second)["p"] == pytest.approx(p)


def test_repeating():
    assert is_repeating("So it is 4. " + r"The answer is \boxed{4}. " * 12)
    assert not is_repeating("A short answer, 4.")
    assert not is_repeating("".join(f"step {i}, " for i in range(99)))


def test_the_table_has_the_warnings():
    odd = [record(0, False, verdict="gold unreadable", gold="???"), record(1, False, verdict="timed out")]
    text = format_scores(summarize({"A-x": {"gsm8k": odd}, "B-y": {"gsm8k": [record(0), record(1)]}}))
    assert "'???'" in text
    assert "1 answers were lost" in text
    assert "B-y - A-x, gsm8k: +100.0%" in text


def test_regrade_counts_verdicts_that_differ_and_leaves_the_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    records = [
        record(0, response="so 1"),
        record(1, response="so 2"),
        record(2, False, response=r"\boxed{3}"),
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    before = path.read_bytes()
    text = regrade(str(path), extract, boxed)
    assert "1 of 3 verdicts differ" in text and "33.3%" in text
    assert path.read_bytes() == before

    path.write_text("".join(json.dumps(one | {"problem": f"of {one['gold']}"}) + "\n" for one in records))
    other = json.dumps(records[0] | {"problem": "another"})
    path.write_text(f"{path.read_text()}{other}\n")
    with pytest.raises(BadInput, match="two problems of the index 0: grade the files .* one by one"):
        regrade(str(path), extract, boxed)
