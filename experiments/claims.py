"""What the rows of compare.py show: a table, and each claim with a verdict and the numbers behind it.

Seeds and held-out problems are both samples, so standard errors are those of a mean over both. Arms are
compared on the same seeds and the same problems. RULE says how a verdict is reached.
Shapes: S seeds, P problems.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from arms import SELECTION
from torch import Tensor

from support.cli import BadInput
from support.run_folder import read_csv

ENDS = ("student", "teacher")  # scored without training: lower and upper reference
COSTS = ("steps_done", "response_tokens", "loss_tokens", "seconds", "rollout_s")
COLUMNS = ("arm", "seed", *COSTS, "accuracy", "last_box", "truncated", "mean_length", "greedy", "n")
NUMBERS = COLUMNS[2:]
COLUMNS += ("correct", "correct_greedy")  # all other columns are settings, in which the rows agree

MIN_SEEDS = 3  # with fewer, no claim is decided
MARGIN = 0.05  # of accuracy
TARGET = 0.9  # of full's gain over the untrained student
T_QUANTILES = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5 %, for 3 to 11 seeds
YES, NO, OPEN = "holds", "does not hold", "cannot be told"
RULE = f"""Verdicts: [ ] is a 95 % t interval with seeds - 1 degrees of freedom, +- a standard error. A claim
holds if the interval lies within its limits, does not hold if it lies outside, and otherwise
cannot be told. The limits of a difference between two accuracies:
  at least as good as  above -{100 * MARGIN:g} points
  equal to             between -{100 * MARGIN:g} and +{100 * MARGIN:g} points
  better than          above 0
The target is {TARGET:.0%} of full's gain over the untrained student. The cost of reaching it is
interpolated between two looks (scores along a run), and divided by the other arm's with the same seed.
"""

Row = dict[str, str]
Results = dict[str, dict[int, Row]]  # by arm and seed
Curves = dict[str, dict[tuple[int, float], Row]]  # by arm, and seed with the part of the run


def read_rows(path: Path, key: tuple[str, ...], columns: Collection[str] = ()) -> dict[tuple[str, ...], Row]:
    """The rows of a CSV file by their key. Raises BadInput if one lacks a column or is repeated."""
    rows: dict[tuple[str, ...], Row] = {}
    for number, row in enumerate(read_csv(path) if path.exists() else [], 2):
        if None in row or None in row.values() or not {*key, *columns} <= row.keys():
            what = f"{path} line {number} is not a complete row of results"
            raise BadInput(f"{what}: remove that line, or name another file")
        found = tuple(row[name] for name in key)
        if found in rows:
            raise BadInput(f"{path} line {number} repeats {' '.join(found)}: remove one of the two")
        rows[found] = row
    return rows


def check_settings(path: Path, rows: Iterable[Row], wanted: Row) -> None:
    """Raises BadInput, naming what differs, unless all rows have the settings `wanted`."""
    for row in rows:
        differing = [name for name in wanted if row.get(name) != wanted[name]]
        if differing:
            what = ", ".join(f"{name} {row.get(name)!r} and {wanted[name]!r}" for name in differing)
            raise BadInput(f"{path} would mix {what}: use the settings of its rows, or name another file")


def read(path: Path, settings: Row | None = None) -> Results:
    """The rows by arm and seed. Raises BadInput if the file is missing or damaged, or if it mixes settings.

    Without `settings` those of the first row are wanted.
    """
    rows = read_rows(path, ("arm", "seed"), COLUMNS)
    if not rows:
        raise BadInput(f"there is no row in {path}: run the comparison without --report first, or name --csv")
    first = next(iter(rows.values()))
    names = first.keys() - set(COLUMNS)  # a setting that this version does not know is None in `wanted`
    wanted = {name: first[name] for name in names} if settings is None else dict.fromkeys(names) | settings
    check_settings(path, rows.values(), wanted)
    results: Results = {}
    for (arm, seed), row in rows.items():
        try:
            [float(row[name]) for name in NUMBERS]
            for name in ("correct", "correct_greedy"):
                if len(row[name]) != int(row["n"]) or not set(row[name]) <= set("01"):
                    raise ValueError(f"{name} {row[name][:40]!r} is not {row['n']} digits 0 or 1")
            results.setdefault(arm, {})[int(seed)] = row
        except ValueError as error:
            raise BadInput(f"{path} has a damaged row ({error}): restore it, or name another file") from error
    return results


def curves_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_curves.csv")


def read_curves(path: Path) -> Curves:
    """The curve points of the comparison `path`; if a run was repeated, those of the later run."""
    curves: Curves = {}
    for row in read_csv(curves_path(path)) if curves_path(path).exists() else []:
        if None not in row.values():
            curves.setdefault(row["arm"], {})[int(row["seed"]), float(row["part"])] = row
    return curves


def missing(results: Results, arms: tuple[str, ...], seeds: int, first: int = 0) -> list[str]:
    """Each arm that lacks seeds from `first` on, with the missing seeds."""
    found = []
    for arm in (*ENDS, *arms):
        absent = [str(seed) for seed in range(first, first + seeds) if seed not in results.get(arm, {})]
        if absent:
            found.append(f"{arm} (seed {', '.join(absent)})" if arm in results else f"{arm} (all of it)")
    return found


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean of (S, P) and its standard error, where both rows and columns are samples.

    The variance is that of the row means / S + that of the column means / P - that of the residuals / SP,
    which both contain. With a single seed the error is that of the problems alone.
    """
    seeds, problems = values.shape
    mean = values.mean()
    row_means = values.mean(1)
    column_means = values.mean(0)
    residuals = values - row_means[:, None] - column_means + mean
    degrees = max((seeds - 1) * (problems - 1), 1)
    of_residuals = residuals.square().sum().item() / degrees / (seeds * problems)
    of_seeds = (row_means.var() / seeds).item() if seeds > 1 else 0.0
    of_problems = (column_means.var() / problems).item()
    return mean.item(), max(of_seeds, of_problems, of_seeds + of_problems - of_residuals) ** 0.5


