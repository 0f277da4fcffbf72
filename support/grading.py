r"""Whether an extracted answer equals the gold answer: by text, by exact number, then with math-verify.

Conventions, where mathematics does not decide:

| kind | rule |
|---|---|
| units | either side may have none, as 5 in \boxed{5} cm; two units must be the same; none is converted |
| letters | m is a unit after a number, and a variable beside variables; M is another variable; mW is not MW |
| percent | 50\% equals 50, 1/2 and 0.5, but no amount with a unit; without its sign, 50 is not 1/2 |
| decimals | equal an irrational number within 1e-6 of its value, and a fraction exactly |
| lists, sets | in any order, duplicates ignored; "or", "and" are commas; tuples and matrices in their order |
| inequalities | several, also with "and" or "or", mean their intersection, or their union if that is empty |
| calculations | 5/2 = 2.5 is 2.5 |
| names | in x = 5, f(x) = 2x, x \in (0, 1) the name may be left out, but two names must be the same |
| choices | the letter decides, as in (B) 12; if one side has no letter, the text after it decides |
| parts | (a) 5, (b) 6 is compared as text |
| bases | 101_2 needs its base, and is not converted |
| a:b | the fraction a/b; longer ratios are compared as text, and times of day with am or pm |
| words, ellipses | compared as text, ignoring case; so is all that math-verify cannot read completely |
| gold unreadable | the texts differ, and math-verify cannot read the gold: not correct, and reported |
| several boxes | the first that is not blank counts; `correct_last` shows the last |
| reasoning | only what follows the last </think> is graded; an unclosed <think> has no answer |
| prose | around a single formula or number it is dropped; other prose with numbers is no answer |
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

LONGEST_ANSWER = 500  # characters of an answer; longer text is not compared
LONGEST_RESPONSE = 200_000  # characters of a response; what follows is not searched for an answer

FONTS = ["mbox", "mathrm", "mathbf", "boldsymbol", "bm", "textbf", "textit", "textrm", "textup"]
COMMANDS = dict.fromkeys(["left", "right", "displaystyle", "underline"], "")
COMMANDS |= dict.fromkeys(["quad", "qquad"], " ")
COMMANDS |= dict.fromkeys(FONTS, r"\text")
COMMANDS |= dict.fromkeys(["dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"], r"\frac")
COMMANDS |= {"langle": "(", "rangle": ")", "lg": r"\log", "varnothing": r"\emptyset", "degree": r"^\circ "}
SIGNS = {"−": "-", "–": "-", "‐": "-", "⁄": "/", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∞": r"\infty "}
SIGNS |= {"·": r"\cdot ", "∈": r"\in ", "≈": r"\approx ", "°": r"^\circ ", "、": ",", "。": "."}
SIGNS |= dict.fromkeys("\u200b\u2060\ufeff", "")  # they have no width
SPELLINGS = (  # replaced in this order: what surrounds an answer, and notations unknown to math-verify
    ("[⁰¹²³⁴-⁹⁻]+", r"^{\g<0>}"),  # NFKC would turn a superscript 5 into 5
    ("[₀-₉]+", r"_{\g<0>}"),
    ("[¼-¾⅐-⅞]", r" \g<0>"),
    (r"(?s).+", lambda found: unicodedata.normalize("NFKC", found[0])),
    (f"[{''.join(SIGNS)}]", lambda found: SIGNS[found[0]]),
    (r"(?s)(?<!\\)\$((?:\\.|[^\\$])*)\$", r"\1"),  # two dollar signs are LaTeX's, a single one is money
    (r"\\([A-Za-z]+)", lambda found: COMMANDS.get(found[1], found[0])),
    (r"(?<=\d)(?:\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))", ""),  # 10{,}000 and 10,\!000
    (r"(?<!\\)\\[][()!:;]|\*\*", ""),
    (r"(?<!\\)\\[, ]|~|\s", " "),
    (r"^(?: |=|\*|\\approx)+|(?<!\.)\.?[ ,;*]*$", ""),
    (r"^(?:\\text ?)?\{(?![^{]*\}.)(.*)\}$", r"\1"),
    (r"\\text\s*(?:\{\s*(\(?\w[).:]*|[-\d.,\s]*\d)\s*\}|(\w))", r" \1\2"),  # \mathrm e, \textbf{(C)}
    (r"(?:,\s*)?(?:\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (r"^(?i:negative|minus)\s+(?=[\d$\\])", "-"),
    (r"(?<![\\A-Za-z])(pi|sqrt|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"\b[Ii]nfinity\b", r"\\infty "),
    (r"\\sqrt\s*(\[\d\])?\s*(\d+|\((?:[^()]|\([^()]*\))*\))", r"\\sqrt\1{\2}"),
    (r"\\text\s*\{\s*percent\s*\}|\bpercent\b", r"\\%"),
    (r"(\d)\s*x\s*(?=10\s*\^)", r"\1\\times "),
    (r"\bC\((\d+),\s*(\d+)\)|(\w+)\s*\\choose\s*(\w+)", r"\\binom{\1\3}{\2\4}"),
    (r"(\d)\s*e([-+]?\d{1,4})", r"\1\\times 10^{\2}"),
    (r"\^\s*(-\s*(?:\d+(?:\.\d+)?|[A-Za-z]))", r"^{\1}"),  # 10^-3
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d{1,50})\}?", lambda found: from_repeating(*found.groups())),
    (r"\\\{\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?::|\||\\mid)([^{}]*)\\\}", r"\1"),  # {x : x > 1}
    (r"^\s*\](.*)\[\s*$", r"(\1)"),  # ]0, 1[
    (r"^(-?)\s*(\\?\$|[€£₹¥]|USD)\s*(-?[\d.,]*\d)", r"\1\3 \2"),
)
DECIMAL = r"(?:\d{1,3}(?:[ ,]\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(rf"([-+]?)\s*(?:(\d+) +(?=\d+/))?(-?{DECIMAL})(?:\s*[/:]\s*({DECIMAL}))?")
NAME = re.compile(  # "x =", "a_{n+1} =", "f'(x) =", "f^{-1}(x) =", "(x, y) =", "x \in", "\text{Area} ="
    r"(?:^|(?<=,))\s*((?:m?\s*\\angle\s*)?\\?[A-Za-z]+(?:_\w|_\{[^{}]+\})?'*(?:(?:\^\{-1\})?\(\w\))?"
    r"|\\text\s*\{[^{}]*\}|\([a-z](?:,\s*[a-z])*\)|[A-Za-z](?::[A-Za-z])+)\s*(?:=|\\in(?![a-z])|\\approx)"
)
CHOICE = re.compile(  # but "a:b = 2:3" is a ratio, and "(i)" a part
    r"(?:(?:\\text\s*\{)?(?:option|choice)\}? *)?\(?([a-hj]|(?-i:I))"
    r"(?:[).]+:?|(?-i:(?<=[A-J]):(?!\s*[A-Z]\s*[:=]))|\}?$)"
    r"(?:(?!\(|\s*[-+*/^=_,])|(?-i:(?<=\([A-J]\)))(?= +-[\d.\\]))\s*(.*)",  # (C) -5, but not (C) - 5
    re.I | re.S,
)
PARTS = re.compile(  # of "(a) 5, (b) 6" and "i) 3; ii) 4"
    r"(?:^\s*\((?:a|i)\)\s*[^\s(].*\s|[,;]\s*)\((?:[b-j]|ii+)\)\s*[^\s,;]"
    r"|[,;]\s*(?:[b-j]|ii+)[).:]\s*(?:-?\d|\\[fs])",
    re.I,
)
TWO_SIGNS = re.compile(r"(?!.*\\(?:\{|mp))((?:(?!\\pm|±).)*)(?:\\pm|±)((?:(?!\\pm|±).)*)")  # (1 \pm \sqrt5)/2
CALCULATION = re.compile(  # "5/2 =" in 5/2 = 2.5
    r"^(?:[-+*/\d.(){}^!%=\s]|,\d{3}|\\(?:frac|sqrt|binom|times|cdot|div|pi|%))*(?<!!)="
)
NO_UNIT = (  # words after a number that change its value
    r"\s*\(?(?:in )?(?:and|or|times|(?:dozen|hundred|thousand|[a-z]+illion|lakh|crore)s?|score|remainder|more"
    r"|less|mod|base|binary|octal|hex\w*|to|if|is|not|out|raised|choose|factorial|divided|minus|plus|over|root"
    r"|squared|cubed|hal(?:f|ves)|thirds?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|hundred|thousand)ths?)(?![a-z])"
)
POWER = r"\^(?:\{?-?\d\}?|\\circ)"
TEXT_UNIT = rf"(?:\\mu *)?\\text *\{{(?!{NO_UNIT})(?:[^{{}}\d^]|{POWER})*\}}(?:{POWER})?"
SHORT_UNIT = r"(?:[ckm]m|[km]g|ml|ft|in|lb|oz|yd|mi|hr|mph|st|nd|rd|th)(?![a-z])"  # also without a space
SYMBOL = r"(?-i:(?:[kMGmcn]|\\mu *)?(?:Hz|eV|Pa|[JNVWAmgs])|[KCFTLhl]|[KMG]B|mol|min|yr)(?![a-z])"
BARE_UNIT = rf"(?:{SHORT_UNIT}|(?!{SHORT_UNIT}){SYMBOL})(?:{POWER})?"
AMOUNT = re.compile(  # a number or formula, and the unit after it; a bare unit could also be a variable
    r"(?P<amount>.*?(?:[\d)}!%]|\\pi))\s*(?P<unit>'{1,2}|\"|(?:\\?\$|[€£₹¢¥])(?: per [a-z]+)?"
    r"|\^ *\{? *\\circ *\}? *(?:\\text *)?\{?[CF]?\}?"
    rf"|{TEXT_UNIT}(?: *(?:\\cdot|/)? *{TEXT_UNIT})*"
    rf"|(?P<bare>(?:(?={SHORT_UNIT})|(?<= )){BARE_UNIT}(?:(?: *\\cdot *|[/ ]){BARE_UNIT})*)"
    rf"|(?<= )(?:[ap]\.?m|\(?(?!{NO_UNIT})(?:[a-z]{{3}}|[a-z]{{2}}[./ ])[a-z./ ]*\)?(?:{POWER})?))",
    re.I,
)
VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
UNITS = {r"square (\w+)": r"\1^2", r"cubic (\w+)": r"\1^3", "kilo": "k", "centi": "c", "met(er|re)": "m"}
UNITS |= {"hour|hr": "h", "minute": "min", "inche?": "in", "feet|foot": "ft", "mile": "mi", "yard": "yd"}
UNITS |= {"gram": "g", "lit(er|re)": "l", "second|sec": "s", "pound": "lb"}
UNITS |= {" per ": "/", r"dollar|usd|\\\$": "$", r"\^\s*\\circ|degree": "°", "''|\"": "in"}
# Words, and what latex2sympy misreads: it adds two numbers side by side, and drops a base or an ellipsis.
NOT_MATHEMATICS = re.compile(
    r"(?<![\\A-Za-z])(?<!n\{)(?<!d\{)(?:[A-Za-z]{4}|[A-Z][a-z]{2})|[\w)}]'|[\d}]_|:.*:"
    r"|(?<!_)\d(?:\s+| *[a-z]{1,2} +)[\d.]"  # also with a unit between them: 6 ft 2 in
    r"|\.\.\.|!!|^\s*(?:\d{4}-(?:0\d|1[0-2])-\d\d|(?:\d{3}-)?\d{3}-\d{4})\s*$"  # dates, telephone numbers
    r"|\\(?:text|operatorname|angle|gcd|lcm|[bp]?mod|[lcdv]?dots|partial)(?![a-z])"
    r"|\\frac\s*\{d[a-z]\}\s*\{d[a-z]\}|(?<![\\A-Za-z])[A-Z]\("  # dy/dx; E(X^2), of which E is no factor
)
CHANGES = re.compile(  # words before a number that change it
    r"\b(?:negative|minus|twice|double|triple|(?:half|third|quarter|root) of|(?:less|greater|more) than)"
    r"\s+(?:\$|\\\(|\\\[)?[\d\\]",
    re.I,
)
BLANK = re.compile(r"(?:\\[hv]?phantom\s*\{[^{}]*\}|\\text\s*\{|\\q?quad|\\[,;: ]|[?_.…~{}\s]|answer)*", re.I)


def without_reasoning(response: str) -> str:
    """What follows the last </think>; nothing if a <think> was not closed."""
    text = response.rpartition("</think>")[2]
    return "" if "<think>" in text else text[:LONGEST_RESPONSE]


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Start and end of the content of each \boxed{...}, in the order in which they close.

    Escaped braces, as in \{1, 2\}, open and close nothing.
    """
    found = []
    opened: list[tuple[bool, int]] = []  # (whether it is a box, where its content starts)
    escaped = r"\\[\\{}](?!boxed|fbox)"  # but not of \\boxed, which some models write for \boxed
    for match in re.finditer(rf"(?P<box>\\(?:boxed|fbox)\s*{{)|{escaped}|(?P<brace>[{{}}])", text):
        if match["box"] or match["brace"] == "{":
            opened.append((bool(match["box"]), match.end()))
        elif match["brace"] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                found.append((start, match.start()))
    return found


