r"""Whether an extracted answer equals the gold answer: by text, by exact number, then with math-verify.

`Grader` compares in worker processes (`python support/grading.py`), because no signal interrupts a
computation in C: a worker that hangs is killed. No torch and no import of this project, so that workers start
fast. Where mathematics does not decide, this table does:

| kind | rule |
|---|---|
| units | one that is left out is accepted, on either side; two must be the same; none is converted |
| percent | 50\% is 50 and 1/2; without a sign, 50 is not 1/2 |
| decimals | equal an irrational number within 1e-6 of its value, and a fraction exactly |
| lists, sets | in any order, "or" and "and" are commas; tuples, intervals and matrices in their order |
| names | in x = 5, f(x) = 2x, x \in (0, 1) the name may be left out, but two names must be the same |
| choices | the letter decides, as in (B) 12; where one has no letter, the text after it |
| bases | 101_2 needs its base, and is not converted |
| a:b | the fraction a/b; longer ratios are compared as text |
| words | compared as text, upper and lower case alike; so is all that math-verify cannot read whole |
| gold unreadable | the texts differ, and math-verify cannot read the gold: not correct, and reported |
| several boxes | the first that is not blank counts; `correct_last` shows the last |
| reasoning | only what follows the last </think> is graded; an unclosed <think> has no answer |
| prose | around a single formula or number it is dropped; other prose with numbers is no answer |
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache, lru_cache
from itertools import accumulate

LONGEST_ANSWER = 500  # characters of an answer; longer text is not compared
LONGEST_RESPONSE = 200_000  # characters of a response; what follows is not searched for an answer
LOST = ("timed out", "worker died", "failed")  # verdicts about the grader, not about the answer

# Other spellings of the same: signs, then patterns and their replacements.
SIGNS = {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "×": r"\times ", "·": r"\cdot "}
SIGNS |= {"÷": "/", "⁄": "/", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "∪": r"\cup ", "∈": r"\in "}
SIGNS |= {"≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "√": r"\sqrt ", "∛": r"\sqrt[3] "}
SIGNS |= {"°": r"^\circ ", "∅": r"\emptyset ", "′": "'", "″": "''", "\u00a0": " ", "\u202f": " "}
SIGNS |= dict.fromkeys("−–‐‑﹣", "-") | {chr(0xFEE0 + i): chr(i) for i in range(33, 127)}  # full width
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
SPELLINGS = (
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: f"^{{{found[0].translate(SMALL)}}}"),
    (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda found: f"_{{{found[0].translate(SMALL)}}}"),
    (r"\\(?:left|right|displaystyle|boldsymbol|mathbf|bm|underline)(?![a-z])|(?<!\\)\\[!:;]|\*\*", ""),
    (r"(?<!\\)\\[, ]|\\q?quad(?![a-z])|~", " "),
    (r"\\(?:mbox|mathrm|text(?:bf|it|rm|up))(?![a-z])", r"\\text"),
    (r"\\text\s*(?:\{\s*(\(?\w\)?|[-\d.,\s]*\d)\s*\}|(\w))", r" \1\2"),  # \mathrm e, \text{13}, \textbf{(C)}
    (r"(?:,\s*)?(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (r"\{,\}", ","),
    (r"\\(?:[dtcs]|nice)frac(?![a-z])", r"\\frac"),
    (r"\b[Ii]nfinity\b", r"\\infty "),
    (r"(?<![\\A-Za-z])(pi|sqrt|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"\\sqrt\s*(\[\d\])?\s*(\d+|\((?:[^()]|\([^()]*\))*\))", r"\\sqrt\1{\2}"),
    (r"\\lg(?![a-z])", r"\\log"),
    (r"\bC\((\d+),\s*(\d+)\)|\{?(\w+)\s*\\choose\s*(\w+)\}?", r"\\binom{\1\3}{\2\4}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d{1,50})\}?", lambda found: from_repeating(*found.groups())),
    (r"\\\{\s*[a-z]\s*(?::|\||\\mid)([^{}]*)\\\}", r"\1"),  # {x : x > 1}
    (r"^\s*\](.*)\[\s*$", r"(\1)"),  # ]0, 1[
    (r"^\s*\\approx", ""),
)
WRAPPED = re.compile(r"\$(.*)\$|\\\[(.*)\\\]|\\\((.*)\\\)|(?:\\text\s*)?\{(.*)\}", re.S)
NAME = re.compile(  # "x =", "f(x) =", "(x, y) =", "x \in", "m\angle A =", "\text{Area} ="
    r"(?:^|(?<=,))\s*((?:m?\s*\\angle\s*)?\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([a-z]\))?|\\text\s*\{[^{}]*\}"
    r"|\([a-z](?:,\s*[a-z])*\))\s*(?:=|\\in(?![a-z])|\\approx)"
)
CHOICE = re.compile(r"(?:option )?(?:\(([a-j])\)|([a-j])(?=[).:]|$))[).:]?\s*((?![-+*/^=_,]).*)", re.I | re.S)

UNITS = """m meter metre, km kilometer kilometre, cm centimeter centimetre, mm millimeter millimetre, yd yard,
in inch inche, ft foot feet, mi mile, g gram, kg kilogram, mg milligram, lb pound £, oz ounce, l liter litre,
ml milliliter millilitre, h hr hour, min minute, s sec second, $ usd dollar, ¢ cent, € eur euro, ₹ rupee,
° circ deg degree, ^2 square sq, ^3 cubic, / per"""
UNIT_NAMES = {name: names.split()[0] for names in UNITS.split(",") for name in names.split()}
SHORT_UNITS = r"(?:cm|mm|km|kg|mg|ml|ft|in|lb|oz|yd|mi|hr|mph|st|nd|rd|th)(?![A-Za-z])"
NO_UNIT = r"\s*(?:and|or|times|dozen|hundred|thousand|[mbtr]+illion|remainder|more|mod)(?![a-z])"
AMOUNT = re.compile(  # a number or formula, and the unit after it
    rf"(.*?(?:[\d)}}!%]|\\pi))(\s*(?:'{{1,2}}|\\?\$|[€£₹¢])|\s*\\text\s*\{{(?!{NO_UNIT})[^{{}}\d]*\}}"
    rf"|\s*\^\s*\{{?\s*\\circ\s*\}}?\s*(?:\\text\s*)?\{{?[CF]?\}}?|{SHORT_UNITS}"
    rf"|\s+\(?(?!{NO_UNIT})(?:{SHORT_UNITS}|[aApP]\.?[mM]\b|[mghsl]\b|[A-Za-z]{{3,}})[A-Za-z./ ]*\)?)"
    r"(\^\{?[23]\}?)?",
    re.S,
)
MONEY = re.compile(r"(-?)\s*(\\?\$|[€£₹]|USD)\s*(-?[\d.].*)", re.S)

DECIMAL = r"(?:(?:\d{1,3}(?:[ ,]\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
POWER = r"10\s*\^\s*\{?\s*([-+]?\d{1,4})\s*\}?"
TIMES_POWER = rf"\s*(?:\\times|\\cdot|\*)\s*{POWER}|\s*e([-+]?\d{{1,4}})"
SCIENTIFIC = re.compile(rf"([-+]?{DECIMAL})(?:{TIMES_POWER})?|{POWER}", re.I)
FRAC = rf"\\frac\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d))"
FRACTION = re.compile(
    rf"([-+]?)\s*(?:(\d+)(?:\s+(?=\d)|\s*(?=\\)))?(?:{FRAC}|({DECIMAL})\s*[/:]\s*({DECIMAL}))"
)
# Words, and what latex2sympy misreads: it adds two numbers side by side, and drops a base or an ellipsis.
NOT_MATHEMATICS = re.compile(
    r"(?<![\\A-Za-z])(?<!n\{)(?<!d\{)(?:[A-Za-z]{4}|[A-Z][a-z]{2})|\\(?:text|operatorname|angle|gcd|lcm|[bp]?mod|[lcdv]?dots)(?![a-z])"
    r"|(?<!_)\d\s+[\d.]|[\d}]_|:.*:"
)
BLANK = re.compile(r"(?:\\[hv]?phantom\s*\{[^{}]*\}|\\text\s*\{|\\q?quad|\\[,;: ]|[?_.…~{}\s]|answer)*", re.I)


def without_reasoning(response: str) -> str:
    """What follows the last </think>; nothing if a <think> was not closed."""
    text = response.rpartition("</think>")[2]
    return "" if "<think>" in text else text[:LONGEST_RESPONSE]


def is_blank(answer: str) -> bool:
    r"""Whether it only marks where an answer goes: \boxed{?}, \boxed{\phantom{2}}, \boxed{answer}."""
    return BLANK.fullmatch(answer) is not None


def without_prose(sentence: str) -> str | None:
    """The answer in the rest of a sentence: 12 in "therefore 12", but None in "add 2 and 3"."""
    if not re.match(r"(?!sqrt|sin|cos|tan|log)[A-Za-z]{3,}[ ,]", sentence):
        return sentence or None
    formulas = re.findall(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", sentence)
    formulas = formulas or re.findall(r"[-−]?\$?\d[\d,./]*", sentence)
    if len(formulas) == 1:
        return formulas[0]
    return None if formulas or sentence.endswith(":") else sentence


def compare(found: str, gold: str) -> str:
    """'right', 'wrong' or 'gold unreadable'. It may take forever, and math-verify may raise anything."""
    verdict, found, gold = compare_quickly(found, gold)
    if verdict:
        return verdict
    gold_read, found_read = read(gold), read(found)
    if gold_read is None:
        return "gold unreadable"
    return "right" if found_read is not None and equal(gold_read, found_read) else "wrong"


def compare_quickly(found: str, gold: str) -> tuple[str | None, str, str]:
    """The verdict by text and by number, in microseconds; or None, and the two formulas to compare."""
    if found.strip() == gold.strip():
        return "right", found, gold
    if max(len(found), len(gold)) > LONGEST_ANSWER:
        return "wrong" if len(gold) <= LONGEST_ANSWER else "gold unreadable", found, gold
    found, gold = tidy(found), tidy(gold)
    ours, theirs = CHOICE.fullmatch(found), CHOICE.fullmatch(gold)
    if ours and theirs and not re.search(r"\([a-j]\)", ours[3] + theirs[3], re.I):
        same = (ours[1] or ours[2]).lower() == (theirs[1] or theirs[2]).lower()
        return "right" if same else "wrong", found, gold
    gold = theirs[3] if theirs and theirs[3] else gold
    names = NAME.findall(found), NAME.findall(gold)
    if names[0] == names[1] or not (all(names) or "=" in found and "=" in gold):
        found, gold = NAME.sub("", found), NAME.sub("", gold)
    (found, unit), (gold, other_unit) = split_unit(found), split_unit(gold)
    if unit and other_unit and unit != other_unit:
        return "wrong", found, gold
    same = same_number(found, gold)
    found, gold = found.rstrip("%\\ "), gold.rstrip("%\\ ")
    if same or squeeze(found) == squeeze(gold):
        return "right", found, gold
    set_and_tuple = sorted(text.lstrip("\\")[:1] for text in (found, gold)) == ["(", "{"]
    if same is False or set_and_tuple or NOT_MATHEMATICS.search(found) or NOT_MATHEMATICS.search(gold):
        return "wrong", found, gold
    return None, found, gold


def tidy(text: str) -> str:
    """One spelling of signs, fonts, spaces and roots, without what surrounds the answer."""
    text = unwrap("".join(SIGNS.get(sign, sign) for sign in text).replace("\n", " "))
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return unwrap(text)


def unwrap(text: str) -> str:
    r"""Without $...$, \[...\], {...} or \text{...} around the whole, and punctuation at its ends."""
    text = text.lstrip(" =*").rstrip(" .,;*")
    wrapped = WRAPPED.fullmatch(text)
    inner = "".join(filter(None, wrapped.groups())) if wrapped else ""
    depths = accumulate((sign == "{") - (sign == "}") for sign in inner)
    return unwrap(inner) if inner and min(depths) >= 0 else text


def from_repeating(whole: str, once: str, period: str) -> str:
    r"""0.1\overline{6} -> \frac{15}{90}"""
    nines = 10 ** len(period) - 1
    return rf"\frac{{{int(whole + once or 0) * nines + int(period)}}}{{{10 ** len(once) * nines}}}"


def split_unit(text: str) -> tuple[str, str]:
    """A number or formula, and its unit or money sign in one spelling: ("5", "cm^2") from "5 square cm"."""
    unit = ""
    if money := MONEY.fullmatch(text.strip()):
        text, unit = money[1] + money[3], money[2]
    amount = AMOUNT.fullmatch(text)
    if amount and (r"\circ" not in amount[2] or number(amount[1]) is not None):  # not in \sin 30^\circ
        text, unit = amount[1], f"{unit} {amount[2]}{amount[3] or ''}"
    words = re.findall(r"[a-z]+|[$€£₹¢°/']|\d", re.sub(r"\\text|units?\b|\.", "", unit.lower()))
    names = [UNIT_NAMES.get(word) or UNIT_NAMES.get(word.removesuffix("s"), word) for word in words]
    names = ["^" + name if name.isdigit() else name for name in names]
    names.sort(key=lambda name: name[0] == "^")  # square cm is cm^2
    return text.strip(), "".join(names) if names and names[0][0] != "^" else ""


def squeeze(text: str) -> str:
    r"""Text without spaces (but between two digits), \text and needless braces, in lower case."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).lower()
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<!\d)\s|\s(?!\d)|(?<=[a-z])\.", "", text))


