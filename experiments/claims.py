"""What the rows of compare.py show: a table, and each claim with a verdict and the numbers behind it.

Seeds and held-out problems are both samples, so a standard error is that of a mean over both. Arms are
compared on the same seeds and the same problems. Shapes: S seeds, P problems.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from arms import SELECTION
from torch import Tensor

from support.cli import BadInput
from support.run_folder import read_csv

ENDS = ("student", "teacher")  # scored without training: floor and ceiling
COSTS = ("steps_done", "response_tokens", "loss_tokens", "seconds", "rollout_s")
COLUMNS = ("arm", "seed", *COSTS, "accuracy", "last_box", "truncated", "mean_length", "greedy", "n")
COLUMNS += ("correct", "correct_greedy")  # all other columns are settings, in which the rows agree
MIN_SEEDS = 3  # with fewer, no claim is decided
WIDE = 0.05  # two accuracies are not called equal if two standard errors exceed this
YES, NO, OPEN = "holds", "does not hold", "cannot be decided yet"

Row = dict[str, str]
Results = dict[str, dict[int, Row]]  # by arm and seed
Curves = dict[str, dict[tuple[int, float], Row]]  # by arm, and seed with the part of the run


def read(path: Path) -> Results:
    """The rows by arm and seed. Raises BadInput if the file is missing, damaged, or mixes settings."""
    if not path.is_file():
        raise BadInput(f"there is no {path}: run the comparison without --report first, or name --csv")
    results: dict[str, dict[str, Row]] = {}
    for number, row in enumerate(read_csv(path), 2):
        if None in row or None in row.values() or not set(COLUMNS) <= row.keys():
            raise BadInput(f"{path} line {number} is not a complete row of a comparison: remove that line")
        of_arm = results.setdefault(row["arm"], {})
        if row["seed"] in of_arm:
            raise BadInput(f"{path} has arm {row['arm']} with seed {row['seed']} twice: remove one of them")
        check_settings(path, results, {name: row[name] for name in row if name not in COLUMNS})
        of_arm[row["seed"]] = row
    return {arm: {int(seed): row for seed, row in of_arm.items()} for arm, of_arm in results.items()}


def check_settings(path: Path, results: dict, wanted: dict[str, str]) -> None:
    """Raises BadInput, naming what differs, unless the rows, which agree with each other, have `wanted`."""
    found = next((row for of_arm in results.values() for row in of_arm.values()), wanted)
    names = sorted((found.keys() | wanted.keys()) - set(COLUMNS))
    differing = [name for name in names if found.get(name) != wanted.get(name)]
    if differing:
        what = ", ".join(f"{name} {found.get(name)!r} and {wanted.get(name)!r}" for name in differing)
        raise BadInput(f"{path} would mix {what}: use the settings of its rows, or another file with --csv")


def curves_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_curves.csv")


def read_curves(path: Path) -> Curves:
    """The curve points that belong to the comparison `path`; of a run that was repeated, the later ones."""
    curves: Curves = {}
    if curves_path(path).exists():
        for row in read_csv(curves_path(path)):
            if None not in row.values():
                curves.setdefault(row["arm"], {})[int(row["seed"]), float(row["part"])] = row
    return curves


def missing(results: Results, arms: tuple[str, ...], seeds: int) -> list[str]:
    """Each arm that lacks seeds, with these."""
    found = []
    for arm in (*ENDS, *arms):
        absent = [str(seed) for seed in range(seeds) if seed not in results.get(arm, {})]
        if absent:
            found.append(f"{arm} (seed {', '.join(absent)})" if arm in results else f"{arm} (all of it)")
    return found


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean of (S, P) and its standard error, where both rows and columns are samples.

    The variance is that of the row means / S + that of the column means / P - that of the residuals / SP,
    which both contain. One seed says nothing about seeds: the error is then that of the problems alone.
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


def common_seeds(results: Results, *arms: str) -> list[int]:
    return sorted(set.intersection(*(set(results.get(arm, {})) for arm in arms)))


def paired(results: Results, *arms: str) -> list[list[Row]]:
    """The rows of each arm for the seeds that all of them have."""
    return [[results[arm][seed] for seed in common_seeds(results, *arms)] for arm in arms]


def mean_of(rows: list[Row], column: str) -> float:
    return sum(float(row[column]) for row in rows) / len(rows)


def ratio(results: Results, arm: str, other: str, column: str) -> float:
    rows, others = paired(results, arm, other)
    return mean_of(rows, column) / mean_of(others, column)


def difference(rows: list[Row], others: list[Row]) -> tuple[float, float]:
    """Accuracy of `rows` minus that of `others`, paired by seed and problem, and its standard error."""
    return mean_and_se(correct(rows) - correct(others))


HEAD = ("sampled", "+- se", "greedy", "+- se", "- full", "+- se")
HEAD += ("tokens", "ratio", "seconds", "ratio", "seeds")
WIDTHS = (9, 8, 8, 8, 8, 8, 10, 7, 9, 7, 7)


def cells(results: Results, arm: str) -> list[str]:
    """An arm's line of the table: accuracies, the difference to full on the same seeds, costs and ratios."""
    rows = list(results[arm].values())
    pair = paired(results, arm, "full")
    gap, se = difference(*pair) if pair[0] else (math.nan, math.nan)
    found = [
        f"{x:.1%}" for column in ("correct", "correct_greedy") for x in mean_and_se(correct(rows, column))
    ]
    found += ["", ""] if arm == "full" else [f"{gap:+.1%}", f"{se:.1%}"]
    for column, digits in (("response_tokens", 0), ("seconds", 1)):
        times = ratio(results, arm, "full", column) if pair[0] else math.nan
        cost = [f"{mean_of(rows, column):,.{digits}f}", f"{times:.2f}"]
        found += ["", ""] if arm in ENDS else cost
    return ["-" if "nan" in cell else cell for cell in [*found, str(len(rows))]]