def correct(rows: list[Row], column: str = "correct") -> Tensor:
    """Whether each answer is correct, 0 or 1, (S, P)."""
    return torch.tensor([[float(digit) for digit in row[column]] for row in rows], dtype=torch.float64)


def with_all(results: Results, *arms: str) -> Results:
    """The rows of these arms for the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(results.get(arm, {})) for arm in arms)))
    return {arm: {seed: results[arm][seed] for seed in seeds} for arm in arms}


def paired(results: Results, *arms: str) -> list[list[Row]]:
    """Their rows for the seeds that all of them have."""
    shared = with_all(results, *arms)
    return [list(shared[arm].values()) for arm in arms]


def values(results: Results, arm: str, column: str = "accuracy") -> list[float]:
    """The number of each seed, without empty cells."""
    return [float(row[column]) for row in results.get(arm, {}).values() if row.get(column)]


def gaps(results: Results, arm: str, other: str, column: str = "accuracy") -> list[float]:
    """The arm's number minus the other's, of each seed that both have."""
    return [float(ours[column]) - float(theirs[column]) for ours, theirs in zip(*paired(results, arm, other))]


def mean_of(rows: list[Row], column: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows)


def difference(results: Results, arm: str, other: str) -> tuple[float, float, int]:
    """Accuracy of `arm` minus that of `other` on the same seeds and problems, its error, and the seeds."""
    rows, others = paired(results, arm, other)
    return (*mean_and_se(correct(rows) - correct(others)), len(rows))


HEAD = ("sampled", "+- se", "greedy", "+- se", "- full", "+- se")
HEAD += ("tokens", "ratio", "seconds", "ratio", "seeds")
WIDTHS = (9, 8, 8, 8, 8, 8, 10, 7, 9, 7, 7)


def cells(results: Results, arm: str) -> list[str]:
    """An arm's line of the table: accuracies, the difference to full on the same seeds, costs and ratios."""
    rows = list(results[arm].values())
    ours, full = paired(results, arm, "full")  # both empty if full has none of these seeds
    shares = (*mean_and_se(correct(rows)), *mean_and_se(correct(rows, "correct_greedy")))
    found = [f"{share:.1%}" for share in shares]
    if arm == "full":
        found += ["", ""]
    else:
        gap, se, _ = difference(results, arm, "full") if full else (math.nan, math.nan, 0)
        found += [f"{gap:+.1%}", f"{se:.1%}"]
    for column, digits in (("response_tokens", 0), ("seconds", 1)):
        ratio = f"{mean_of(ours, column) / mean_of(full, column):.2f}" if full else "-"
        found += ["", ""] if arm in ENDS else [f"{mean_of(rows, column):,.{digits}f}", ratio]
    return [*found, str(len(rows))]


