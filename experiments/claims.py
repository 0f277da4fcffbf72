"""What the rows of compare.py say: a table, and each claim with a verdict and the numbers that it rests on.

Seeds and held-out problems are both drawn by luck, so a standard error is that of a mean over both; arms are
compared on the same seeds and the same problems. Shapes: S seeds, P problems.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from arms import SELECTION
from torch import Tensor

import report
from cli import BadInput

ENDS = ("student", "teacher")  # scored without training: floor and ceiling
COSTS = ("steps_done", "response_tokens", "loss_tokens", "seconds", "rollout_s")
COLUMNS = ("arm", "seed", *COSTS, "accuracy", "last_box", "truncated", "mean_length", "greedy", "n")
COLUMNS += ("correct", "correct_greedy")  # the others are settings, in which all rows agree
LEAST = 3  # seeds, below which nothing is told
WIDE = 0.05  # two standard errors above this many points: too coarse to call two accuracies the same
YES, NO, OPEN = "holds", "does not hold", "cannot be told yet"

Results = dict[str, dict[int, dict[str, str]]]  # arm, seed -> row


def read(path: Path) -> Results:
    """The rows by arm and seed. Raises BadInput if the file is not there, broken, or of several settings."""
    if not path.is_file():
        raise BadInput(f"there is no {path}: run the comparison without --report first, or name --csv")
    rows, results = report.read_csv(path), {}
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values() or not set(COLUMNS) <= row.keys():
            raise BadInput(f"{path} line {number} is not a whole row of a comparison: drop that line")
        if row["seed"] in (others := results.setdefault(row["arm"], {})):
            raise BadInput(f"{path} has arm {row['arm']} with seed {row['seed']} twice: drop one of them")
        check_settings(path, results, {k: v for k, v in row.items() if k not in COLUMNS})
        others[row["seed"]] = row
    return {arm: {int(seed): row for seed, row in of_arm.items()} for arm, of_arm in results.items()}


def check_settings(path: Path, results: dict, wanted: dict[str, str]) -> None:
    """Raises BadInput, naming what differs, unless `results`, alike among themselves, are of `wanted`."""
    found = next((row for rows in results.values() for row in rows.values()), wanted)
    keys = sorted((found.keys() | wanted.keys()) - set(COLUMNS))
    if other := [
        f"{k} {found.get(k)!r} and {wanted.get(k)!r}" for k in keys if found.get(k) != wanted.get(k)
    ]:
        what = f"{path} would mix {', '.join(other)}"
        raise BadInput(f"{what}: give the settings that its rows have, or name another file with --csv")


def curves_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_curves.csv")


def read_curves(path: Path) -> Results:
    """The rows along the runs, by arm and (seed, part of the run); of a run made twice, the later."""
    curves = {}
    for row in report.read_csv(curves_of(path)) if curves_of(path).exists() else []:
        if None not in row.values():
            curves.setdefault(row["arm"], {})[int(row["seed"]), float(row["part"])] = row
    return curves


def missing(results: Results, arms: tuple[str, ...], seeds: int) -> list[str]:
    """Each arm that lacks seeds, with them."""
    lacking = {arm: [s for s in range(seeds) if s not in results.get(arm, {})] for arm in (*ENDS, *arms)}
    lists = {arm: ", ".join(map(str, of_arm)) for arm, of_arm in lacking.items() if of_arm}
    return [f"{arm} (seed {text})" if arm in results else f"{arm} (all of it)" for arm, text in lists.items()]


def two_way(values: Tensor) -> tuple[float, float]:
    """Mean of (S, P), and its standard error where both rows and columns are samples.

    Variance of the row means / S + of the column means / P - of what is left / SP, which both contain. One
    seed says nothing of seeds: the error is then of the problems alone, and `tell` says so.
    """
    (s, p), mean, rows, columns = values.shape, values.mean(), values.mean(1), values.mean(0)
    rest = (values - rows[:, None] - columns + mean).square().sum() / max((s - 1) * (p - 1), 1) / (s * p)
    of_seeds, of_problems = (rows.var() / s).item() if s > 1 else 0.0, (columns.var() / p).item()
    return mean.item(), max(of_seeds, of_problems, of_seeds + of_problems - rest.item()) ** 0.5


def right(rows: list[dict[str, str]], column: str = "correct") -> Tensor:
    return torch.tensor(
        [[float(mark) for mark in row[column]] for row in rows], dtype=torch.float64
    )  # (S, P)


def in_common(results: Results, *arms: str) -> list[int]:
    """The seeds that all the arms have."""
    return sorted(set.intersection(*(set(results.get(arm, {})) for arm in arms)))


def mean_of(rows: list[dict[str, str]], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def mean(results: Results, arm: str, column: str, seeds: list[int]) -> float:
    return mean_of([results[arm][seed] for seed in seeds], column)


def ratio(results: Results, arm: str, other: str, column: str) -> float:
    seeds = in_common(results, arm, other)
    return mean(results, arm, column, seeds) / mean(results, other, column, seeds)


def difference(rows: list[dict], others: list[dict]) -> tuple[float, float]:
    """Accuracy of `rows` minus that of `others`, paired by seed and problem, and its standard error."""
    return two_way(right(rows) - right(others))


HEAD = (
    "sampled",
    "+- se",
    "greedy",
    "+- se",
    "- full",
    "+- se",
    "tokens",
    "ratio",
    "seconds",
    "ratio",
    "seeds",
)
WIDTHS = (9, 8, 8, 8, 8, 8, 10, 7, 9, 7, 7)


def cells(results: Results, arm: str) -> list[str]:
    """The line of an arm: accuracies, sampled minus full's on the same seeds, and costs beside full's."""
    rows, seeds = list(results[arm].values()), in_common(results, arm, "full")
    found = [f"{x:.1%}" for column in ("correct", "correct_greedy") for x in two_way(right(rows, column))]
    gap = difference(*([results[a][s] for s in seeds] for a in (arm, "full"))) if seeds else (math.nan,) * 2
    found += [f"{gap[0]:+.1%}", f"{gap[1]:.1%}"] if arm != "full" else ["", ""]
    for column, digits in (("response_tokens", 0), ("seconds", 1)) if arm not in ENDS else ():
        found.append(f"{mean(results, arm, column, list(results[arm])):,.{digits}f}")
        found.append(f"{ratio(results, arm, 'full', column):.2f}" if seeds else "-")
    found += [""] * (len(HEAD) - 1 - len(found)) + [str(len(rows))]
    return ["-" if "nan" in cell else cell for cell in found]


def table(results: Results, arms: tuple[str, ...]) -> str:
    lines = [("arm", HEAD)] + [(arm, cells(results, arm)) for arm in (*ENDS, *arms) if arm in results]
    return "\n".join(f"{arm:20}" + "".join(f"{c:>{w}}" for c, w in zip(line, WIDTHS)) for arm, line in lines)


def reaches(rows: list[dict], others: list[dict]) -> tuple[bool | None, str]:
    """Whether `rows` are at most two standard errors below `others`; None if these are too wide to tell."""
    gap, se = difference(rows, others)
    told = 2 * se <= WIDE or abs(gap) > 2 * se
    return (gap >= -2 * se if told else None), f"{100 * gap:+.1f} +- {100 * se:.1f} points"


def arm_reaches(results: Results, arm: str, other: str) -> tuple[bool | None, str]:
    seeds = in_common(results, arm, other)
    return reaches([results[arm][s] for s in seeds], [results[other][s] for s in seeds])


def time_to(results: Results, curves: Results, arm: str, other: str) -> tuple[float, float] | None:
    """From which part of its run on `arm` is at the final accuracy of `other` and stays there, and its
    seconds until then as a share of all those of `other`; None if it is not there at its end.
    """
    seeds, found = in_common(results, arm, other), None
    ends, total = [results[other][s] for s in seeds], mean(results, other, "seconds", seeds)
    of_arm = curves.get(arm, {}) | {(s, 1.0): results[arm][s] for s in seeds}
    for part in sorted({part for _, part in of_arm}, reverse=True):
        rows = [of_arm.get((s, part)) for s in seeds]
        if None in rows or not reaches(rows, ends)[0]:
            break
        found = part, mean_of(rows, "seconds") / total
    return found


def until(results: Results, curves: Results, arm: str, tokens: float, seeds: list[int]) -> list[dict] | None:
    """Rows of the last point of `arm` with at most `tokens` sampled; None if its first one has more."""
    ends = {(s, 1.0): results[arm][s] for s in seeds}
    of_arm, found = curves.get(arm, {}) | ends, None
    for part in sorted({part for _, part in of_arm}):
        rows = [of_arm.get((s, part)) for s in seeds]
        if None not in rows and mean_of(rows, "response_tokens") <= tokens:
            found = rows
    return found


def beside_full(results: Results, curves: Results, arm: str) -> list[str]:
    """Lines for a run by the clock: `arm` minus full at the same time, and where neither had sampled more.

    That is, each at its last score with at most the tokens that both had in the end; 5 % more count as equal.
    """
    seeds = in_common(results, arm, "full")
    ends = [[results[a][s] for s in seeds] for a in (arm, "full")]
    least = 1.05 * min(mean_of(rows, "response_tokens") for rows in ends)
    lines = []
    for what, pair in (
        ("same time", ends),
        ("no more tokens", [until(results, curves, a, least, seeds) for a in (arm, "full")]),
    ):
        line = f"{arm + ', ' + what:28}"
        if None not in pair:
            gap, se = difference(*pair)
            tokens, minutes = ([mean_of(rows, c) for rows in pair] for c in ("response_tokens", "seconds"))
            line += f"{gap:>+7.1%}{se:>8.1%}" + "".join(f"{x:>10,.0f}" for x in tokens)
            line += "".join(f"{x / 60:>9.1f}" for x in minutes)
        lines.append(line if None not in pair else f"{line} no score so early")
    return lines


# Claims: (results, curves) -> the verdict and its numbers. False in the parts of a verdict outweighs None.


def verdict(*parts: bool | None) -> str:
    return NO if False in parts else OPEN if None in parts else YES


def cheap(results: Results, curves: Results) -> tuple[str, str]:
    told, gap = arm_reaches(results, "topd-0.1", "full")
    tokens, seconds = (ratio(results, "topd-0.1", "full", c) for c in ("response_tokens", "seconds"))
    numbers = f"{gap}, {tokens:.1%} of the tokens, {seconds:.1%} of the time"
    return verdict(told, tokens <= 0.12, seconds <= 0.2), numbers  # 12 %: full answers end before T


def early(results: Results, curves: Results) -> tuple[str, str]:
    there, of_full = (time_to(results, curves, arm, "full") for arm in ("popd", "full"))
    if "popd" not in curves:
        return OPEN, "there is no curve of popd"
    if there is None:
        told, gap = arm_reaches(results, "popd", "full")
        return verdict(told), f"{gap} at its end"
    own = f"full itself after {of_full[1]:.0%}" if of_full else "full itself cannot be told"
    numbers = f"after {there[0]:.0%} of its steps and {there[1]:.0%} of full's time; {own}"
    return verdict(there[1] <= 1 / 3), numbers


def not_worse(arm: str) -> Callable:
    def claim(results: Results, curves: Results) -> tuple[str, str]:
        told, gap = arm_reaches(results, arm, "full")
        return verdict(told), gap

    return claim


def masked(results: Results, curves: Results) -> tuple[str, str]:
    told, gap = arm_reaches(results, "first", "topd-0.1")
    back, _ = arm_reaches(results, "topd-0.1", "first")
    times = ratio(results, "first", "topd-0.1", "seconds")
    return verdict(told, back), f"{gap} for {times:.1f} times the time"


def by_position(results: Results, curves: Results) -> tuple[str, str]:
    found = {arm: arm_reaches(results, arm, "first") for arm in SELECTION[1:]}
    below = [None if told is None else not told for told, _ in found.values()]
    return verdict(*below), ", ".join(f"{arm} {gap}" for arm, (_, gap) in found.items())


def grows(results: Results, curves: Results) -> tuple[str, str]:
    told, gap = arm_reaches(results, "adaptive", "full")
    times = [ratio(results, "adaptive", other, "seconds") for other in ("full", "popd")]
    return verdict(told, times[1] < 1), f"{gap}, {times[0]:.0%} of full's time, {times[1]:.0%} of popd's"


def closes(results: Results, curves: Results) -> tuple[str, str]:
    """To fail: to end below full, by more than luck, with less than half of what full gains."""
    seeds = in_common(results, "student", "topd-0.1", "popd", "full")
    floor, full = (mean(results, arm, "accuracy", seeds) for arm in ("student", "full"))
    if full <= floor:
        return OPEN, "full gains nothing itself"
    fails, texts = [], []
    for arm in ("topd-0.1", "popd"):
        told, gap = arm_reaches(results, arm, "full")
        share = (mean(results, arm, "accuracy", seeds) - floor) / (full - floor)
        fails.append(None if told is None else not told and share < 0.5)
        texts.append(f"{arm} has {share:.0%} of full's gain, {gap}")
    return verdict(fails[0], None if fails[1] is None else not fails[1]), "; ".join(texts)


WEIGHT = "topd-0.1-weight"
CLAIMS = (  # the arms that it needs besides full, how it is told, what is claimed
    (("topd-0.1",), cheap, "TOPD 0.1 reaches full's accuracy with a tenth of the tokens, in 1/5 of the time"),
    (("popd",), early, "POPD reaches full's final accuracy in at most 1/3 of its time"),
    (("esr",), not_worse("esr"), "ESR is at least as good as full"),
    ((WEIGHT,), not_worse(WEIGHT), "TOPD 0.1 at weight 1/T still reaches full's accuracy"),
    (("first", "topd-0.1"), masked, "full rollouts masked to the first tenth end where TOPD 0.1 does"),
    (SELECTION, by_position, "of equally many tokens, the first teach more than any others"),
    (("adaptive", "popd"), grows, "adaptive reaches full's accuracy in less time than POPD"),
)
CLOSING = ((("student", "topd-0.1", "popd"), closes, "truncation fails, POPD does not"), CLAIMS[-1])


def tell(results: Results, curves: Results, arms: tuple[str, ...], seeds: int, closing: bool) -> str:
    """The table, what is missing, and each claim; of runs by the clock instead each arm beside full."""
    lines = [table(results, arms), *(f"missing: {text}" for text in missing(results, arms, seeds))]
    if any(len(rows) == 1 for rows in results.values()):
        lines.append("+- of a single seed is over the problems alone: another run may differ by more")
    if any(row.get("minutes", "0.0") != "0.0" for rows in results.values() for row in rows.values()):
        timed = [arm for arm in arms if arm != "full" and in_common(results, arm, "full")]
        head = "  - full   +- se    tokens    full's  minutes   full's"
        lines += ["", f"{'sampled accuracy':28}{head}"]
        lines += [line for arm in timed for line in beside_full(results, curves, arm)]
        return "\n".join(
            [*lines, "", "the papers' claims are of equal steps: for them, run without --minutes"]
        )
    lines.append("")
    for needed, claim, text in CLOSING if closing else CLAIMS:
        if not set(needed) <= {*ENDS, *arms}:
            continue  # about others
        common = in_common(results, "full", *needed)
        if len(common) >= LEAST:
            found, numbers = claim(results, curves)
        else:
            lacking = [arm for arm in ("full", *needed) if len(results.get(arm, {})) < LEAST]
            found, numbers = OPEN, f"needs {LEAST} seeds of {', '.join(lacking) or 'all its arms'}"
        lines += [f"{found}: {text}", f"    {numbers}; seeds in common: {len(common)}"]
    return "\n".join(lines)
