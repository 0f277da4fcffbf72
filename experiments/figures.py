"""The figures of compare.py, from its CSV files alone.

results/compare.png            accuracy against tokens sampled and against seconds of training
results/compare_selection.png  accuracy against steps, with a loss on as many tokens, chosen in different ways

A figure names the rows that its file lacks.
"""

import textwrap
from pathlib import Path

import claims
import matplotlib
from arms import GROUPS
from claims import Curves, Results
from cycler import cycler

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
