"""Worker processes that grade: an answer that hangs or kills one costs that answer alone.

No signal interrupts a computation in C, so a worker that takes too long is killed; there is no other time
limit. No torch is imported, so that workers start fast.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from support import grading

COMMAND = [sys.executable, "-m", "support.workers"]
ROOT = Path(__file__).resolve().parents[1]
LOST = ("timed out", "worker died", "failed")  # verdicts about the grader, not about the answer


class Grader:
    """Verdicts from worker processes: an answer that hangs or kills a worker costs that answer alone.

    A process starts when an answer first needs one; most are decided as text or number. `extract(response)`
    gives the answer of a response or None; `boxed(text)` gives the content of each \\boxed{} in order.
    """

    def __init__(
        self,
        extract: Callable[[str], str | None],
        boxed: Callable[[str], list[str]],
        workers: int | None = None,
        seconds: float = 15.0,  # of wall time per answer, the start of a new worker included
    ):
        self.extract = extract
        self.boxed = boxed
        self.seconds = seconds
        workers = workers or os.cpu_count() or 1
        self.threads = ThreadPoolExecutor(workers)
        self.workers: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(workers):
            self.workers.put(None)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error) -> None:
        self.threads.shutdown()
        while not self.workers.empty():
            worker = self.workers.get()
            if worker:
                worker.kill()
                worker.communicate()

    def grade(self, responses: Iterable[str], golds: Iterable[str]) -> list[dict]:
        """For each response: extracted answer, verdict, and correctness by three rules of extraction."""
        return list(self.threads.map(self.verdict, responses, golds))

    def verdict(self, response: str, gold: str) -> dict:
        extracted = self.extract(response)
        boxes = self.boxed(grading.without_reasoning(response))
        last = boxes[-1] if boxes else extracted
        verdict = "no answer" if extracted is None else self.compare(extracted, gold)
        verdict_of_last = verdict if last == extracted else self.compare(last, gold)
        correct = verdict == "right"
        return {
            "extracted": extracted,
            "gold": gold,
            "verdict": verdict,
            "correct": correct,
            "correct_strict": correct and bool(boxes),
            "correct_last": verdict_of_last == "right",
        }

    def compare(self, found: str, gold: str) -> str:
        """`compare` in a worker, tried once more in case of a failure."""
        verdict = grading.compare_quickly(found, gold)[0] or self.ask_worker(found, gold)
        return self.ask_worker(found, gold) if verdict in ("worker died", "failed") else verdict

    def ask_worker(self, found: str, gold: str) -> str:
        """The verdict of a worker, or one of LOST."""
        worker = self.workers.get() or start_worker()
        alarm = threading.Timer(self.seconds, worker.kill)
        alarm.start()
        try:
            print(json.dumps([found, gold]), file=worker.stdin, flush=True)
            verdict = worker.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        in_time = alarm.is_alive()
        alarm.cancel()
        self.workers.put(worker if verdict else None)
        if verdict:
            return json.loads(verdict)
        worker.kill()
        worker.communicate()
        return "worker died" if in_time else "timed out"


def start_worker() -> subprocess.Popen:
    """A process that runs `work`; a Ctrl-C in the terminal does not reach it."""
    return subprocess.Popen(
        COMMAND,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@cache
def one_grader(extract: Callable[[str], str | None], boxed: Callable[[str], list[str]]) -> Grader:
    """The grader of single answers, which keeps its worker until this process ends."""
    return Grader(extract, boxed, workers=1)


if hasattr(os, "register_at_fork"):  # a child would share its parent's worker, and read the parent's verdicts
    os.register_at_fork(after_in_child=one_grader.cache_clear)


def work() -> None:
    """Read a line [found, gold], write a line with the verdict, within 4 GB of memory."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        try:
            verdict = grading.compare(*json.loads(line))
        except Exception:  # an error of math-verify says nothing about the answer
            verdict = "failed"
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    work()
