"""The processes that grade, which no answer can stop."""

import subprocess
import sys

import pytest

from support import workers
from support.grading import compare
from support.workers import Grader


def test_neither_torch_nor_math_verify_is_imported_before_it_is_needed():
    """Workers start fast."""
    code = "import sys; from support import grading, workers; grading.compare('1', '01'); "
    code += "sys.exit(bool({'torch', 'sympy', 'math_verify'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=workers.ROOT).returncode == 0


def whole(response):
    """A rule of extraction: the response is the answer."""
    return response


def no_boxes(text):
    return []


@pytest.mark.slow
def test_a_worker_that_hangs_or_dies_costs_one_answer(tmp_path, monkeypatch):
    """Real processes: one answer puts its worker to sleep, another kills it; the others are graded."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import json, os, sys, time\nsys.path.insert(0, {str(workers.ROOT)!r})\n"
        "from support import grading\nfor line in sys.stdin:\n    found, gold = json.loads(line)\n"
        "    time.sleep(1000) if found == 'h+1' else os._exit(1) if found == 'd+1' else None\n"
        "    print(json.dumps(grading.compare(found, gold)), flush=True)\n"
    )
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, str(worker)])
    found = ["h+1", r"\sqrt{4}", "d+1", r"\sqrt{9}", "h+1", "d+1", "x+1", "6"]
    gold = ["1", "2", "1", "3", "1", "1", "1+x", "6"]
    with Grader(whole, no_boxes, workers=2, seconds=4) as grader:
        verdicts = [graded["verdict"] for graded in grader.grade(found, gold)]
        processes = [grader.workers.get(), grader.workers.get()]
        for process in processes:
            grader.workers.put(process)
    lost = {0: "timed out", 2: "worker died", 4: "timed out", 5: "worker died"}
    assert verdicts == [lost.get(i, "right") for i in range(8)]
    assert all(process.poll() is not None for process in processes if process)


def test_a_failure_of_math_verify_is_tried_again_and_lost(tmp_path, monkeypatch):
    """Not wrong: an exception in the comparison says nothing about the answer. The worker goes on."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys\nsys.path.insert(0, {str(workers.ROOT)!r})\nfrom support import grading, workers\n"
        "calls = []\ndef equal(gold, found, rounded):\n    calls.append(found)\n"
        "    if str(found) == 'x + 7' or (str(found) == 'x + 8' and len(calls) == 4):\n"
        "        raise ValueError\n    return True\n"
        "grading.equal = equal\nworkers.work()\n"
    )
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, str(worker)])
    with Grader(whole, no_boxes, workers=1) as grader:
        verdicts = [graded["verdict"] for graded in grader.grade(["x+9", "x+7", "x+8", "x+9"], ["9+x"] * 4)]
    assert verdicts == ["right", "failed", "right", "right"]


@pytest.mark.slow
def test_the_worker_is_the_only_clock(monkeypatch):
    """An inner limit of wall time made right answers wrong on a busy machine; a signal fails in a thread."""
    import signal

    monkeypatch.setattr(signal, "alarm", lambda seconds: pytest.fail("an inner clock"))
    assert compare(r"\{x : x > 1\}", r"(1, \infty)") == "right"
    with Grader(whole, no_boxes, workers=1, seconds=3) as grader:
        assert grader.verdict("9^{9^{9^{9}}}", "42")["verdict"] == "timed out"


def test_workers_give_the_verdicts_of_compare():
    found, gold = ["5", "x+1", "x+1", "x+1"], ["5.0", "1+x", "x-1", r"\unknown{"]
    with Grader(whole, no_boxes, workers=1) as grader:
        verdicts = [graded["verdict"] for graded in grader.grade(found, gold)]
    assert verdicts == list(map(compare, found, gold)) == ["right", "right", "wrong", "gold unreadable"]


def test_a_signal_to_the_process_group_does_not_reach_the_workers(monkeypatch):
    """Ctrl-C goes to every process of a terminal's group; the run, and its grader, finish the step."""
    seen = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: seen.append(kwargs) or popen(*args, **kwargs)
    )
    with Grader(whole, no_boxes, workers=1) as grader:
        assert grader.compare(r"\sqrt{4}", "2") == "right"
    assert seen[0]["start_new_session"]
