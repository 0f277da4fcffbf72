"""The figures of compare.py, from its CSV files alone.

results/compare.png            accuracy against tokens sampled and against seconds of training
results/compare_selection.png  accuracy against steps, with a loss on as many tokens, chosen in different ways

A figure names the rows that its file lacks.
"""

import statistics
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


COSTS = {
    "response_tokens": "tokens sampled in training",
    "seconds": "seconds of training",
    "steps_done": "steps of training",
}
COMPARISONS = {  # the end of the file's name: the arms, in the order of STYLES, and the costs
    "": (GROUPS["horizons"], ("response_tokens", "seconds")),
    "_selection": (GROUPS["selection"], ("steps_done",)),
}
END_STYLES = {
    "student": {"label": "student before", "color": "#999999", "linestyle": ":", "linewidth": 1},
    "teacher": {"label": "teacher", "color": "#555555", "linestyle": ":", "linewidth": 2},
}


def draw_curves(axis, results: Results, curves: Curves, names: list[str], column: str) -> None:
    """Accuracy of the arms `names` against a cost, between lines of the untrained student and the teacher."""
    for name, look in END_STYLES.items():
        if name in results:
            axis.axhline(statistics.fmean(claims.values(results, name)), **look)
    costs = []
    for name, look in zip(names, STYLES):
        if name not in results:
            continue
        points = claims.points_of(results, curves, name, list(results[name])).values()
        x, y = ([claims.mean_of(rows, of) for rows in points] for of in (column, "accuracy"))
        _, se = claims.mean_and_se(claims.correct(list(results[name].values())))
        axis.plot(x, y, **look, markersize=4, linewidth=1.3, label=name)
        axis.errorbar(x[-1], y[-1], yerr=se, **look, markersize=8, capsize=3)
        costs += x
    if max(costs) > 10 * min(costs):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
    axis.xaxis.set_major_formatter("{x:,.9g}")
    axis.set(xlabel=COSTS[column], ylim=(0, None))
    axis.grid(alpha=0.3)


def draw(path: Path, results: Results, curves: Curves, arms: tuple[str, ...], seeds: int) -> list[Path]:
    """The figures for which there are rows of two arms or more, next to the CSV file."""
    drawn = []
    for suffix, (names, columns) in COMPARISONS.items():
        if len(results.keys() & set(names)) < 2:
            continue
        figure, axes = plt.subplots(
            1, len(columns), figsize=(9, 4.8), sharey=True, layout="constrained", squeeze=False
        )
        for axis, column in zip(axes[0], columns):
            draw_curves(axis, results, curves, names, column)
        axes[0, 0].set_ylabel("held-out accuracy, sampled")
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
        lacking = "; ".join(claims.missing(results, tuple(arm for arm in arms if arm in names), seeds))
        if lacking:
            figure.suptitle(textwrap.fill(f"missing: {lacking}", 110), fontsize=8, color=VERMILION)
        drawn.append(save(figure, path.with_name(f"{path.stem}{suffix}.png")))
    return drawn
