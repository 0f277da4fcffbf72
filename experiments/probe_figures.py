"""The probes' figures and readings, from their CSV files alone: what a file lacks is named in its figure."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import report
from cli import BadInput

VALUES = ("value", "low", "high", "n")
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#666666"  # Okabe and Ito's, for every eye
STYLES = {  # of each curve: colour, marker, line
    "own prefix": (BLUE, "s", "--"),
    "student's prefix": (ORANGE, "o", "-"),
    "trained, then base": (BLUE, "o", "-"),
    "base, then trained": (ORANGE, "s", "--"),
    "trained alone": (GREEN, "", ":"),
    "base alone": (GREY, "", "-."),
    "before": (ORANGE, "", "--"),
    "after": (BLUE, "", "-"),
    "cumulative": (BLUE, "", "-"),
}
RANKS = {
    "1": (BLUE, "", "first choice"),
    "2-5": (ORANGE, "//", "ranks 2-5"),
    "outside": (GREY, "..", "lower"),
}


def read(path: Path) -> list[dict]:
    """The rows of a probe, values as numbers. Raises BadInput if they are not all of the same settings."""
    rows, wrong = report.read_csv(path) if path.is_file() else [], ""
    try:
        rows = [row | {name: float(row[name]) for name in VALUES} for row in rows]
        settings = {
            tuple(row[name] for name in sorted(row.keys() - {"curve", "at", *VALUES})) for row in rows
        }
        if rows[0]["probe"] not in FIGURES or len(settings) > 1:
            wrong = f"of {len(settings)} settings, which are not to be mixed, or of an unknown probe"
    except (IndexError, KeyError, TypeError, ValueError):
        wrong = "that are no results of a probe"
    if wrong:
        raise BadInput(f"{path} has rows {wrong}: name a CSV file that one run of probe.py wrote")
    return rows


def missing(rows: list[dict]) -> list[str]:
    """What a probe that came to its end would have written and this one has not."""
    there, found = {(row["curve"], row["at"]) for row in rows}, []
    for curve in FIGURES[rows[0]["probe"]].curves:
        every = [*RANKS, "nats"] if rows[0]["probe"] == "submode" else rows[0].get("prefixes", "").split()
        lacking = [at for at in every if (curve, at) not in there]
        if not curve_of(rows, curve):
            found.append(curve)
        elif lacking and not curve.endswith(("alone", "at N")):  # those have one point
            found.append(f"{curve} at {', '.join(lacking)}")
    return found


def reading(rows: list[dict]) -> str:
    """What the probe found, in a sentence, 95 % intervals in brackets."""
    about = FIGURES[rows[0]["probe"]]
    shown = {"at": next((row["at"] for row in reversed(rows) if row["curve"] == about.point), "")}
    for row in rows:  # of several points of a curve, the one at the same place
        if row["curve"] not in shown or row["at"] == shown["at"]:
            style = {"horizon": ".0f", "difference": "+.1%", "at N": "+.1%"}.get(row["curve"], ".1%")
            style = "+.1%" if row["curve"].endswith("change") else style
            value, low, high = (format(row[name], style) for name in VALUES[:3])
            shown[row["curve"]] = f"{value} [{low} to {high}]"
    try:
        return about.reading.format_map(shown)
    except KeyError as error:
        return f"no reading without {error}"


def curve_of(rows: list[dict], curve: str) -> list[dict]:
    return [row for row in rows if row["curve"] == curve]


def line(axis, rows: list[dict], label: str, style: str) -> None:
    """A curve with its band, if there is one."""
    if not rows:
        return
    colour, marker, dashes = STYLES[style]
    at, low, high = [float(row["at"]) for row in rows], [r["low"] for r in rows], [r["high"] for r in rows]
    axis.plot(at, [row["value"] for row in rows], dashes, color=colour, marker=marker, label=label)
    axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_prefixes(axes, rows: list[dict]) -> None:
    """decay and swap: accuracy by the length of the prefix."""
    last = max((float(row["at"]) for row in rows if "alone" not in row["curve"]), default=1.0)
    for curve in STYLES:
        found = curve_of(rows, curve)
        if curve.endswith("alone"):  # as wide as the figure
            found = [row | {"at": at} for row in found for at in (0, last)]
        line(axes[0], found, curve, curve)
    axes[0].set(xlabel="k, tokens in the prefix", ylabel="accuracy of the whole answers", ylim=(-0.02, 1.02))


def pooled(rows: list[dict], points: int = 128) -> list[dict]:
    """Positions in groups, where there are more of them than `points`: means over the tokens of each.

    The error is the mean of the positions' errors: what it would be if the tokens of an answer moved as one.
    """
    size, groups = max(1, -(-len(rows) // points)), []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        n = sum(row["n"] for row in group)
        found = {k: sum(row[k] * row["n"] for row in group) / n for k in ("value", "low", "high")}
        groups.append(group[0] | found | {"at": sum(float(row["at"]) for row in group) / len(group)})
    return groups


def draw_cascade(axes, rows: list[dict]) -> None:
    """Reverse KL by position, +- one standard error, where a tenth of the answers still go on."""
    for axis, kind in zip(axes, ("fixed", "own")):
        for who in ("before", "after"):
            found = curve_of(rows, f"{kind}, {who}")
            found = pooled([row for row in found if row["n"] >= 0.1 * found[0]["n"]])
            line(axis, [row | {"low": max(row["low"], 1e-6)} for row in found], f"{who} training", who)
        for row in curve_of(rows, f"{kind}, change"):
            how = {"color": "#f0e442", "alpha": 0.3, "linewidth": 0, "label": "trained positions"}
            axis.axvspan(0, float(row["at"]), **how)
        axis.set(xlabel="position in the answer", yscale="log", title=f"{kind} rollouts")
    axes[0].set_ylabel("reverse KL, nats")


def draw_submode(axes, rows: list[dict]) -> None:
    """Shares of ranks, a bar each, for both students and both sets of tokens."""
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    for shift, (rank, (colour, hatch, label)) in zip((-0.25, 0, 0.25), RANKS.items()):
        found = [(i, r) for i, c in enumerate(curves) for r in curve_of(rows, c) if r["at"] == rank]
        error = [[abs(r["value"] - r[end]) for _, r in found] for end in ("low", "high")]
        how = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": label, "capsize": 3}
        axes[0].bar([i + shift for i, _ in found], [r["value"] for _, r in found], 0.25, yerr=error, **how)
    nats = {row["curve"]: f"\n{row['value']:.2g} nats" for row in rows if row["at"] == "nats"}
    axes[0].set_xticks(range(len(curves)), [c.replace(", ", "\n") + nats.get(c, "") for c in curves])
    axes[0].set(ylabel="share of the student's choices", ylim=(0, 1.2))
    axes[0].legend(title="the teacher's rank of it", fontsize=9, ncols=3, loc="upper center")


def draw_profile(axes, rows: list[dict]) -> None:
    """The cumulative share of reverse KL, and where it reaches the asked one."""
    line(axes[0], curve_of(rows, "cumulative"), "cumulative share", "cumulative")
    for row in curve_of(rows, "horizon"):
        axes[0].axhline(float(row["at"]), color=GREY, linestyle=":")
        axes[0].axvspan(row["low"], row["high"], color=ORANGE, alpha=0.3, linewidth=0)
        axes[0].axvline(row["value"], color=ORANGE, linestyle="--", label=f"{float(row['at']):.0%} of all")
    axes[0].set(
        xlabel="tokens from the start", xscale="log", ylabel="share of all reverse KL", ylim=(0, 1.02)
    )


class Figure(NamedTuple):
    draw: Callable
    curves: tuple[str, ...]  # what a probe that came to its end has written
    point: str  # the curve whose last row, at {at}, the reading is about
    reading: str  # {curve}: its value and interval


FIGURES = {
    "decay": Figure(
        draw_prefixes,
        ("student's prefix", "own prefix", "difference"),
        "difference",
        "after {at} tokens by the student the teacher is right in {student's prefix}, after as many of its "
        "own in {own prefix}: difference {difference}",
    ),
    "cascade": Figure(
        draw_cascade,
        ("fixed, before", "fixed, after", "fixed, change", "own, before", "own, after", "own, change"),
        "fixed, change",
        "beyond the {at} trained tokens the reverse KL a token changes by {fixed, change} on the same fixed "
        "rollouts, and by {own, change} on each student's own",
    ),
    "swap": Figure(
        draw_prefixes,
        ("trained, then base", "base, then trained", "trained alone", "base alone", "difference", "at N"),
        "at N",
        "right are {trained, then base} where the trained student writes the first {at} tokens and the base "
        "one finishes, {base, then trained} the other way round: difference {at N}; trained alone "
        "{trained alone}, base alone {base alone}",
    ),
    "submode": Figure(
        draw_submode,
        ("before, highest tenth", "before, all tokens", "after, highest tenth", "after, all tokens"),
        "after, highest tenth",
        "where the two differ most, a tenth of the tokens, the student's choice is the teacher's first in "
        "{after, highest tenth} after training and {before, highest tenth} before; in all tokens "
        "{after, all tokens} and {before, all tokens}",
    ),
    "profile": Figure(
        draw_profile,
        ("horizon", "cumulative"),
        "horizon",
        "the first {horizon} tokens hold a share of {at} of all reverse KL before training",
    ),
}


def draw(path: Path) -> str:
    """The figure beside the CSV file `path`; returns the reading. Raises BadInput."""
    import matplotlib

    rows = read(path)
    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    name, lacks = rows[0]["probe"], missing(rows)
    text = f"{name}: {reading(rows)}" + (f" (missing: {'; '.join(lacks)})" if lacks else "")
    how = {"figsize": (8, 4.4), "layout": "constrained", "squeeze": False, "sharey": True}
    figure, axes = plt.subplots(1, 2 if name == "cascade" else 1, **how)
    FIGURES[name].draw(axes[0], rows)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        if axis.get_legend() is None and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=9)
    figure.suptitle(textwrap.fill(text, 100), fontsize=10)
    figure.savefig(path.with_suffix(".part"), dpi=110, format="png")
    plt.close(figure)
    report.settle(path.with_suffix(".part"), path.with_suffix(".png"))
    return text
