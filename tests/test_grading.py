"""The grader, table by table. It needs no torch, never hangs, and a hostile answer costs itself alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import grading
from grading import Grader, boxed, compare, extract, is_correct

ROOT = Path(grading.__file__).parent

# what the response says, the gold answer
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


def rows(table):
    return [
        pytest.param(*pair, id=f"{name}-{i}") for name, pairs in table.items() for i, pair in enumerate(pairs)
    ]


def test_the_table_is_long_enough():
    assert len(rows(EQUAL)) + len(rows(DIFFERENT)) + len(EXTRACTED) >= 140


@pytest.mark.parametrize("found, gold", rows(EQUAL))
def test_equal(found, gold):
    assert compare(found, gold) == "right" and is_correct(rf"\boxed{{{found}}}", gold)


@pytest.mark.parametrize("found, gold", rows(DIFFERENT))
def test_different(found, gold):
    assert compare(found, gold) == "wrong" and not is_correct(rf"\boxed{{{found}}}", gold)


@pytest.mark.parametrize("response, answer", EXTRACTED)
def test_extracted(response, answer):
    assert extract(response) == answer


def test_first_box_and_last_box():
    """A reported collapse of full rollouts was a last-box extractor reading what came after the answer."""
    response = r"\boxed{7}. Again: \boxed{8}"
    assert (extract(response), extract(response, last_box=True)) == ("7", "8")
    assert boxed(r"\boxed{1} \fbox{2} {\boxed {3}}") == ["1", "2", "3"]


@pytest.mark.parametrize("response", HOSTILE)
def test_hostile_text_is_wrong_in_bounded_time(response):
    started = time.time()
    assert not is_correct(response, "42")
    assert time.time() - started < 10


def test_gold_that_cannot_be_read_is_named():
    """Not scored as wrong in silence; where the texts agree it counts."""
    assert compare("5", r"\unknown{") == "gold unreadable" and compare(r"\unknown{", r"\unknown{") == "right"


def test_imports_without_torch():
    code = "import sys, eval_math; eval_math.is_correct('1', '1'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_worker_that_hangs_or_dies_costs_one_answer(tmp_path, monkeypatch):
    """Real processes: one answer puts its worker to sleep for ever, another kills it; the rest are graded."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import json, os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport grading\n"
        "for line in sys.stdin:\n    found, gold = json.loads(line)\n"
        "    time.sleep(1000) if found == 'hang' else os._exit(1) if found == 'die' else None\n"
        "    print(json.dumps(grading.compare(found, gold)), flush=True)\n"
    )
    monkeypatch.setattr(grading, "__file__", str(worker))
    found = ["hang", r"\sqrt{4}", "die", r"\sqrt{9}", "hang", "die", "x+1", "6"]
    gold = ["1", "2", "1", "3", "1", "1", "1+x", "6"]
    with Grader(workers=2, seconds=4) as grader:
        verdicts = [v["verdict"] for v in grader.grade([rf"\boxed{{{f}}}" for f in found], gold)]
        processes = [w for w in (grader.workers.get(), grader.workers.get()) if w]
        for process in processes:
            grader.workers.put(process)
    lost = {0: "timed out", 2: "worker died", 4: "timed out", 5: "worker died"}
    assert verdicts == [lost.get(i, "right") for i in range(8)]
    assert all(process.poll() is not None for process in processes)


def test_grader_agrees_with_is_correct():
    pairs = [
        (rf"\boxed{{{f}}}", g) for table in (EQUAL, DIFFERENT) for group in table.values() for f, g in group
    ]
    with Grader(workers=1) as grader:
        seen = grader.grade(*zip(*pairs))
        other = grader.grade(["#### 5", r"\boxed{5} \boxed{6}", "no"], ["5", "5", "5"])
    assert [v["correct"] for v in seen] == [is_correct(*pair) for pair in pairs]
    assert [v["correct_strict"] for v in other] == [False, True, False]
    assert [v["correct_last"] for v in other] == [True, False, False]
    assert other[2]["verdict"] == "no answer" and other[2]["extracted"] is None


def test_a_signal_to_the_terminals_group_does_not_reach_the_workers(monkeypatch):
    """Ctrl-C goes to every process of a terminal's group; the run finishes its step, so must its grader."""
    seen, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **kw: seen.append(kw) or popen(*a, **kw))
    with Grader(workers=1) as grader:
        assert grader.compare(r"\sqrt{4}", "2") == "right"
    assert seen[0]["start_new_session"]
