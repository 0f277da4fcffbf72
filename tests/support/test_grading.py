"""Equality of answers, table by table."""

import pytest

from eval_math import extract
from support.grading import compare

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
    "ratios": [("2:3", "2/3"), ("6:10", "3:5")],
    "powers of ten": [
        *((rf"7.25 \times 10^{{{power}}}", f"7.25e{power}") for power in range(-40, 41, 5)),
        (r"4\cdot10^{-7}\text{ m}", "4e-7"),
        ("8e-12", "0.000000000008"),
        ("3 × 10⁻⁵", "0.00003"),
        ("10⁷", "10000000"),
        (r"6.5\text{e}12", r"6.5\times 10^{12}"),
    ],
    "spaces between thousands": [("7 654", "7654"), (r"7\,654\,321", "7654321"), ("7~654", "7654")],
    "degrees": [
        (r"\tan 45^\circ", "1"),
        (r"\sin 30^{\circ}", "0.5"),
        ("cos 60°", r"\frac12"),
        (r"3\sin 25^\circ", r"3\cos 65^\circ"),
    ],
    "wrappers": [
        (r"\boldsymbol{17}", "17"),
        (r"\[17\]", "17"),
        (r"\mathbf{\frac{2}{7}}", r"\frac27"),
        (r"\text{17}", "17"),
        ("$17$", "17"),
        ("**17**", "17"),
        (r"\displaystyle\sqrt{17}", r"\sqrt{17}"),
    ],
    "other signs": [
        ("１７", "17"),
        ("‑17", "-17"),
        ("（3，4）", "(3,4)"),
        ("7⁄8", "7/8"),
        ("∛27", "3"),
        ("5√7", r"5\sqrt7"),
        ("x ∈ (3, 4)", "(3,4)"),
        ("1001₂", "1001_2"),
    ],
    "units in words, signs and brackets": [
        ("9 square units", "9"),
        (r"9\text{ (units)}", "9"),
        ("9 km^2", "9"),
        ("9 square km", r"9\text{ km}^2"),
        ("9 meters", "9 m"),
        ("9 €", "€9"),
        ("USD 9", "9"),
        ("9th", "9"),
        (r"20^\circ\text{C}", "20"),
        ("7:30 PM", "7:30 p.m."),
        (r"2\pi\text{ cm}", r"2\pi"),
    ],
    "units spelled out": [
        ("8 kilometers", "8 km"),
        ("8 centimetres", "8 cm"),
        (r"8\text{ cubic cm}", r"8\text{ cm}^3"),
        ("8 hours", "8 hrs"),
        ("8 minutes", "8 min"),
        ("8 inches", "8 in"),
        ("8 feet", "8 ft"),
        ("8 mi", "8 miles"),
        ("8 yards", "8 yd"),
        ("8 lb", "8 pounds"),
        ("8 dollars", r"\$8"),
        ("8 degrees", r"8^\circ"),
    ],
    "names": [
        ("A = 17", "17"),
        (r"m\angle B = 17^\circ", "17"),
        ("(a,b)=(3,4)", "(3,4)"),
        ("g(x)=3x", "3x"),
        ("=17", "17"),
        ("17 = 8 + 9", "17"),
        (r"x=3 \text{ or } x=4", "3,4"),
    ],
    "inequalities": [
        ("x>7", r"(7,\infty)"),
        (r"y<-1 \text{ or } y>1", r"(-\infty,-1)\cup(1,\infty)"),
        (r"x\ne 4", r"(-\infty,4)\cup(4,\infty)"),
        ("]3,4[", "(3,4)"),
        (r"\{t : t \ge 4\}", r"[4,\infty)"),
        (r"\mathbb{R}\setminus\{4\}", r"(-\infty,4)\cup(4,\infty)"),
    ],
    "vectors": [(r"\begin{pmatrix}3\\4\end{pmatrix}", "(3,4)")],
    "formulas": [
        (r"\frac{a}{9}+\frac49", r"\frac{a+4}{9}"),
        (r"\frac{a^2-b^2}{a-b}", "a+b"),
        (r"\sin^2 a+\cos^2 a", "1"),
    ],
    "equations": [("3x-6y=12", "x-2y-4=0"), (r"y-1=\frac13x", r"y=\frac13x+1")],
    "functions": [
        (r"\ln 9", r"2\ln 3"),
        (r"\lg 1000", "3"),
        (r"\log_3 9", "2"),
        ("C(7,3)", "35"),
        (r"{7 \choose 3}", "35"),
        (r"\sum_{k=1}^{5} k", "15"),
        ("sqrt(3(5+1))", r"3\sqrt2"),
        (r"e^{i\pi}+2", "1"),
        (r"\sqrt{-9}", "3i"),
    ],
    "euler's number": [(r"5\mathrm{e}^{2}", "5e^2"), (r"\frac3{\mathrm e}", "3e^{-1}")],
    "choice with text": [
        ("(D)", r"(D)\ 31"),
        ("31", r"(D)\ 31"),
        (r"\textbf{(D)}\ 31", "D"),
        ("Option D", "D"),
    ],
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
    "tiny and huge numbers": [
        ("0", r"3.1\times 10^{-25}"),
        (r"7\times10^{-18}", r"8\times10^{-18}"),
        (r"\sqrt{5}\times 10^{-11}", r"\sqrt{7}\times 10^{-11}"),
        (r"(4\times 10^{-9}, 1)", r"(5\times 10^{-9}, 1)"),
        ("0.000000003x", "0.000000004x"),
        (r"\frac{1}{3^{50}}", r"\frac{1}{3^{51}}"),
        ("10^{90}+1", "10^{90}"),
        ("10000000.25", "10000000.75"),
    ],
    "rounded": [("3.1416", r"\pi"), ("2.24", r"\sqrt5"), (r"\frac{355}{113}", r"\pi"), ("0.142857", "1/7")],
    "raised and lowered digits": [
        ("10⁸", "108"),
        ("3¹²", "312"),
        ("110₂", "110"),
        ("110_2", "110"),
        ("110₂", "1102"),
    ],
    "degrees": [(r"\sin 50", r"\sin 50^\circ"), (r"\cos 35^\circ", r"\sin 35^\circ"), (r"\tan 45", "1")],
    "fragments": [
        (r"2+\frac3{\mathrm e}", r"2-\frac3{\mathrm e}"),
        (r"7\mathrm{e}^{2}", r"7\mathrm{e}^{-2}"),
        ("2:3:4", "2:4:3"),
        (r"n \equiv 4 \pmod 9", r"n \equiv 4 \pmod 7"),
        (r"n \bmod 9", r"n \bmod 7"),
        (r"\gcd(n,9)", r"\gcd(n,6)"),
        ("6 feet 2 inches", "6"),
        ("6 feet 2 inches", "2 feet 6 inches"),
        (r"6\text{ ft }2\text{ in}", "6"),
        ("7:30 a.m.", "7:30 p.m."),
        ("7:30", "7:15"),
        (r"2,4,\ldots,2n", r"2,4,\ldots,4n"),
        (r"\angle PQR", r"\angle PRQ"),
        (r"\overline{PQ}", r"\overline{PR}"),
        (r"8 \text{ remainder } 3", "8"),
        ("8R3", "8"),
        ("x+y=9", "9"),
        ("x+y=9", "x-y=9"),
        ("9 = 9x", "9"),
        (r"\frac{3}{4} \frac", r"\frac{3}{4}"),
        (r"5(\sqrt2", "5"),
    ],
    "whole units": [
        ("9 minutes", "9 months"),
        ("9 mm", "9 m"),
        ("9 m", "9 km"),
        (r"9\text{ cm}", r"9\text{ cm}^2"),
        (r"9\text{ cm}^3", r"9\text{ cm}^2"),
        ("9 square cm", "9 cm"),
        (r"\$9", "9 cents"),
        ("9 dollars", "9 euros"),
        ("9 years", "9 yards"),
        (r"9\text{ days}", r"9\text{ dozen}"),
        (r"20^\circ\text{C}", r"20^\circ\text{F}"),
        ("5 m/s", "5 m"),
        ("9 pi", "9"),
        ("9e", "9"),
    ],
    "names": [
        ("x=3", "y=3"),
        ("x=3, y=4", "x=4, y=3"),
        (r"\sqrt{x}=3", "3"),
        ("2x=4", "4"),
        ("(a,b)=(3,4)", "(a,b)=(4,3)"),
        ("g(x)=3x", "g(x)=4x"),
    ],
    "inequalities": [(r"x\ge 7", "x>7"), ("x<7", r"(7,\infty)")],
    "sets and tuples": [("(3,4)", r"\{3,4\}"), ("(1,2),(3,5)", "(1,2),(3,4)")],
    "anagrams": [(r"\text{Amy}", r"\text{May}"), ("Evelyn", "Nylvee"), ("four", "ruof")],
    "formulas": [(r"\frac{a}{b}", r"\frac{b}{a}"), ("ab", "a+b"), ("4k", "4n"), (r"\frac{1}{x-x}", "3")],
    "decimal commas": [("0,7", "7"), ("2,345", "2.345"), ("23,45", "2345")],
    "percent without its sign": [("70", "0.7"), (r"7\%", "700"), (r"70\%", r"0.7\%")],
}


def rows(table):
    return [
        pytest.param(*pair, id=f"{name}-{i}") for name, pairs in table.items() for i, pair in enumerate(pairs)
    ]


def pairs_of(table):
    return [pair for pairs in table.values() for pair in pairs]


def test_table_sizes():
    assert len(pairs_of(EQUAL)) + len(pairs_of(DIFFERENT)) >= 290


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
