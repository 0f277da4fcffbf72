r"""Is this answer right? What a response says its answer is, and whether that equals the gold answer.

    is_correct(r"... so it is \boxed{\frac12}", "0.5")   True

Equality is tried by text, by number, then by math-verify. No torch here. `Grader` asks in worker processes
(`python grading.py`), because no signal reaches a sum that runs in C: a worker that hangs is killed.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

LONGEST = 500  # characters of an answer; what is longer is no answer
UNICODE = {"−": "-", "–": "-", "²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34"}
UNICODE |= {"×": r"\times ", "·": r"\cdot ", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "°": ""}
UNICODE |= {"≤": r"\le ", "≥": r"\ge ", "√": r"\sqrt "}
# A number and its unit, "18 dollars", "5 \\text{ cm}^2", "7km"; but "3 pi" and "2 million" are other numbers.
NO_UNIT = r"pi\b|and\b|or\b|times|dozen|hundred|thousand|[mb]illion"
WORDS = rf"(?!{NO_UNIT})[A-Za-z]{{2}}[A-Za-z/ ]*"
IN_TEXT = rf"\\(?:text|mathrm|mbox)\s*\{{[~\s]*((?!{NO_UNIT})[^{{}}\d]*)\}}(?:\^\{{?\d\}}?)?"
AMOUNT = re.compile(rf"([-+]?[\d.,/]*\d)\s*(?:{IN_TEXT}|(?<=\s)({WORDS})|([ckm]m|kg|ft))")


def boxed(text: str) -> list[str]:
    r"""What each \boxed{...} holds, braces balanced, in the order in which they close; none if empty."""
    found, opened = [], []
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]", text):
        if match[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box and 0 < len(content := text[start : match.start()].strip()) <= LONGEST:
                found.append(content)
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append((match[0] != "{", match.end()))
    return found


def after_hashes(text: str) -> list[str]:
    found = re.findall(r"(?<!#)####(?!#)[ \t]*(\S[^\n]{0,200})", text)  # how GSM8K writes it
    return [answer for answer in found if re.search(r"\d", answer.split()[0])]  # no heading of a section


def after_phrase(text: str) -> list[str]:
    end = r"\.\s|\.?\**[ \t]{0,20}$|\n|,\s(?=[a-z]{2})"
    found = re.findall(rf"answer(?: is|:| =)[\s:*]{{0,20}}(.{{1,200}}?)(?:{end})", text, re.I | re.M)
    return [answer.strip(" *.") for answer in found]


def last_number(text: str) -> list[str]:
    return re.findall(r"(?<![\d.])-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)[-1:]


def extract(response: str, last_box: bool = False) -> str | None:
    r"""The final answer: the first that the first of these rules finds, None if none does.

    \boxed{x}, "#### x", "the answer is x", the last number. The first box, not the last: a student that never
    learned to stop goes on after its answer and repeats boxes; `last_box` shows what that would have cost.
    """
    for rule in (boxed, after_hashes, after_phrase, last_number):
        if found := rule(response):
            return found[-1 if last_box and rule is boxed else 0]
    return None


def is_correct(response: str, answer: str) -> bool:
    """The whole grader: whether the answer that `response` gives equals `answer`."""
    found = extract(response)
    return found is not None and compare(found, answer) == "right"


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
    """By text and by number, which settles most answers in microseconds; None where mathematics is needed."""
    if len(found) > LONGEST:
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
    """Verdicts by worker processes: an answer that hangs one, or kills one, costs that answer alone.

    The processes start when an answer first needs them: most are settled by text and number.
    """

    def __init__(self, workers: int | None = None, seconds: float = 15.0):
        self.seconds = seconds  # of wall time per answer, a new worker's start included
        workers = workers or os.cpu_count() or 1
        self.threads, self.workers = ThreadPoolExecutor(workers), queue.SimpleQueue()
        for _ in range(workers):
            self.workers.put(None)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error) -> None:
        self.threads.shutdown()
        while not self.workers.empty():
            if worker := self.workers.get():
                worker.kill()
                worker.communicate()

    def grade(self, responses: Iterable[str], golds: Iterable[str]) -> list[dict]:
        """For each response: extracted, verdict, correct, and correct by stricter and looser extraction."""
        return list(self.threads.map(self.verdict, responses, golds))

    def verdict(self, response: str, gold: str) -> dict:
        found, last = extract(response), extract(response, last_box=True)
        verdict = "no answer" if found is None else self.compare(found, gold)
        by_last = verdict if last == found else self.compare(last, gold)
        correct = verdict == "right"
        seen = {"extracted": found, "gold": gold, "verdict": verdict, "correct": correct}
        return seen | {
            "correct_strict": correct and bool(boxed(response)),
            "correct_last": by_last == "right",
        }

    def compare(self, found: str, gold: str) -> str:
        """`compare` in a worker; 'timed out' or 'worker died' where it gave no verdict."""
        if (quick := compare_quickly(found, gold)) is not None:
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
        in_time, _ = alarm.is_alive(), alarm.cancel()
        self.workers.put(worker if verdict else None)
        if verdict:
            return json.loads(verdict)
        worker.kill()
        worker.communicate()
        return "worker died" if in_time else "timed out"


def work() -> None:
    """Read [found, gold] a line, write the verdict a line; in 4 GB: no answer takes the machine down."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        print(json.dumps(compare(*json.loads(line))), flush=True)


if __name__ == "__main__":
    work()
