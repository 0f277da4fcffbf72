"""The figures of a comparison, from its CSV files alone: python experiments/figures.py results/compare.csv

compare.png            accuracy against tokens sampled and against seconds of training
compare_selection.png  accuracy with the same number of tokens, chosen in other ways
What is missing is said in the figure.
"""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import claims
from arms import ARMS, SELECTION
from claims import Results

import report
from cli import BadInput, run

# Colours that colour-blind readers tell apart (Okabe and Ito); markers and lines differ too.
LINES = {
    "full": ("#000000", "o", "-"),
    "popd": ("#0072b2", "s", "--"),
    "topd-0.25": ("#56b4e9", "v", "-."),
    "topd-0.1": ("#d55e00", "^", "-"),
    "esr": ("#e69f00", "D", "--"),
    "adaptive": ("#009e73", "P", "-."),
    "topd-0.1-weight": ("#cc79a7", "X", ":"),
}
POINTS = {"first": "<", "window": "*", "last": ">"}  # controls on full rollouts: their ends alone
DOTTED = {"student": ("student before", "#999999"), "teacher": ("teacher", "#555555")}


def line_of(results: Results, curves: Results, arm: str, column: str) -> tuple[list[float], list[float]]:
    """Means over the seeds of `column` and accuracy along the run, where every seed has been scored."""
    rows, of_arm = results[arm], curves.get(arm, {})
    parts = sorted({part for _, part in of_arm if all((seed, part) in of_arm for seed in rows)})
    points = [[of_arm[seed, part] for seed in rows] for part in parts] + [list(rows.values())]
    return tuple([sum(float(row[c]) for row in p) / len(p) for p in points] for c in (column, "accuracy"))


def end_lines(axis, results: Results, vertical: bool = False) -> None:
    for name, (label, colour) in DOTTED.items():
        if name in results:
            level = claims.two_way(claims.right(list(results[name].values())))[0]
            draw_line = axis.axvline if vertical else axis.axhline
            draw_line(
                level, color=colour, linestyle=":", label=label, linewidth=2 if name == "teacher" else 1
            )


def draw_compare(axes, results: Results, curves: Results) -> None:
    top = max(float(row["accuracy"]) for rows in results.values() for row in rows.values())
    labels = (("response_tokens", "tokens sampled in training"), ("seconds", "seconds of training"))
    for axis, (column, label) in zip(axes, labels):
        end_lines(axis, results)
        names = [name for name in (*LINES, *POINTS) if name in results]
        lines = {name: line_of(results, curves, name, column) for name in names}
        for name, (x, y) in lines.items():
            colour, marker, style = LINES.get(name, ("#999999", POINTS.get(name), "none"))
            axis.plot(x, y, color=colour, marker=marker, linestyle=style, markersize=4, linewidth=1.3)
            se = claims.two_way(claims.right(list(results[name].values())))[1]
            axis.errorbar(x[-1], y[-1], yerr=se, color=colour, marker=marker, markersize=8, capsize=3)
            what = f"{name} (mask on full rollouts)" if name in POINTS else name
            axis.plot([], [], color=colour, marker=marker, linestyle=style, label=what)
        every = [x for line in lines.values() for x in line[0]]
        if max(every) > 10 * min(every):
            axis.set_xscale("log")
        else:
            axis.set_xlim(0, 1.05 * max(every))
        axis.set(xlabel=label, ylim=(0, 1.03 if top > 0.6 else 1.3 * top))
        axis.xaxis.set_major_formatter("{x:,.9g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy, sampled")


def draw_selection(axis, results: Results) -> None:
    names = [name for name in ("full", *SELECTION) if name in results]
    for place, name in enumerate(names):
        mean, se = claims.two_way(claims.right(list(results[name].values())))
        colour, marker = ("#000000", "o") if name == "full" else ("#0072b2", "s")
        axis.errorbar(mean, place, xerr=se, color=colour, marker=marker, markersize=8, capsize=4)
        where = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of the dotted lines
        axis.annotate(f"{mean:.0%}", (mean, place), bbox=clear, **where)
    end_lines(axis, results, vertical=True)
    axis.set_yticks(range(len(names)), ["all tokens" if name == "full" else name for name in names])
    axis.set(xlim=(0, 1.03), xlabel="held-out accuracy, sampled; a tenth of the tokens has a loss")
    axis.invert_yaxis()
    axis.margins(y=0.12)
    axis.grid(alpha=0.3)


def finish(figure, handles: tuple, columns: int, lacking: list[str], path: Path) -> Path:
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False)
    if lacking:
        text = textwrap.fill(f"missing: {'; '.join(lacking)}", 110)
        figure.suptitle(text, fontsize=8, color="#d55e00")
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=110, format="png")
    report.settle(part, path)
    return path


def draw(path: Path, results: Results, curves: Results, arms: tuple[str, ...], seeds: int) -> list[Path]:
    """The figures that the rows allow, beside the CSV file. Raises BadInput if they allow none."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    drawn = []
    if any(name in results for name in (*LINES, *POINTS)):
        figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
        draw_compare(axes, results, curves)
        lacking = claims.missing(results, [arm for arm in arms if arm in (*LINES, *POINTS)], seeds)
        handles = axes[0].get_legend_handles_labels()
        drawn.append(finish(figure, handles, 4, lacking, path.with_suffix(".png")))
    if sum(name in results for name in SELECTION) > 1:
        figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        draw_selection(axis, results)
        lacking = claims.missing(results, ("full", *SELECTION), seeds)
        handles = axis.get_legend_handles_labels()
        drawn.append(finish(figure, handles, 2, lacking, path.with_name(f"{path.stem}_selection.png")))
    plt.close("all")
    if not drawn:
        raise BadInput(f"{path} holds no run of an arm that is drawn: run the comparison first")
    return drawn


def main() -> None:
    if len(sys.argv) != 2:
        raise BadInput(f"{len(sys.argv) - 1} arguments where one is needed: python figures.py CSV")
    path = Path(sys.argv[1])
    results = claims.read(path)
    seeds = 1 + max(seed for rows in results.values() for seed in rows)
    for figure in draw(
        path, results, claims.read_curves(path), tuple(a for a in ARMS if a in results), seeds
    ):
        print(figure)


if __name__ == "__main__":
    run(main)