def same_number(found: str, gold: str) -> bool | None:
    """Whether two numbers are exactly equal, as fractions or as percentages; None if one is not a number."""
    ours, theirs = number(found.rstrip("%\\ ")), number(gold.rstrip("%\\ "))
    if ours is None or theirs is None:
        return None
    percent = found.endswith("%") - gold.endswith("%")
    return theirs in (ours, ours / 100**percent if percent >= 0 else ours * 100)


def number(text: str) -> Fraction | None:
    r"""The exact value of 1,234.5, 1.6 \times 10^{5}, 1.6e5, \frac{3}{4}, 3/4, 3:4 and 2 1/3; else None."""
    if match := SCIENTIFIC.fullmatch(text.strip()):
        decimal, *powers = match.groups()
        power = int("".join(filter(None, powers)) or 0)
        return Fraction(re.sub("[ ,]", "", decimal or "1")) * Fraction(10) ** power
    if match := FRACTION.fullmatch(text.strip()):
        sign, whole, *parts = match.groups()
        above, below = (Fraction(re.sub("[ ,]", "", part)) for part in parts if part)
        return None if below == 0 else int(sign + "1") * (int(whole or 0) + above / below)
    return None


def plain(text: str) -> str:
    """The same text for answers with the same number or the same formula, for a vote."""
    if len(text) > LONGEST_ANSWER:
        return text
    text = split_unit(NAME.sub("", tidy(text)))[0].rstrip("%\\ ")
    value = number(text)
    return squeeze(text) if value is None else str(value)