def table(results: Results, arms: tuple[str, ...]) -> str:
    lines = [("arm", HEAD)] + [(arm, cells(results, arm)) for arm in (*ENDS, *arms) if arm in results]
    return "\n".join(f"{arm:20}" + "".join(f"{c:>{w}}" for c, w in zip(line, WIDTHS)) for arm, line in lines)


def not_below(rows: list[Row], others: list[Row]) -> tuple[bool | None, str]:
    """Whether the accuracy of `rows` is at most two standard errors below that of `others`, and the numbers.

    None if the difference is not significant and its interval too wide to call the two equal.
    """
    gap, se = difference(rows, others)
    decided = 2 * se <= WIDE or abs(gap) > 2 * se
    return (gap >= -2 * se if decided else None), f"{100 * gap:+.1f} +- {100 * se:.1f} points"


def arm_not_below(results: Results, arm: str, other: str) -> tuple[bool | None, str]:
    return not_below(*paired(results, arm, other))


def points_of(results: Results, curves: Curves, arm: str, seeds: list[int]) -> dict[float, list[Row]]:
    """The rows at each part of the run that was scored for all the seeds, in order; 1.0 is the end."""
    of_arm = curves.get(arm, {}) | {(seed, 1.0): results[arm][seed] for seed in seeds}
    points = {part: [of_arm.get((seed, part)) for seed in seeds] for _, part in sorted(of_arm)}
    return {part: points[part] for part in sorted(points) if None not in points[part]}


def time_to(results: Results, curves: Curves, arm: str, other: str) -> tuple[float, float] | None:
    """The part of its run from which on `arm` has the final accuracy of `other` without losing it again.

    Also its seconds until then as a fraction of all those of `other`. None if it ends below.
    """
    _, final = paired(results, arm, other)
    points = points_of(results, curves, arm, common_seeds(results, arm, other))
    found = None
    for part, rows in reversed(points.items()):
        if not not_below(rows, final)[0]:
            break
        found = part, mean_of(rows, "seconds") / mean_of(final, "seconds")
    return found


