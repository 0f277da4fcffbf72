"""The grader, table by table. It must import without torch and never hang."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval_math

ROOT = Path(eval_math.__file__).parent

RIGHT = [
    (r"so \boxed{42}", "42"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac{1}{2}}", r"\frac12"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed{\$18}", "18"),
    (r"\boxed{-3}", "-3"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    (r"\boxed{\{1, 2\}}", r"\{2,1\}"),
    (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"first \boxed{7} and then, never stopping, \boxed{8}", "7"),
    ("6 * 7 = 42\n#### 42", "42"),
    ("The answer is 42.", "42"),
    ("That makes 40 and 2, so 42", "42"),
    ("x = 27.0", "27"),
]
WRONG = [
    (r"\boxed{41}", "42"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{}", "42"),
    (r"\boxed{42", "43"),
    ("", "42"),
    ("I do not know", "42"),
    (r"\boxed{NaN}", "42"),
]
HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    "{" * 100_000,
    r"\boxed{" * 20_000,
    r"\boxed{" + "(" * 400 + "}",
    "9" * 100_000,
]


@pytest.mark.parametrize("response, answer", RIGHT)
def test_right(response, answer):
    assert eval_math.is_correct(response, answer)


@pytest.mark.parametrize("response, answer", WRONG)
def test_wrong(response, answer):
    assert not eval_math.is_correct(response, answer)


@pytest.mark.parametrize("response", HOSTILE)
def test_hostile_text_is_wrong_in_bounded_time(response):
    started = time.time()
    assert not eval_math.is_correct(response, "42")
    assert time.time() - started < 15


def test_imports_without_torch():
    code = "import sys, eval_math; eval_math.is_correct('1', '1'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_score():
    record = {"correct": True, "finished": True, "extracted": "1", "length": 4}
    score = eval_math.score(
        [record, record, record | {"correct": False, "finished": False, "extracted": None}]
    )
    assert score["accuracy"] == pytest.approx(2 / 3) and score["n"] == 3
    assert score["se"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert score["truncated"] == score["no_answer"] == pytest.approx(1 / 3)


def test_command_line(world, tmp_path, monkeypatch, capsys):
    flags = ["--model", world / "teacher", "--data", world, "--limit", 20, "--max-new-tokens", 128]
    flags += ["--instruction", "", "--out", tmp_path / "responses.jsonl"]
    monkeypatch.setattr(sys, "argv", ["eval_math.py", *map(str, flags)])
    eval_math.main()
    assert "n = 20" in capsys.readouterr().out
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 20