@lru_cache(maxsize=1000)  # golds recur
def read(text: str):
    """The sympy object of a formula, or None where latex2sympy cannot read all of it."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from sympy import I, Symbol

    rules = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    is_complex = re.search(r"(?<![A-Za-z])i(?![A-Za-z])", text) is not None
    if sum(map(text.count, "([{")) != sum(map(text.count, ")]}")):
        return None
    try:
        formula = latex2sympy(text, is_real=not is_complex, convert_degrees=True, normalization_config=rules)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # its syntax errors have no class of their own
        return None
    return formula.subs(Symbol("i", real=False), I) if is_complex else formula


def equal(gold, found) -> bool:
    """Whether two sympy objects are equal: part by part, numbers by value, the rest by math-verify."""
    import sympy
    from math_verify import verify

    if isinstance(gold, sympy.Eq) != isinstance(found, sympy.Eq):  # 5 = 2 + 3 and 5, but not x + y = 5 and 5
        if any(side.lhs.free_symbols for side in (gold, found) if isinstance(side, sympy.Eq)):
            return False
        gold, found = (side.rhs if isinstance(side, sympy.Eq) else side for side in (gold, found))
    gold, found = inequality_as_set(gold), inequality_as_set(found)
    (kind, parts), (other_kind, others) = parts_of(gold), parts_of(found)
    if kind and kind == other_kind:
        if kind == "list":
            return len(parts) == len(others) and all(any(equal(a, b) for b in others) for a in parts)
        return len(parts) == len(others) and all(map(equal, parts, others))
    if isinstance(gold, sympy.Expr) and isinstance(found, sympy.Expr):
        return equal_values(gold, found)
    if isinstance(gold, sympy.Expr) or isinstance(found, sympy.Expr):  # and {5} is 5
        return len(parts + others) == 1 and equal(*(parts or (gold,)), *(others or (found,)))
    return verify(gold, found, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)


def parts_of(formula) -> tuple:
    """What kind of list it is, and its parts; (None, ()) if it is none."""
    import sympy

    if isinstance(formula, sympy.MatrixBase):
        return "tuple" if 1 in formula.shape else formula.shape, tuple(formula)
    if isinstance(formula, sympy.Interval):
        closed = not formula.left_open, not formula.right_open
        return closed if any(closed) else "tuple", (formula.start, formula.end)
    kinds = [
        name
        for name, kind in (("tuple", sympy.Tuple), ("list", sympy.FiniteSet))
        if isinstance(formula, kind)
    ]
    return (kinds[0], formula.args) if kinds else (None, ())


def inequality_as_set(formula):
    """The set of an inequality in one variable, or of a list of them ("x < 1 or x > 2"); else unchanged."""
    import sympy

    parts = formula.args if isinstance(formula, sympy.FiniteSet) else (formula,)
    inequalities = all(
        isinstance(part, (sympy.Rel, sympy.And)) and not isinstance(part, sympy.Eq) for part in parts
    )
    if inequalities and parts and len(formula.free_symbols) == 1:
        return sympy.Union(*(part.as_set() for part in parts))
    return formula


def equal_values(gold, found) -> bool:
    """Exactly; if one has a decimal and the other is irrational, within 1e-6 of the value."""
    import sympy

    tolerance = 1e-6 if gold.has(sympy.Float) or found.has(sympy.Float) else 1e-15
    gold, found = (sympy.nsimplify(side.doit(), rational=True) for side in (gold, found))
    if (
        gold == found
        or (gold.is_Rational and found.is_Rational)
        or False in (gold.is_finite, found.is_finite)
    ):
        return gold == found
    if gold.free_symbols or found.free_symbols:
        point = {
            x: sympy.Rational(37 + 10 * i, 100) for i, x in enumerate(gold.free_symbols | found.free_symbols)
        }
        there = sympy.N((gold - found).subs(point))  # differing there, they need not be simplified
        return not (there.is_finite and abs(there) > 1e-6) and sympy.simplify(gold - found) == 0
    return bool(abs(sympy.N(gold - found, 20)) <= tolerance * abs(sympy.N(gold, 20)))


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
        """`compare` in a worker, tried once more in case of a failure."""
        verdict = compare_quickly(found, gold)[0] or self.ask_worker(found, gold)
        return self.ask_worker(found, gold) if verdict in ("worker died", "failed") else verdict

    def ask_worker(self, found: str, gold: str) -> str:
        """The verdict of a worker, or one of LOST."""
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


@cache
def one_grader(extract: Callable[..., str | None], has_box: Callable[[str], bool]) -> Grader:
    """The grader of single answers, which keeps its worker until this process ends."""
    return Grader(extract, has_box, workers=1)


def work() -> None:
    """Read a line [found, gold], write a line with the verdict, within 4 GB of memory."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for line in sys.stdin:
        try:
            verdict = compare(*json.loads(line))
        except Exception:  # whatever goes wrong in math-verify says nothing about the answer
            verdict = "failed"
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    work()