def compare_with_full(results: Results, curves: Curves, arm: str) -> list[str]:
    """Lines for runs by the clock: `arm` minus full at equal times, and at equal numbers of tokens.

    The latter compares the last curve point of each with at most the tokens that both had sampled at their
    ends; 5 % more count as equal.
    """
    seeds = common_seeds(results, arm, "full")
    ends = paired(results, arm, "full")
    tokens = 1.05 * min(mean_of(rows, "response_tokens") for rows in ends)
    early = []
    for each in (arm, "full"):
        points = points_of(results, curves, each, seeds).values()
        within = [rows for rows in points if mean_of(rows, "response_tokens") <= tokens]
        early += within[-1:]
    lines = []
    for what, pair in (("same time", ends), ("no more tokens", early)):
        line = f"{arm + ', ' + what:28}"
        if len(pair) < 2:
            lines.append(f"{line} no curve point that early")
            continue
        gap, se = difference(*pair)
        line += f"{gap:>+7.1%}{se:>8.1%}"
        line += "".join(f"{mean_of(rows, 'response_tokens'):>10,.0f}" for rows in pair)
        line += "".join(f"{mean_of(rows, 'seconds') / 60:>9.1f}" for rows in pair)
        lines.append(line)
    return lines


# Claims: (results, curves) -> the verdict and its numbers.


def verdict(*parts: bool | None) -> str:
    """Of a claim that consists of several parts: one that is False outweighs those that are undecided."""
    if False in parts:
        return NO
    return OPEN if None in parts else YES


def topd_is_cheap(results: Results, curves: Curves) -> tuple[str, str]:
    holds, gap = arm_not_below(results, "topd-0.1", "full")
    tokens = ratio(results, "topd-0.1", "full", "response_tokens")
    seconds = ratio(results, "topd-0.1", "full", "seconds")
    numbers = f"{gap}, {tokens:.1%} of the tokens, {seconds:.1%} of the time"
    return verdict(holds, tokens <= 0.12, seconds <= 0.2), numbers  # 12 %: full answers end before T


def popd_is_early(results: Results, curves: Curves) -> tuple[str, str]:
    if "popd" not in curves:
        return OPEN, "there is no curve of popd"
    of_popd = time_to(results, curves, "popd", "full")
    of_full = time_to(results, curves, "full", "full")
    if of_popd is None:
        holds, gap = arm_not_below(results, "popd", "full")
        return verdict(holds), f"{gap} at its end"
    own = f"full itself after {of_full[1]:.0%}" if of_full else "undecided for full itself"
    numbers = f"after {of_popd[0]:.0%} of its steps and {of_popd[1]:.0%} of full's time; {own}"
    return verdict(of_popd[1] <= 1 / 3), numbers


def not_worse(arm: str) -> Callable[[Results, Curves], tuple[str, str]]:
    def claim(results: Results, curves: Curves) -> tuple[str, str]:
        holds, gap = arm_not_below(results, arm, "full")
        return verdict(holds), gap

    return claim


def masked_is_topd(results: Results, curves: Curves) -> tuple[str, str]:
    holds, gap = arm_not_below(results, "first", "topd-0.1")
    reverse, _ = arm_not_below(results, "topd-0.1", "first")
    times = ratio(results, "first", "topd-0.1", "seconds")
    return verdict(holds, reverse), f"{gap} for {times:.1f} times the time"


def first_tokens_are_best(results: Results, curves: Curves) -> tuple[str, str]:
    found = {arm: arm_not_below(results, arm, "first") for arm in SELECTION[1:]}
    below = [None if holds is None else not holds for holds, _ in found.values()]
    return verdict(*below), ", ".join(f"{arm} {gap}" for arm, (_, gap) in found.items())


def adaptive_is_faster(results: Results, curves: Curves) -> tuple[str, str]:
    holds, gap = arm_not_below(results, "adaptive", "full")
    of_full = ratio(results, "adaptive", "full", "seconds")
    of_popd = ratio(results, "adaptive", "popd", "seconds")
    return verdict(holds, of_popd < 1), f"{gap}, {of_full:.0%} of full's time, {of_popd:.0%} of popd's"


