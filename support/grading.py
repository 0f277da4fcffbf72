"""Whether an extracted answer equals the gold answer: by text, by number, then by math-verify.

`Grader` compares in worker processes (`python support/grading.py`), because no signal interrupts a
computation in C: a worker that hangs is killed. No torch and no import of this project, so that workers start
fast.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

LONGEST_ANSWER = 500  # characters of an answer; longer text is not compared
UNICODE = {"−": "-", "–": "-", "²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34"}
UNICODE |= {"×": r"\times ", "·": r"\cdot ", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "°": ""}
UNICODE |= {"≤": r"\le ", "≥": r"\ge ", "√": r"\sqrt "}
# A number and its unit, "18 dollars", "5 \\text{ cm}^2", "7km"; but "3 pi" and "2 million" are other numbers.
NO_UNIT = r"pi\b|and\b|or\b|times|dozen|hundred|thousand|[mb]illion"
WORDS = rf"(?!{NO_UNIT})[A-Za-z]{{2}}[A-Za-z/ ]*"
IN_TEXT = rf"\\(?:text|mathrm|mbox)\s*\{{[~\s]*((?!{NO_UNIT})[^{{}}\d]*)\}}(?:\^\{{?\d\}}?)?"
AMOUNT = re.compile(rf"([-+]?[\d.,/]*\d)\s*(?:{IN_TEXT}|(?<=\s)({WORDS})|([ckm]m|kg|ft))")


def compare(found: str, gold: str) -> str:
    """'right', 'wrong', or 'gold unreadable' where the texts differ and math-verify cannot read the gold."""
    if (quick := compare_quickly(found, gold)) is not None:
        return quick
    from math_verify import parse, verify

    gold_math = parse(f"${clean(gold)[0]}$", parsing_timeout=2)
    if all(isinstance(expression, str) for expression in gold_math):
        return "gold unreadable"
    found_math = parse(f"${clean(found)[0]}$", parsing_timeout=2)
    equal = verify(gold_math, found_math, timeout_seconds=2)  # gold first: verify is not symmetric
    return "right" if equal else "wrong"


def compare_quickly(found: str, gold: str) -> str | None:
    """By text and by number, which decides most answers in microseconds; None where math-verify is needed."""
    if len(found) > LONGEST_ANSWER:
        return "wrong"
    if without_spaces(found) == without_spaces(gold):
        return "right"
    units = clean(found)[1], clean(gold)[1]
    if all(units) and units[0][0] != units[1][0]:
        return "wrong"  # 2 hours are not 2 minutes; cm may be spelled out
    ours, theirs = plain(found), plain(gold)
    if ours == theirs:
        return "right"
    if re.fullmatch(r"[a-j]", theirs) and (choice := re.match(r"\(?([a-j])[).:](?!.*\([a-j]\))", ours)):
        return "right" if choice[1] == theirs else "wrong"
    if "_" in theirs and "_" in ours and ours.rpartition("_")[2] != theirs.rpartition("_")[2]:
        return "wrong"  # 11 in base 2 and in base 3: math-verify drops the base
    numbers = number(ours), number(theirs)
    if None in numbers or (numbers[0] != numbers[1] and "%" in found + gold):
        return None
    return "right" if numbers[0] == numbers[1] else "wrong"


def number(text: str) -> Fraction | None:
    """The value of a decimal, of a/b and of 1.5e3, texts as `plain` leaves them; None for anything else."""
    if fraction := re.fullmatch(r"(-?)\\frac(\d|\{\d+\})(\d|\{\d+\})", text):
        sign, above, below = (part.strip("{}") for part in fraction.groups())
        text = f"{sign}{above}/{below}"
    if re.fullmatch(
        r"[+-]?(\d{1,100}(\.\d{0,100})?|\.\d{1,100})(e[+-]?\d{1,3})?|-?\d{1,100}/\d*[1-9]\d*", text
    ):
        return Fraction(text)
    return None


def from_repeating(match: re.Match) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}"""
    whole, once, period = match.groups()
    scale = 10 ** len(once)
    value = int(whole + once or 0) * (10 ** len(period) - 1) + int(period)
    return rf"\frac{{{value}}}{{{scale * (10 ** len(period) - 1)}}}"


def clean(text: str) -> tuple[str, str]:
    """Text for math-verify, Unicode signs as LaTeX, no money sign; and apart the unit after a number."""
    text = unicodedata.normalize("NFKC", "".join(UNICODE.get(sign, sign) for sign in text))
    text = re.sub(r"\\?\$|[£€]|\\[,!;]|\\(?:left|right)(?![a-z])|\^\s*\{?\\circ\}?", "", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|sqrt)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = text.replace("{,}", ",").strip().rstrip(".")
    text = re.sub(r"(\d{0,50})\.(\d{0,50})\\overline\{?(\d{1,50})\}?", from_repeating, text)
    text = re.sub(r"^(-?\d{1,50}) (\d{1,50})/(\d{1,50})$", r"\1\\frac{\2}{\3}", text)  # 2 1/3
    unit = ""
    if amount := AMOUNT.fullmatch(text):
        text, unit = amount[1], (amount[2] or amount[3] or amount[4] or "").strip().lower()
    if re.fullmatch(
        r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text
    ):  # thousands; in (1,234) the comma parts two numbers
        text = text.replace(",", "")
    return text, unit


def plain(text: str) -> str:
    """Text without what never changes an answer: sizes, spaces, text wrappers, percent sign, case."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", clean(text)[0])
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = without_spaces(re.sub(r"\\?%|\\ ", "", text))
    return re.sub(r"\{(\w)\}", r"\1", text).lower().removesuffix(".")


def without_spaces(text: str) -> str:
    """But those between two digits: 2 1/3 is not 21/3."""
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", text)


class Grader:
    """Verdicts from worker processes: an answer that hangs or kills a worker costs that answer alone.

    The processes start when an answer first needs one: text and number decide most. `extract(response,
    last_box)` gives the answer of a response or None; `has_box(response)` says whether it has a \\boxed{}.
    """

    def __init__(
        self,
        extract: Callable[..., str | None],
        has_box: Callable[[str], bool],
        workers: int | None = None,
        seconds: float = 15.0,  # of wall time per answer, the start of a new worker included
    ):
        self.extract = extract
        self.has_box = has_box
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
        last = self.extract(response, last_box=True)
        verdict = "no answer" if extracted is None else self.compare(extracted, gold)
        verdict_of_last = verdict if last == extracted else self.compare(last, gold)
        correct = verdict == "right"
        return {
            "extracted": extracted,
            "gold": gold,
            "verdict": verdict,
            "correct": correct,
            "correct_strict": correct and self.has_box(response),
            "correct_last": verdict_of_last == "right",
        }

    def compare(self, found: str, gold: str) -> str:
        """`compare` in a worker; 'timed out' or 'worker died' where it gave no verdict."""
        quick = compare_quickly(found, gold)
        if quick is not None:
            return quick
        worker = self.workers.get() or subprocess.Popen(
            [sys.executable, __file__], stdin=-1, stdout=-1, stderr=-3, text=True, start_new_session=True
        )
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


def work() -> None:
    """Read a line [found, gold], write a line with the verdict, within 4 GB of memory."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        print(json.dumps(compare(*json.loads(line))), flush=True)


if __name__ == "__main__":
    work()