def table(results: Results, arms: tuple[str, ...]) -> str:
    lines = [("arm", HEAD)] + [(arm, cells(results, arm)) for arm in (*ENDS, *arms) if arm in results]
    return "\n".join(f"{arm:20}" + "".join(f"{c:>{w}}" for c, w in zip(line, WIDTHS)) for arm, line in lines)


def points_of(results: Results, curves: Curves, arm: str, seeds: list[int]) -> dict[float, list[Row]]:
    """The rows at each part of the run that was scored for all the seeds, in order; 1.0 is the end."""
    of_arm = curves.get(arm, {}) | {(seed, 1.0): results[arm][seed] for seed in seeds}
    points = {part: [of_arm.get((seed, part)) for seed in seeds] for _, part in sorted(of_arm)}
    return {part: points[part] for part in sorted(points) if None not in points[part]}


class Interval(NamedTuple):
    """A mean, its standard error, and the ends of its 95 % interval."""

    mean: float
    se: float
    low: float
    high: float


def interval(mean: float, se: float, seeds: int) -> Interval:
    """The t interval for MIN_SEEDS or more; for 12 or more it is slightly too wide."""
    spread = T_QUANTILES[min(seeds - MIN_SEEDS, len(T_QUANTILES) - 1)] * se
    return Interval(mean, se, mean - spread, mean + spread)


def interval_of(values: Collection[float]) -> Interval | None:
    """That of a mean over seeds; None with fewer than MIN_SEEDS."""
    if len(values) < MIN_SEEDS:
        return None
    return interval(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5, len(values))


def shown(found: Interval | None, form: str = ".0%") -> str:
    return f"{found.mean:{form}} [{found.low:{form}} to {found.high:{form}}]" if found else "no interval"


def verdict(found: Interval | None, low: float, high: float) -> str:
    """Whether the interval lies within the limits: YES; outside: NO; neither, or no interval: OPEN."""
    if found and low < found.low and found.high < high:
        return YES
    return NO if found and (found.high < low or high < found.low) else OPEN


class Claim(NamedTuple):
    """A claim holds if the interval of what `measure` finds lies between `low` and `high`."""

    text: str
    measure: Callable[["Claim", Results, Curves], tuple[str, str]]  # -> the verdict and its numbers
    arm: str
    other: str = "full"
    low: float = -math.inf
    high: float = math.inf
    column: str = ""  # of the cost


# Measures. All arms in the results have the same seeds.


def points(found: Interval) -> str:
    mean, se, low, high = (100 * x for x in found)
    return f"{mean:+.1f} +- {se:.1f} points [{low:+.1f} to {high:+.1f}]"


def accuracy(claim: Claim, results: Results, curves: Curves) -> tuple[str, str]:
    """The final accuracy of an arm minus that of another."""
    found = interval(*difference(results, claim.arm, claim.other))
    return verdict(found, claim.low, claim.high), points(found)


def gain(claim: Claim, results: Results, curves: Curves) -> tuple[str, str]:
    """The final accuracy of an arm minus the mean of the untrained student's and full's."""
    arm, full, student = (correct(rows) for rows in paired(results, claim.arm, "full", "student"))
    found = interval(*mean_and_se(arm - (full + student) / 2), len(arm))
    share = (arm - student).mean() / (full - student).mean()
    return verdict(found, claim.low, claim.high), f"{share:.0%}, {points(found)} from half of it"


def cost_of_target(rows: list[Row], start: float, target: float, column: str) -> tuple[float, bool]:
    """The cost at which a run first reaches the accuracy `target`, and True; else its whole cost, and False.

    `rows` are the looks at one run, `start` is the accuracy of the untrained student.
    """
    cost, reached = 0.0, start
    for row in rows:
        before, reached = reached, float(row["accuracy"])
        spent, cost = cost, float(row[column])
        if reached >= target:
            return spent + (target - before) / (reached - before) * (cost - spent), True
    return cost, False