def truncation_fails(results: Results, curves: Curves) -> tuple[str, str]:
    """To fail is to end significantly below full, with less than half of full's gain."""
    arms = ("student", "full", "topd-0.1", "popd")
    means = {arm: mean_of(rows, "accuracy") for arm, rows in zip(arms, paired(results, *arms))}
    gain = means["full"] - means["student"]
    if gain <= 0:
        return OPEN, "full itself gains nothing"
    fails = {}
    texts = []
    for arm in ("topd-0.1", "popd"):
        holds, gap = arm_not_below(results, arm, "full")
        share = (means[arm] - means["student"]) / gain
        fails[arm] = None if holds is None else not holds and share < 0.5
        texts.append(f"{arm} has {share:.0%} of full's gain, {gap}")
    popd_works = None if fails["popd"] is None else not fails["popd"]
    return verdict(fails["topd-0.1"], popd_works), "; ".join(texts)


TOPD = ("topd-0.1",)
WEIGHT = "topd-0.1-weight"
CLAIMS = (  # the arms that are needed besides full, the test, the claim
    (TOPD, topd_is_cheap, "TOPD 0.1 reaches full's accuracy with a tenth of the tokens, in 1/5 of the time"),
    (("popd",), popd_is_early, "POPD reaches full's final accuracy in at most 1/3 of its time"),
    (("esr",), not_worse("esr"), "ESR is at least as good as full"),
    ((WEIGHT,), not_worse(WEIGHT), "TOPD 0.1 at weight 1/T still reaches full's accuracy"),
    (("first", *TOPD), masked_is_topd, "full rollouts with a loss on the first tenth alone equal TOPD 0.1"),
    (SELECTION, first_tokens_are_best, "of all ways to choose a tenth of the tokens, the first are the best"),
    (("adaptive", "popd"), adaptive_is_faster, "adaptive reaches full's accuracy in less time than POPD"),
)
CLOSING = ((("student", "topd-0.1", "popd"), truncation_fails, "truncation fails, POPD does not"), CLAIMS[-1])


def format_claims(results: Results, curves: Curves, arms: tuple[str, ...], closing: bool) -> list[str]:
    """Two lines for each claim about these arms: the verdict, and the numbers behind it."""
    lines = []
    for needed, claim, text in CLOSING if closing else CLAIMS:
        if not set(needed) <= {*ENDS, *arms}:
            continue
        common = common_seeds(results, "full", *needed)
        if len(common) >= MIN_SEEDS:
            found, numbers = claim(results, curves)
        else:
            lacking = [arm for arm in ("full", *needed) if len(results.get(arm, {})) < MIN_SEEDS]
            found, numbers = OPEN, f"needs {MIN_SEEDS} seeds of {', '.join(lacking) or 'all its arms'}"
        lines += [f"{found}: {text}", f"    {numbers}; seeds in common: {len(common)}"]
    return lines


def format_results(results: Results, curves: Curves, arms: tuple[str, ...], seeds: int, closing: bool) -> str:
    """The table, what is missing, and the claims; for runs by the clock each arm beside full instead."""
    lines = [table(results, arms), *(f"missing: {text}" for text in missing(results, arms, seeds))]
    if any(len(of_arm) == 1 for of_arm in results.values()):
        lines.append("+- of a single seed is over the problems alone: another seed may differ by more")
    lines.append("")
    rows = [row for of_arm in results.values() for row in of_arm.values()]
    if all(float(row.get("minutes", 0)) == 0 for row in rows):
        return "\n".join(lines + format_claims(results, curves, arms, closing))
    lines.append(f"{'sampled accuracy':28}  - full   +- se    tokens    full's  minutes   full's")
    for arm in arms:
        if arm != "full" and common_seeds(results, arm, "full"):
            lines += compare_with_full(results, curves, arm)
    lines += ["", "the papers' claims are about equal numbers of steps: run without --minutes to test them"]
    return "\n".join(lines)
