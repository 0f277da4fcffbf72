"""Equality of answers, table by table, and the worker processes, which no answer can stop."""

import subprocess
import sys
from pathlib import Path

import pytest

from eval_math import extract
from support import grading
from support.grading import Grader, compare

ROOT = Path(grading.__file__).parents[1]

# the answer of a response, the gold answer
EQUAL = {
    "integers": [("42", "42"), ("042", "42"), ("+7", "7"), ("x = 27.0", "27"), ("27.", "27")],
    "signs": [("-3", "-3"), ("−3", "-3"), ("–3", "-3"), ("-.5", "-1/2"), (r"\pm 2", "2,-2")],
    "fractions": [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\tfrac{1}{3}", r"\frac{1}{3}"),
        ("1/2", r"\frac12"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"\frac{7}{-4}", "-1.75"),
        (r"3\frac12", "3.5"),
        ("2 1/3", "7/3"),
        ("½", "0.5"),
        ("3½", "3.5"),
        (r"\frac{2}{4}", r"\frac{1}{2}"),
    ],
    "decimals": [
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("1.5e3", "1500"),
        (r"1\times10^3", "1000"),
        ("10^{-3}", "0.001"),
        (r"0.\overline{3}", r"\frac13"),
        (r"0.1\overline{6}", "1/6"),
    ],
    "commas": [("[0, 100]", "[0,100]"), ("(10, 250)", "(10,250)"), ("100, 200, 300", "100,200,300")],
    "percent": [(r"10\%", "10"), ("10", r"10\%"), ("0.1", r"10\%"), (r"25\%", r"\frac14")],
    "units": [
        (r"5 \text{ cm}", "5"),
        (r"5\,\text{cm}^2", "5"),
        (r"5 \mathrm{~m}", "5"),
        (r"5.0 \text{ m/s}", "5"),
        ("5 km/h", "5"),
        (r"\frac{3}{4} \text{ hours}", "0.75"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("90°", "90"),
        ("12 apples", "12"),
    ],
    "money": [(r"\$18", "18"), ("$18.00", "18"), ("18 dollars", "18"), ("£5", "5"), (r"\$32,348", "32,348")],
    "thousands": [("1,234", "1234"), ("1{,}000", "1000"), ("1,234,567", "1234567"), (r"1,\!000", "1000")],
    "intervals": [
        ("(1,2]", "(1,2]"),
        (r"[0, \infty)", r"[0,\infty)"),
        (r"x \in (1,2)", "(1,2)"),
        (r"(-\infty,3)\cup(5,\infty)", r"(-\infty, 3) \cup (5, \infty)"),
        ("[-1,1]", r"-1\le x\le 1"),
        (r"\mathbb{R}", r"(-\infty,\infty)"),
    ],
    "sets": [(r"\{2,1\}", r"\{1,2\}"), ("1,2", "2,1"), ("1, 2, 3", "1,2,3"), (r"4 \text{ and } 5", "4,5")],
    "tuples": [
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        ("(1, 2)", "(1,2)"),
        (r"(\frac12, 3)", "(0.5, 3)"),
    ],
    "matrices": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
    "roots": [
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("√(12)", r"2\sqrt3"),
        ("3 sqrt(2)", r"3\sqrt{2}"),
        (r"\sqrt[3]{8}", "2"),
        (r"1 \pm \sqrt{2}", r"1+\sqrt2,1-\sqrt2"),
    ],
    "pi": [("3π", r"3\pi"), ("3pi/2", r"\frac{3\pi}{2}"), (r"2\pi", "6.283185")],
    "algebra": [
        ("x^2+2x+1", "(x+1)^2"),
        ("x²+1", "x^2+1"),
        ("p-q", "p - q"),
        ("3 + 4i", "4i+3"),
        ("y = 2x+1", "2x+1"),
        ("5!", "120"),
        (r"\binom{5}{2}", "10"),
        ("2^{10}", "1024"),
    ],
    "text": [
        (r"\text{Evelyn}", "Evelyn"),
        ("evelyn", r"\text{Evelyn}"),
        (r"\text{Yes}", "yes"),
        (r"\textbf{even}", "even"),
    ],
    "choice": [("B", "(B)"), (r"\text{(B)}", "B"), ("(C) 12", "C"), ("C. 12", "C"), (r"\text{C}", "(C)")],
    "bases": [("11_2", "11_{2}")],
    "ratios": [("2:3", "2/3")],
}
DIFFERENT = {
    "commas": [("1,234", "(1,234)"), ("(1234)", "(1,234)"), ("1100", r"\{1,100\}")],
    "units": [
        ("2xy", "2ab"),
        ("7", "7xy"),
        ("1.5 million", "1.5"),
        ("2 hours", "2 minutes"),
        ("6 am", "6 pm"),
    ],
    "numbers": [("41", "42"), ("3", "-3"), ("0.333", r"\frac13"), ("1,2", "12"), ("1 2", "12")],
    "digits swapped between numerator and denominator": [(r"\frac{12}{3}", r"\frac{1}{23}")],
    "division by zero": [("1/0", "1"), (r"\frac{1}{0}", "0")],
    "repeating": [("0", r"0.\overline{3}"), ("0.3", r"0.\overline{3}")],
    "percent": [(r"10\%", "11"), ("0.2", r"10\%")],
    "two amounts": [(r"12\text{ dollars and }50", "12")],
    "order": [("(2,1)", "(1,2)"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}")],
    "open and closed": [("[1,2]", "(1,2]"), ("(-1,1)", "[-1,1]")],
    "one of several": [("2", "2,-2"), (r"\{1\}", r"\{1,2\}")],
    "bases": [("11_3", "11_2")],
    "choice": [("A", "B"), (r"\text{(A) and (B)}", "A"), ("(D) 12", "C")],
    "text": [("Tuesday", r"\text{Monday}"), (r"\text{odd}", r"\text{even}"), ("five", "6"), ("NaN", "42")],
    "infinity": [(r"-\infty", r"\infty"), ("1e999", "5")],
    "algebra": [("x^2+1", "(x+1)^2"), (r"2\sqrt{3}", r"\sqrt{13}"), (r"3\pi", "3")],
}


def rows(table):
    return [
        pytest.param(*pair, id=f"{name}-{i}") for name, pairs in table.items() for i, pair in enumerate(pairs)
    ]


def pairs_of(table):
    return [pair for pairs in table.values() for pair in pairs]


def test_table_sizes():
    assert len(pairs_of(EQUAL)) + len(pairs_of(DIFFERENT)) >= 115


@pytest.mark.parametrize("found, gold", rows(EQUAL))
def test_equal(found, gold):
    assert compare(found, gold) == "right"
    assert extract(rf"\boxed{{{found}}}") == found


@pytest.mark.parametrize("found, gold", rows(DIFFERENT))
def test_different(found, gold):
    assert compare(found, gold) == "wrong"
    assert extract(rf"\boxed{{{found}}}") == found


def test_unreadable_gold_is_reported():
    """A gold answer that math-verify cannot parse is not silently wrong; equal texts are right."""
    assert compare("5", r"\unknown{") == "gold unreadable"
    assert compare(r"\unknown{", r"\unknown{") == "right"


def test_imports_neither_torch_nor_the_project():
    """Workers start fast."""
    code = "import sys, grading; grading.compare('1', '1'); "
    code += "sys.exit(bool({'torch', 'support', 'math_verify'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "support").returncode == 0


def whole(response, last_box=False):
    """A rule of extraction: the response is the answer."""
    return response


def has_answer(response):
    return True


def test_a_worker_that_hangs_or_dies_costs_one_answer(tmp_path, monkeypatch):
    """Real processes: one answer puts its worker to sleep, another kills it; the others are graded."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import json, os, sys, time\nsys.path.insert(0, {str(ROOT / 'support')!r})\nimport grading\n"
        "for line in sys.stdin:\n    found, gold = json.loads(line)\n"
        "    time.sleep(1000) if found == 'hang' else os._exit(1) if found == 'die' else None\n"
        "    print(json.dumps(grading.compare(found, gold)), flush=True)\n"
    )
    monkeypatch.setattr(grading, "__file__", str(worker))
    found = ["hang", r"\sqrt{4}", "die", r"\sqrt{9}", "hang", "die", "x+1", "6"]
    gold = ["1", "2", "1", "3", "1", "1", "1+x", "6"]
    with Grader(whole, has_answer, workers=2, seconds=4) as grader:
        verdicts = [graded["verdict"] for graded in grader.grade(found, gold)]
        workers = [grader.workers.get(), grader.workers.get()]
        for process in workers:
            grader.workers.put(process)
    lost = {0: "timed out", 2: "worker died", 4: "timed out", 5: "worker died"}
    assert verdicts == [lost.get(i, "right") for i in range(8)]
    assert all(process.poll() is not None for process in workers if process)


def test_workers_give_the_verdicts_of_compare():
    with Grader(whole, has_answer, workers=1) as grader:
        graded = grader.grade(*zip(*pairs_of(EQUAL), *pairs_of(DIFFERENT)))
    verdicts = [one["verdict"] for one in graded]
    assert verdicts == ["right"] * len(pairs_of(EQUAL)) + ["wrong"] * len(pairs_of(DIFFERENT))


def test_a_signal_to_the_process_group_does_not_reach_the_workers(monkeypatch):
    """Ctrl-C goes to every process of a terminal's group; the run, and its grader, finish the step."""
    seen = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: seen.append(kwargs) or popen(*args, **kwargs)
    )
    with Grader(whole, has_answer, workers=1) as grader:
        assert grader.compare(r"\sqrt{4}", "2") == "right"
    assert seen[0]["start_new_session"]
