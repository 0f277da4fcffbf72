"""What a list of graded answers says: accuracy, how far luck could have moved it, and what to be wary of.

A record is one answer, as eval_math.py writes it: index of its problem, extracted, correct, length, ...
"""

import math
import statistics
from collections import Counter, defaultdict

from grading import plain

Z = 1.96  # standard errors in half a 95 % interval


def by_problem(records: list[dict]) -> dict[int, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[record["index"]].append(record)
    return groups


def score(records: list[dict]) -> dict | None:
    """The numbers of a run; None if it has no answers.

    The n problems are what luck drew, so se is that of a mean over problems, however many answers each got.
    interval: 95 %, Wilson's, for as many independent answers as would have that se. pass@k is unbiased
    (Chen et al. 2021); maj@K is the vote of the K answers, alike in text.
    """
    if not records:
        return None
    groups = list(by_problem(records).values())
    means = [statistics.fmean(r["correct"] for r in group) for group in groups]
    n, p = len(means), statistics.fmean(means)
    se = statistics.stdev(means) / n**0.5 if n > 1 else 0.0
    lengths = sorted(r["length"] for r in records)
    result = {"accuracy": p, "se": se, "interval": wilson(p, p * (1 - p) / se**2 if se else n), "n": n}

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
        "lost": sum(r["verdict"] in ("timed out", "worker died") for r in records),
        "samples": (k := len(groups[0])),
    }
    if k > 1:
        tries = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
        right = [sum(r["correct"] for r in group) for group in groups]
        result["pass_at"] = {
            t: statistics.fmean(1 - math.comb(k - c, t) / math.comb(k, t) for c in right) for t in tries
        }
        result["majority"] = statistics.fmean(map(majority_is_right, groups))
    return result


def majority_is_right(group: list[dict]) -> bool:
    votes = Counter(plain(r["extracted"]) for r in group if r["extracted"] is not None)
    return any(r["correct"] and plain(r["extracted"]) == votes.most_common(1)[0][0] for r in group if votes)


def is_repeating(response: str) -> bool:
    """Whether the last 40 characters stand at least four times in the response: it ends in a loop."""
    return len(response) >= 160 and response.count(response[-40:]) >= 4


def wilson(p: float, n: float) -> list[float]:
    """95 % interval of a share p of n answers (Wilson 1927): inside 0 and 1, and no point at 0 or 1."""
    centre, spread = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return [max(0.0, (centre - spread) / (1 + Z**2 / n)), min(1.0, (centre + spread) / (1 + Z**2 / n))]


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
    result = {"difference": mean, "se": se, "interval": [mean - Z * se, mean + Z * se]}
    return result | {"better": better, "worse": worse, "p": min(1.0, 2 * tail / 2 ** (better + worse))}


def summarize(runs: dict[str, dict[str, list[dict]]]) -> dict:
    """{model: {benchmark: records}} -> scores of each, and differences of the later models to the first."""
    names, models = list(runs), list(runs.values())
    scores = {f"{name} {b}": score(r) for name, of in runs.items() for b, r in of.items()}
    pairs = {
        f"{name} - {names[0]}, {b}": difference(models[0][b], records)
        for name in names[1:]
        for b, records in runs[name].items()
    }
    return {"scores": scores, "differences": pairs}


def tell(summary: dict) -> str:
    """A table of the scores, with what there is to be wary of, and a line for each difference."""
    width = max(map(len, summary["scores"]))
    head = ("accuracy", "+- se", "95 % interval", "strict", "last box", "no answer", "truncated", "repeating")
    widths = (9, 7, 18, 9, 10, 11, 11, 11, 8, 7, 7, 10)
    head += ("length", "p95", "n", "tokens/s")
    lines = [" " * width + "".join(f"{h:>{w}}" for h, w in zip(head, widths))]
    for name, s in summary["scores"].items():
        low, high = s["interval"]
        cells = [f"{s['accuracy']:.1%}", f"{s['se']:.1%}", f"{low:.1%} to {high:.1%}"]
        cells += [f"{s[k]:.1%}" for k in ("strict", "last_box", "no_answer", "truncated", "repeating")]
        cells += [f"{s[k]:.0f}" for k in ("mean_length", "p95_length", "n", "tokens_per_second")]
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))
        lines += ["  " + remark for remark in remarks(s)]
    lines += [f"{name}: {difference_text(d)}" for name, d in summary["differences"].items()]
    return "\n".join(lines)


def difference_text(d: dict) -> str:
    low, high = d["interval"]
    text = f"{d['difference']:+.1%} +- {d['se']:.1%}"
    if d["se"]:  # where no problem differs, luck cannot be told from sameness
        text += f", 95 % interval {low:+.1%} to {high:+.1%}"
    return f"{text}; better on {d['better']}, worse on {d['worse']} problems, sign test p = {d['p']:.2g}"


def remarks(s: dict) -> list[str]:
    """What a score needs said besides its line in the table."""
    found, k = [], s["samples"]
    if k > 1:
        tries = ", ".join(f"pass@{tries} {share:.1%}" for tries, share in s["pass_at"].items())
        found.append(f"accuracy is avg@{k}; {tries}, maj@{k} {s['majority']:.1%}")
    if golds := s["unreadable_gold"]:
        named = ", ".join(repr(gold[:40]) for gold in golds[:3])
        found.append(
            f"{len(golds)} gold answers that math-verify cannot read, compared as text alone: {named}"
        )
    if s["lost"]:
        found.append(f"{s['lost']} answers hung the grader or killed it, and count as wrong")
    return found
