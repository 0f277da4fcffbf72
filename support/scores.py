"""Scores of graded answers: accuracy, standard errors, intervals, paired differences, warnings.

A record is one answer, as eval_math.py writes it: index of its problem, extracted, correct, length, ...
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from support import data
from support.cli import BadInput
from support.grading import plain
from support.workers import LOST, Grader

Z = 1.96  # standard errors in half a 95 % interval
RECORD = {"index": int, "response": str, "gold": str, "verdict": str}  # what grading again needs
RECORD |= {"length": int, "finished": bool, "seconds": (int, float)}


def by_problem(records: list[dict]) -> dict[int, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[record["index"]].append(record)
    return groups


def score_answers(records: list[dict]) -> dict:
    """The scores of one answer or more.

    The n problems are the sample, so the standard error is that of a mean over problems, however many answers
    each has. The 95 % interval is Wilson's, for the number of independent answers that would have this error,
    at most all answers. pass@k is the unbiased estimate (Chen et al. 2021); maj@K is the majority vote of K
    answers, by text.
    """
    groups = list(by_problem(records).values())
    means = [statistics.fmean(r["correct"] for r in group) for group in groups]
    n, p = len(means), statistics.fmean(means)
    se = statistics.stdev(means) / n**0.5 if n > 1 else 0.0
    lengths = sorted(r["length"] for r in records)
    # A few problems may be equally hard by chance: their se, and with it the interval, would be too small.
    independent = min(p * (1 - p) / se**2, len(records)) if se else n
    result = {"accuracy": p, "se": se, "interval": wilson(p, independent), "n": n}

    def share(holds) -> float:
        return sum(map(holds, records)) / len(records)

    result |= {
        "strict": share(lambda r: r["correct_strict"]),  # only a \boxed{} counts
        "last_box": share(lambda r: r["correct_last"]),  # the last \boxed{}, where there are several
        "no_answer": share(lambda r: r["extracted"] is None),
        "truncated": share(lambda r: not r["finished"]),
        "repeating": share(lambda r: is_repeating(r["response"])),
        "mean_length": statistics.fmean(lengths),
        "p95_length": lengths[math.ceil(0.95 * len(lengths)) - 1],
        "tokens_per_second": sum(lengths) / max(sum(r["seconds"] for r in records), 1e-9),
        "unreadable_gold": sorted({r["gold"] for r in records if r["verdict"] == "gold unreadable"}),
        "lost": sum(r["verdict"] in LOST for r in records),
        "samples": (k := min(map(len, groups))),
    }
    if k > 1:
        tries = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
        wrong = [(len(group), sum(not r["correct"] for r in group)) for group in groups]
        result["pass_at"] = {
            t: statistics.fmean(1 - math.comb(w, t) / math.comb(size, t) for size, w in wrong) for t in tries
        }
        result["majority"] = statistics.fmean(map(majority_is_right, groups))
    return result


def majority_is_right(group: list[dict]) -> bool:
    """Whether the most frequent answer is right.

    Answers that differ in units alone are one answer, which is right if at least half of them are.
    """
    votes = defaultdict(list)
    for r in group:
        if r["extracted"] is not None:
            votes[plain(r["extracted"])].append(r["correct"])
    return bool(votes) and statistics.fmean(max(votes.values(), key=len)) >= 0.5


def is_repeating(response: str) -> bool:
    """Whether the last 40 characters occur at least four times in the response: it ends in a loop."""
    return len(response) >= 160 and response.count(response[-40:]) >= 4


def wilson(p: float, n: float) -> list[float]:
    """95 % interval of a share p of n answers (Wilson 1927): within 0 and 1, and not a point at 0 or 1."""
    centre, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)
    return [max(0.0, min(p, low)), min(1.0, max(p, high))]  # rounding may put p outside: 1 > high at n = 100


def difference(first: list[dict], second: list[dict]) -> dict:
    """second - first on the same problems: mean, se, 95 % interval, and a sign test, two-sided and exact."""
    ours, theirs = by_problem(second), by_problem(first)
    gaps = [
        statistics.fmean(r["correct"] for r in ours[i]) - statistics.fmean(r["correct"] for r in theirs[i])
        for i in ours
    ]
    mean, se = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    better, worse = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
    tail = sum(math.comb(better + worse, i) for i in range(min(better, worse) + 1))
    result = {"difference": mean, "se": se, "interval": [max(-1.0, mean - Z * se), min(1.0, mean + Z * se)]}
    return result | {"better": better, "worse": worse, "p": min(1.0, 2 * tail / 2 ** (better + worse))}


def summarize(runs: dict[str, dict[str, list[dict]]]) -> dict:
    """{model: {benchmark: records}} -> scores of each, and differences of the later models to the first."""
    names, models = list(runs), list(runs.values())
    scores = {f"{name} {b}": score_answers(r) for name, of in runs.items() for b, r in of.items()}
    pairs = {
        f"{name} - {names[0]}, {b}": difference(models[0][b], records)
        for name in names[1:]
        for b, records in runs[name].items()
    }
    return {"scores": scores, "differences": pairs}


def format_scores(summary: dict) -> str:
    """A table of the scores with their warnings, and a line for each difference."""
    width = max(map(len, summary["scores"]))
    columns = {"accuracy": 9, "+- se": 7, "95 % interval": 18, "strict": 9, "last box": 10, "no answer": 11}
    columns |= {"truncated": 11, "repeating": 11, "length": 8, "p95": 7, "n": 7, "tokens/s": 10}
    lines = [" " * width + "".join(f"{head:>{w}}" for head, w in columns.items())]
    for name, s in summary["scores"].items():
        low, high = s["interval"]
        cells = [f"{s['accuracy']:.1%}", f"{s['se']:.1%}", f"{low:.1%} to {high:.1%}"]
        cells += [f"{s[k]:.1%}" for k in ("strict", "last_box", "no_answer", "truncated", "repeating")]
        cells += [f"{s[k]:.0f}" for k in ("mean_length", "p95_length", "n", "tokens_per_second")]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, columns.values())))
        lines += ["  " + warning for warning in warnings_of(s)]
    lines += [f"{name}: {format_difference(d)}" for name, d in summary["differences"].items()]
    return "\n".join(lines)


def format_difference(d: dict) -> str:
    low, high = d["interval"]
    text = f"{d['difference']:+.1%} +- {d['se']:.1%}"
    if d["se"]:  # it is 0 where no problem differs
        text += f", 95 % interval {low:+.1%} to {high:+.1%}"
    return f"{text}; better on {d['better']}, worse on {d['worse']} problems, sign test p = {d['p']:.2g}"


def warnings_of(s: dict) -> list[str]:
    """Warnings about a score, and its pass@k."""
    found, k = [], s["samples"]
    if k > 1:
        tries = ", ".join(f"pass@{tries} {share:.1%}" for tries, share in s["pass_at"].items())
        found.append(f"accuracy is avg@{k}; {tries}, maj@{k} {s['majority']:.1%}")
    if golds := s["unreadable_gold"]:
        named = ", ".join(repr(gold[:40]) for gold in golds[:3])
        found.append(
            f"{len(golds)} gold answers that math-verify cannot parse, compared as text only: {named}"
        )
    if s["lost"]:
        found.append(
            f"{s['lost']} answers were lost (the grader timed out, died or failed) and count as wrong"
        )
    return found


def regrade(file: str, extract: Callable[[str], str | None], boxed: Callable[[str], list[str]]) -> str:
    """Grade the answers of a JSONL file again: their scores and how many verdicts differ. Raises BadInput."""
    path = Path(file)
    records = data.read_jsonl(path) if path.is_file() else []
    if not records:
        raise BadInput(f"{file} has no graded answers: name a JSONL file that an evaluation wrote")
    for place, record in data.jsonl_rows(path):
        for name, kinds in RECORD.items():
            if not isinstance(record.get(name), kinds):
                what = f"{file} {place} is not a graded answer, its {name} is {record.get(name)!r:.40}"
                raise BadInput(f"{what}: name a JSONL file that an evaluation wrote, or restore the line")
    problems: dict[int, tuple] = {}
    for record in records:
        problem = record.get("problem"), record["gold"]
        if problems.setdefault(record["index"], problem) != problem:
            what = f"{file} has two problems of the index {record['index']}"
            raise BadInput(f"{what}: grade the files of several evaluations one by one")
    with Grader(extract, boxed) as grader:
        verdicts = grader.grade([r["response"] for r in records], [r["gold"] for r in records])
    changed = sum(old["verdict"] != new["verdict"] for old, new in zip(records, verdicts))
    regraded = [old | new for old, new in zip(records, verdicts)]
    table = format_scores(summarize({path.stem: {"regraded": regraded}}))
    return f"{table}\n{changed} of {len(records)} verdicts differ from those in the file, which is unchanged"