def speed(claim: Claim, results: Results, curves: Curves) -> tuple[str, str]:
    """The cost of reaching the target, divided by another arm's with the same seed."""
    lacking = [arm for arm in (claim.arm, claim.other) if arm not in curves]
    if lacking:
        return OPEN, f"no curve recorded of {', '.join(lacking)}"
    start, end = (mean_of(list(results[arm].values()), "accuracy") for arm in ("student", "full"))
    target = start + TARGET * (end - start)
    seeds = sorted(results[claim.arm])
    costs, never, texts = {}, {}, []
    for arm in (claim.arm, claim.other):
        looks = points_of(results, curves, arm, seeds).values()
        found = [cost_of_target(list(rows), start, target, claim.column) for rows in zip(*looks)]
        costs[arm] = [cost for cost, _ in found]
        never[arm] = [str(seed) for seed, (_, reached) in zip(seeds, found) if not reached]
        texts.append(f"{arm} {statistics.fmean(costs[arm]):,.1f} in {len(looks)} looks")
    ratios = [ours / theirs for ours, theirs in zip(*costs.values())]
    found = interval_of(ratios)
    texts += [f"{arm} never with seed {', '.join(which)}" for arm, which in never.items() if which]
    outcome = verdict(found, claim.low, claim.high)
    # A run that never reaches the target counts with its whole cost, which is too little.
    if (never[claim.arm] and outcome == YES) or (never[claim.other] and outcome == NO):
        outcome = OPEN
    return outcome, "; ".join([f"{shown(found, '.2f')} until {target:.1%}", *texts])


def not_worse(arm: str) -> Claim:
    return Claim(f"{arm} is at least as good as full", accuracy, arm, low=-MARGIN)


def faster(arm: str, other: str, column: str, limit: float) -> Claim:
    text = f"{arm} reaches the target with less than {limit:.2f} of {other}'s {column.replace('_', ' ')}"
    return Claim(text, speed, arm, other, high=limit, column=column)


ADAPTIVE = (not_worse("adaptive"), faster("adaptive", "popd", "seconds", 1.0))
CLAIMS = (
    not_worse("topd-0.1"),
    faster("topd-0.1", "full", "response_tokens", 0.12),
    faster("topd-0.1", "full", "seconds", 0.2),
    not_worse("popd"),
    faster("popd", "full", "seconds", 1 / 3),
    not_worse("esr"),
    not_worse("topd-0.1-lr-0.1"),
    *ADAPTIVE,
    Claim("first is equal to topd-0.1", accuracy, "first", "topd-0.1", -MARGIN, MARGIN),
    *(Claim(f"first is better than {arm}", accuracy, "first", arm, low=0.0) for arm in SELECTION[1:]),
    *(faster("first", arm, "steps_done", 1.0) for arm in SELECTION[1:]),
)
CLOSING = (
    Claim("topd-0.1 fails by keeping less than half of full's gain", gain, "topd-0.1", high=0.0),
    Claim("popd does not fail, keeping more than half of full's gain", gain, "popd", low=0.0),
    *ADAPTIVE,
)


def format_claims(results: Results, curves: Curves, arms: tuple[str, ...], closing: bool) -> list[str]:
    """The rule, and a line for each claim about these arms: verdict, claim, numbers."""
    if max(map(len, results.values())) < MIN_SEEDS:
        return [f"what the papers claim cannot be told from fewer than {MIN_SEEDS} seeds"]
    lines = [RULE]
    for claim in CLOSING if closing else CLAIMS:
        if not {claim.arm, claim.other} <= {"full", *arms}:
            continue
        needed = tuple(dict.fromkeys(("student", "full", claim.arm, claim.other)))
        shared = with_all(results, *needed)
        seeds = shared["full"]
        if len(seeds) < MIN_SEEDS:
            found, numbers = OPEN, f"needs {MIN_SEEDS} seeds of {', '.join(needed)}"
        elif claim.measure is not accuracy and interval(*difference(shared, "full", "student")).low <= 0:
            found, numbers = OPEN, "full itself is not shown to be better than the untrained student"
        else:
            found, numbers = claim.measure(claim, shared, curves)
        lines.append(f"{found + ':':15} {claim.text}: {numbers}; {len(seeds)} seeds")
    return lines


def format_results(results: Results, curves: Curves, arms: tuple[str, ...], seeds: int, closing: bool) -> str:
    """The table, what is missing, and the claims."""
    lines = [table(results, arms), *(f"missing: {text}" for text in missing(results, arms, seeds))]
    if any(len(of_arm) == 1 for of_arm in results.values()):
        lines.append("+- of a single seed is over the problems alone: another seed may differ by more")
    if any(float(row.get("minutes", 0)) for of_arm in results.values() for row in of_arm.values()):
        lines.append("the runs were given equal times, not equal numbers of steps as in the papers")
    return "\n".join([*lines, "", *format_claims(results, curves, arms, closing)])
