"""The figures of compare.py and probe.py, from their CSV files alone, and the probes' readings.

results/compare.png            accuracy against tokens sampled and against seconds of training
results/compare_selection.png  accuracy against steps, with a loss on as many tokens, chosen in different ways
results/probe_NAME.png         the curves of a probe, and its reading: the result in one sentence

A figure names the rows that its file lacks.
"""

import textwrap
from pathlib import Path
from typing import NamedTuple

import claims
import matplotlib
from arms import GROUPS
from claims import Curves, Results
from cycler import cycler

from support.cli import BadInput
from support.run_folder import read_csv

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

# The colours of Okabe and Ito, which colour-blind readers can distinguish; markers and lines differ too.
COLOURS = ["#000000", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", *3 * ["#999999"]]
LINES = ["-", "--", "-.", "-", "--", "-.", ":", ":", ":", ":"]
STYLES = list(cycler(color=COLOURS) + cycler(marker="os^vDPX<*>") + cycler(linestyle=LINES))
VERMILION = STYLES[2]["color"]


def save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# The comparison.

COSTS = {
    "response_tokens": "tokens sampled in training",
    "seconds": "seconds of training",
    "steps_done": "steps of training",
}
COMPARISONS = {  # the end of the file's name: the arms, in the order of STYLES, and the costs
    "": (GROUPS["horizons"], ("response_tokens", "seconds")),
    "_selection": (GROUPS["selection"], ("steps_done",)),
}
END_STYLES = {"student": ("student before", "#999999", 1), "teacher": ("teacher", "#555555", 2)}


def accuracy_and_se(results: Results, arm: str) -> tuple[float, float]:
    return claims.mean_and_se(claims.correct(list(results[arm].values())))


def draw_curves(axis, results: Results, curves: Curves, names: tuple[str, ...], column: str) -> None:
    """Accuracy of the arms `names` against a cost, between lines of the untrained student and the teacher."""
    for name, (label, colour, width) in END_STYLES.items():
        if name in results:
            accuracy, _ = accuracy_and_se(results, name)
            axis.axhline(accuracy, color=colour, linestyle=":", label=label, linewidth=width)
    costs = []
    for name, look in zip(names, STYLES):
        if name not in results:
            continue
        points = claims.points_of(results, curves, name, list(results[name])).values()
        x, y = ([claims.mean_of(rows, of) for rows in points] for of in (column, "accuracy"))
        axis.plot(x, y, **look, markersize=4, linewidth=1.3)
        _, se = accuracy_and_se(results, name)
        axis.errorbar(x[-1], y[-1], yerr=se, **look, markersize=8, capsize=3)
        axis.plot([], [], **look, label=name if name in curves else f"{name} (no curve recorded)")
        costs += x
    if max(costs) > 10 * min(costs):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
    else:
        axis.set_xlim(0, 1.05 * max(costs))
    top = max(float(row["accuracy"]) for of_arm in results.values() for row in of_arm.values())
    axis.set(xlabel=COSTS[column], ylim=(0, 1.03 if top > 0.6 else 1.3 * top))
    axis.xaxis.set_major_formatter("{x:,.9g}")
    axis.grid(alpha=0.3)


def draw(path: Path, results: Results, curves: Curves, arms: tuple[str, ...], seeds: int) -> list[Path]:
    """The figures that the rows allow, next to the CSV file."""
    drawn = []
    for suffix, (names, columns) in COMPARISONS.items():
        found = sum(name in results for name in names)
        if found == 0 or (suffix and found == 1):
            continue
        shape = {"figsize": (9, 4.8), "sharey": True, "layout": "constrained", "squeeze": False}
        figure, axes = plt.subplots(1, len(columns), **shape)
        for axis, column in zip(axes[0], columns):
            draw_curves(axis, results, curves, names, column)
        axes[0, 0].set_ylabel("held-out accuracy, sampled")
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
        lacking = claims.missing(results, tuple(arm for arm in arms if arm in names), seeds)
        if lacking:
            text = textwrap.fill(f"missing: {'; '.join(lacking)}", 110)
            figure.suptitle(text, fontsize=8, color=VERMILION)
        drawn.append(save(figure, path.with_name(f"{path.stem}{suffix}.png")))
    return drawn


# The probes. A row has a curve, its place `at` on the x axis, a value with its interval, and n.

VALUES = ("value", "low", "high", "n")
SIGNED = ("difference", "at N", "fixed, change", "own, change")  # in readings these have a sign


def read_probe(path: Path) -> list[dict]:
    """The rows of a probe, values as numbers."""
    return [row | {name: float(row[name]) for name in VALUES} for row in read_csv(path)]


def curve_of(rows: list[dict], curve: str) -> list[dict]:
    return [row for row in rows if row["curve"] == curve]


def reading(rows: list[dict]) -> str:
    """What the probe found, in a sentence, 95 % intervals in brackets."""
    about = PROBE_FIGURES[rows[0]["probe"]]
    shown = {"at": curve_of(rows, about.point)[-1]["at"]}
    for row in rows:  # of several points of a curve, the one at the same place
        curve = row["curve"]
        if curve not in shown or row["at"] == shown["at"]:
            form = "+.1%" if curve in SIGNED else ".1%"
            value, low, high = (format(row[name], form) for name in VALUES[:3])
            shown[curve] = f"{value} [{low} to {high}]"
    return about.reading.format_map(shown)


def draw_line(axis, rows: list[dict], label: str, look: dict) -> None:
    """A curve with its band."""
    at = [float(row["at"]) for row in rows]
    axis.plot(at, [row["value"] for row in rows], **look, label=label)
    low, high = ([row[end] for row in rows] for end in ("low", "high"))
    axis.fill_between(at, low, high, color=look["color"], alpha=0.2, linewidth=0)


def draw_prefixes(axis, rows: list[dict], curves: tuple[str, ...]) -> None:
    """decay and swap: accuracy by the length of the prefix."""
    last = max(float(row["at"]) for row in rows if "alone" not in row["curve"])
    for curve, look in zip(curves, STYLES[1:]):
        found = curve_of(rows, curve)
        if curve.endswith("alone"):  # as wide as the figure
            found = [row | {"at": at} for row in found for at in (0, last)]
            look = look | {"marker": ""}
        draw_line(axis, found, curve, look)
    axis.set(xlabel="k, tokens in the prefix", ylabel="accuracy of the whole answers", ylim=(-0.02, 1.02))


def pooled(rows: list[dict], points: int = 128) -> list[dict]:
    """Neighbouring positions in groups, so that there are at most `points`: means over the tokens of each.

    The error of a group is the mean of its positions' errors, which is exact if the tokens of an answer vary
    together.
    """
    size = max(1, -(-len(rows) // points))
    groups = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        n = sum(row["n"] for row in group)
        means = {name: sum(row[name] * row["n"] for row in group) / n for name in ("value", "low", "high")}
        groups.append(group[0] | means | {"at": sum(float(row["at"]) for row in group) / len(group)})
    return groups


def draw_cascade(axes, rows: list[dict]) -> None:
    """Reverse KL by position, +- one standard error, as far as a tenth of the answers is that long."""
    for axis, kind in zip(axes, ("fixed", "own")):
        for who, look in zip(("after", "before"), STYLES[1:]):
            found = curve_of(rows, f"{kind}, {who}")
            found = pooled([row for row in found if row["n"] >= 0.1 * found[0]["n"]])
            found = [row | {"low": max(row["low"], 1e-6)} for row in found]
            draw_line(axis, found, f"{who} training", look | {"marker": ""})
        for row in curve_of(rows, f"{kind}, change"):
            look = {"color": "yellow", "alpha": 0.3, "linewidth": 0}
            axis.axvspan(0, float(row["at"]), label="trained positions", **look)
        axis.set(title=f"{kind} rollouts", xlabel="position in the answer", yscale="log")
    axes[0].set_ylabel("reverse KL, nats")


class ProbeFigure(NamedTuple):
    point: str  # the curve whose last row, at {at}, the reading is about
    reading: str  # {curve}: its value and interval
    curves: tuple[str, ...] = ()  # accuracies by the length of the prefix


PROBE_FIGURES = {
    "decay": ProbeFigure(
        point="difference",
        reading="the teacher's accuracy is {student's prefix} when it continues {at} tokens by the student, "
        "and {own prefix} when it continues as many of its own: difference {difference}",
        curves=("student's prefix", "own prefix"),
    ),
    "cascade": ProbeFigure(
        point="fixed, change",
        reading="beyond the {at} trained tokens the reverse KL per token changes by {fixed, change} on the "
        "same fixed rollouts, and by {own, change} on each student's own rollouts",
    ),
    "swap": ProbeFigure(
        point="at N",
        reading="accuracy is {trained, then base} if the trained student writes the first {at} tokens and "
        "the base student the rest, and {base, then trained} the other way round: difference {at N}; the "
        "trained student alone {trained alone}, the base student alone {base alone}",
        curves=("trained, then base", "base, then trained", "trained alone", "base alone"),
    ),
}


def draw_probe(path: Path) -> str:
    """Draw the figure next to the CSV file `path`; returns the reading. Raises BadInput."""
    try:
        rows = read_probe(path)
        name = rows[0]["probe"]
        text = f"{name}: {reading(rows)}"
    except (IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{path} lacks rows of the probe, or does not hold results of a probe ({error})"
        raise BadInput(f"{what}: run the probe again, or name another file") from error
    shape = {"figsize": (8, 4.4), "layout": "constrained", "squeeze": False, "sharey": True}
    curves = PROBE_FIGURES[name].curves
    figure, axes = plt.subplots(1, 1 if curves else 2, **shape)
    if curves:
        draw_prefixes(axes[0, 0], rows, curves)
    else:
        draw_cascade(axes[0], rows)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.suptitle(textwrap.fill(text, 100), fontsize=10)
    save(figure, path.with_suffix(".png"))
    return text