def is_blank(answer: str) -> bool:
    r"""Whether it is a placeholder for an answer: \boxed{?}, \boxed{\phantom{2}}, \boxed{answer}."""
    return BLANK.fullmatch(answer) is not None


def without_prose(sentence: str) -> str | None:
    """The answer in the rest of a sentence: 12 in "therefore 12", but None in "add 2 and 3" and "not 12"."""
    if re.match(r"(?:not|never) .*\d", sentence, re.I):
        return None
    if not re.match(r"(?!sqrt|sin|cos|tan|log)[A-Za-z]{3,}[ ,]", sentence) or CHANGES.search(sentence):
        return sentence or None
    formulas = re.findall(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", sentence)
    formulas = formulas or re.findall(r"[-−]?\$?\d[\d,./]*", sentence)
    if len(formulas) == 1:
        return formulas[0]
    return None if formulas or sentence.endswith(":") else sentence


def compare(found: str, gold: str) -> str:
    """'right', 'wrong' or 'gold unreadable'. It may never return, and math-verify may raise any exception."""
    verdict, found, gold = compare_quickly(found, gold)
    return verdict or compare_formulas(found, gold)


def compare_quickly(found: str, gold: str) -> tuple[str | None, str, str]:
    """The verdict by text and by number, in microseconds; or None, and the two formulas to compare."""
    if found.strip() == gold.strip():
        return "right", found, gold
    if max(len(found), len(gold)) > LONGEST_ANSWER:
        return "wrong" if len(gold) <= LONGEST_ANSWER else "gold unreadable", found, gold
    found, gold = tidy(found), tidy(gold)
    if squeeze(found) == squeeze(gold):
        return "right", found, gold
    if PARTS.search(found) or PARTS.search(gold):
        return "wrong", found, gold
    ours, theirs = CHOICE.fullmatch(found), CHOICE.fullmatch(gold)
    if ours and theirs:
        return "right" if ours[1].lower() == theirs[1].lower() else "wrong", found, gold
    found = ours[2] if ours and ours[2] else found
    gold = theirs[2] if theirs and theirs[2] else gold
    found, gold = without_names(found, gold), without_names(gold, found)
    names, gold_names = {*NAME.findall(found)}, {*NAME.findall(gold)}
    if len(names | gold_names) == 1 and (names == gold_names or not ("=" in found and "=" in gold)):
        found, gold = NAME.sub("", found), NAME.sub("", gold)
    if "=" not in gold:
        found = CALCULATION.sub("", found)
    (found, unit), (gold, other_unit) = split_unit(found, gold), split_unit(gold, found)
    if unit and other_unit and unit != other_unit:
        return "wrong", found, gold
    if re.fullmatch("[ap]m", unit or other_unit) and ":" in found + gold:  # no ratio: 1:15 pm is not 3:45 pm
        return "right" if squeeze(found) == squeeze(gold) else "wrong", found, gold
    percent = found.endswith("%") - gold.endswith("%")
    if percent and (other_unit if percent > 0 else unit):  # 20 % is neither 20 dollars nor 0.20
        return "wrong", found, gold
    found, gold = found.rstrip("%\\ "), gold.rstrip("%\\ ")
    ours, theirs = number(found), number(gold)
    if None not in (ours, theirs):
        return "right" if ours in (theirs, theirs * Fraction(100) ** percent) else "wrong", found, gold
    if squeeze(found) == squeeze(gold):
        return "right", found, gold
    # A set of points in braces is a list of points; other braces are no tuple.
    start = [re.sub(r"[\\\s]|\{\((?=[^()]*,)", "", text)[:1] for text in (found, gold)]
    differ = sorted(start) == ["(", "{"] or names != gold_names and names and gold_names
    if not (names or gold_names):  # then two triangles or angles, and no product
        differ |= all(re.fullmatch("[A-Z]{3}", text.strip()) for text in (found, gold))
    if differ or NOT_MATHEMATICS.search(found) or NOT_MATHEMATICS.search(gold):
        return "wrong", found, gold
    return None, found, gold


def tidy(text: str) -> str:
    """One spelling of signs, fonts, spaces and roots, without what surrounds the answer."""
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def without_names(text: str, other: str) -> str:
    """(1, 2) from "y = 2, x = 1" if the other side is a tuple; any other text as it is."""
    start, *pieces = NAME.split(text)
    if start.strip() or len(pieces) < 4 or not other.startswith("("):
        return text
    values = dict(zip(pieces[::2], pieces[1::2]))
    names = sorted(values) if values.keys() <= {"x", "y", "z"} else values
    return f"({', '.join(values[name].strip(' ,') for name in names)})"


def from_repeating(whole: str, once: str, period: str) -> str:
    r"""0.1\overline{6} -> (0.10+\frac{6}{90})"""
    return rf"({whole}.{once}0+\frac{{{period}}}{{{10 ** len(once) * (10 ** len(period) - 1)}}})"


def split_unit(text: str, other: str = "") -> tuple[str, str]:
    """A number or formula, and its unit in one spelling: ("5", "cm^2") from "5 square cm".

    In a list all parts have the same unit. Beside variables, in `text` or in the amount of `other`, only text
    in \\text{} is a unit, because m may be a variable.
    """
    if "," in text:
        amounts, units = zip(*(split_unit(part.strip()) for part in text.split(",")))
        if units[0] and len(set(units)) == 1:
            return ", ".join(amounts), units[0]
    match = AMOUNT.fullmatch(text)
    if not match or re.search(r"\\circ|['\"]", match["unit"]) and number(match["amount"]) is None:
        return text, ""  # \sin 30^\circ, x_1'
    beside = AMOUNT.fullmatch(other)
    if match["bare"] and VARIABLE.search(match["amount"] + (beside["amount"] if beside else other)):
        return text, ""
    unit = re.sub(r"\bM(?=(?:W|Hz|Pa|J|e?V|[NAmgs])\b)", "mega", match["unit"])  # 5 MW is not 5 mW
    unit = re.sub(r"\\text|unit|[{}().]|(?<=\w)s\b", "", unit.lower())
    for name, short in UNITS.items():
        unit = re.sub(name, short, unit)
    return match["amount"], unit.replace(" ", "")


def squeeze(text: str) -> str:
    r"""Text without spaces (but between two digits), \text and needless braces; words in lower case."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    if re.search(r"(?<![\\A-Za-z])(?:[a-z]{4}|(?:yes|no|odd)(?![a-z]))", text, re.I):
        text = text.lower()
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<!\d)\s|\s(?!\d)|(?<=[a-z])\.", "", text))


def number(text: str) -> Fraction | None:
    r"""The exact value of 1,234.5, 3/4, 3:4, \frac{3}{4} and 2 1/3; else None."""
    text = re.sub(r"\\frac\s*(\{-?\d+\}|\d)\s*(\{\d+\}|\d)(?!\s*[\d.{])", r" \1/\2", text)
    if not (match := NUMBER.fullmatch(re.sub("[{}]", "", text).strip())):
        return None
    sign, whole, above, below = (re.sub("[ ,]", "", part or "") for part in match.groups())
    if below and Fraction(below) == 0:
        return None
    return int(sign + "1") * (int(whole or 0) + Fraction(above) / Fraction(below or 1))


def plain(text: str) -> str:
    """A text that is the same for answers with the same number or the same formula, to count votes."""
    if len(text) > LONGEST_ANSWER:
        return text
    text = split_unit(NAME.sub("", tidy(text)))[0].rstrip("%\\ ")
    value = number(text)
    return squeeze(text) if value is None else str(value)


def compare_formulas(found: str, gold: str) -> str:
    """`compare` with math-verify, for two tidy formulas."""
    gold_read, found_read = read(gold), read(found)
    if gold_read is None:
        return "gold unreadable"
    rounded = "." in found + gold
    return "right" if found_read is not None and equal(gold_read, found_read, rounded) else "wrong"


@lru_cache(maxsize=1000)  # golds recur
def read(text: str):
    """The sympy object of a formula, decimals as fractions; None if latex2sympy cannot read all of it."""
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    rules = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    names = ConversionConfig(lowercase_symbols=False)
    if two := TWO_SIGNS.fullmatch(text):
        text = f"{two[1]}+{two[2]}, {two[1]}-{two[2]}"
    is_complex = re.search(r"(?<![A-Za-z])i(?![A-Za-z])", text) is not None
    if sum(map(text.count, "([{")) != sum(map(text.count, ")]}")):
        return None
    try:
        formula = latex2sympy(
            text,
            is_real=not is_complex,
            convert_degrees=True,
            normalization_config=rules,
            conversion_config=names,
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:  # its syntax errors have no class of their own
        return None
    formula = formula.xreplace({x: sympy.Rational(str(x)) for x in formula.atoms(sympy.Float)})
    formula = formula.subs(sympy.Symbol("i", real=False), sympy.I) if is_complex else formula
    if isinstance(formula, sympy.MatrixBase) and 1 in formula.shape:
        return sympy.Tuple(*formula)
    relations = sympy.Rel, sympy.And
    if isinstance(formula, sympy.FiniteSet) and all(isinstance(part, relations) for part in formula.args):
        if len(formula.free_symbols) > 1:  # x > 0, y > 0
            return formula
        ranges = [part.as_set() for part in formula.args]
        both = sympy.Intersection(*ranges)
        return sympy.Union(*ranges) if both == sympy.S.EmptySet else both  # x < 1 or x > 2; 1 < x, x < 2
    if isinstance(formula, sympy.Expr):
        formula = formula.doit()
    return None if formula.has(sympy.zoo, sympy.nan) else formula


def equal(gold, found, rounded: bool) -> bool:
    """Whether two sympy objects are equal; if one is `rounded` and the other irrational, within 1e-6."""
    import sympy
    from math_verify import verify

    for one, other in ((gold, found), (found, gold)):
        if isinstance(one, sympy.Eq) and one.free_symbols and not isinstance(other, sympy.Eq):
            return False  # math-verify takes x + y = 5 for 5
        if isinstance(one, sympy.FiniteSet) and isinstance(other, (sympy.And, sympy.Rel)):
            return False  # math-verify takes 1 < x < 2, and |x| < 2, for the sets of their bounds
    if isinstance(gold, sympy.Symbol) and isinstance(found, sympy.Symbol):
        return gold == found  # math-verify ignores case
    sides = gold, found
    values = all(isinstance(side, sympy.Expr) and side.is_number and not side.is_infinite for side in sides)
    if rounded and values and not (gold.is_Rational and found.is_Rational):
        return bool(abs(sympy.N(gold - found, 20)) <= 1e-6 * abs(sympy.N(gold, 20)))
    allow = {"allow_set_relation_comp": True, "numeric_precision": 50}
    return verify(gold, found, timeout_seconds=None, raise_on_error=True, **allow)
