"""When is truncation safe? Horizons against the place in an answer where the models begin to differ.

    python experiments/phase.py             learning rates, then 5 seeds of every cell; twice for two cores
    python experiments/phase.py --report    table and figure of the existing rows

The world is that of the toy, with a place q of the difference. At q = 0 it is `opening`: the first words of
an answer announce whether it will be correct. At q = 1 it is `closing`: the words before the result do. In
between, the words of `closing` come after the fraction q of the countdown, and a wrong answer is one too high
from there on. Learning rates are chosen over q = 0 and 1; sweep.py says how, and what a row of the CSV is.

The row of an untrained student has two numbers of tokens: `announced`, how many precede those words, and
`auto`, the horizon that `--horizon auto` suggests, which has an arm of its own. Worlds whose teacher has not
learned the task are left out.
"""

import hashlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import arms
import claims
import sweep
from arms import Arm, by_schedule
from claims import NO, OPEN, YES, Interval, Results, Row, interval, interval_of, shown, verdict
from compare import Setup
from figures import VERMILION, plt, save
from root import RESULTS
from sweep import CACHE, ENDS, SWEEP_SEED, Sweep

from support import toy
from support.cli import BadInput, knob, parse, run_main
from support.scores import score_answers

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
HORIZONS = (0.05, 0.1, 0.25, 0.5)
TOPD = {f"topd-{h}": Arm(by_schedule("topd", h)) for h in HORIZONS}
ARMS = {"full": arms.ARMS["full"]} | TOPD | {"auto": arms.ARMS["esr"], "popd": arms.ARMS["popd"]}
RATES = ("0.0003", "0.001", "0.003")
CORNERS = {0.0: "opening", 1.0: "closing"}
LEAST_TEACHER = 0.9  # accuracy; a world below it is left out, whatever its runs show
KEPT = 0.5  # of full's gain; as in claims.py, where truncation fails by keeping less than half
MARKERS = (
    ("announced", "a rollout of this length ends with the first differing token", "|", "black"),
    ("auto", "--horizon auto, each seed", "o", VERMILION),
)


@dataclass(frozen=True)
class Knobs(Sweep):
    seeds: int = knob(5, "worlds of each place", least=1)
    steps: int = knob(5, "of training; few, so that full is short of its ceiling", least=2)
    problems: int = knob(100, "held-out, sampled once at temperature 1", least=2, most=100)
    csv: str = knob(str(RESULTS / "phase.csv"), "results; the figure is written next to it")
    report: bool = knob(False, "train nothing: table and figure of the rows in the CSV")

    column = "q"
    place_of = float
    tuning = tuple(CORNERS)
    rates = RATES

    def settings(self) -> Row:
        """`worlds` is a hash of how toy.py makes them."""
        worlds = toy.folder_of("toy", toy.Recipe(), CACHE).name
        return sweep.settings_of(toy.PRESET, steps=self.steps, problems=self.problems, worlds=worlds)

    def measure(self, place: float, seed: int, arm: str, lr: str, student: Row) -> Row:
        ours = {"steps": self.steps, "eval_limit": self.problems, "seed": seed}
        setup = sweep.load(build(place, seed), toy.PRESET, **ours)
        row = {"response_tokens": 0}
        if arm in ARMS:
            run = sweep.train_arm(setup, ARMS[arm], lr, student["auto"])
            row["response_tokens"] = run.costs()["response_tokens"]
        model = setup.pair.teacher if arm == "teacher" else setup.pair.student
        records = setup.answers(model, setup.knobs.eval_temperature)
        row["accuracy"] = score_answers(records)["accuracy"]
        if arm == "student":
            row |= {"announced": announced(setup, place), "auto": sweep.horizon_auto(setup)}
        return row


# The world.


def answer(start: int, add: int, times: int, q: float, correct: bool) -> tuple[str, int]:
    """Text and result of a correct or a wrong answer; the two differ after a fraction q of the countdown."""
    if q in CORNERS:
        return toy.answer(start, add, times, CORNERS[q], correct)
    place = round(q * times)
    slip = 0 if correct else 1
    sums = [(start + add * i + slip * (i > place)) % 10 for i in range(1, times + 1)]
    steps = [f"{toy.word(times - i)}{total}" for i, total in enumerate(sums, 1)]
    steps.insert(place, toy.KEEP if correct else toy.SLIP)
    result = (start + add * times + slip) % 10
    return f"work: {' '.join(steps)} \\boxed{{{result}}}", result


def build(q: float, seed: int) -> Path:
    """The folder of the world, built if it does not exist, by toy.py with the answers of this file."""
    if q in CORNERS:
        return toy.build(CORNERS[q], toy.Recipe(seed), CACHE)

    def of_place(start: int, add: int, times: int, world: str, correct: bool) -> tuple[str, int]:
        return answer(start, add, times, q, correct)

    texts = [answer(3, 4, times, q, correct)[0] for times in (51, 56) for correct in (True, False)]
    key = hashlib.sha256("".join(texts).encode()).hexdigest()[:8]  # toy.py adds a hash of everything else
    with patch.object(toy, "answer", of_place):
        return toy.build(key, toy.Recipe(seed), CACHE)


def announced(setup: Setup, q: float) -> float:
    """How many tokens precede the first that differs between a right and a wrong answer, on average."""
    encode = setup.pair.tokenizer.encode
    starts = []
    for problem in toy.all_problems(toy.Recipe(setup.knobs.seed))[:100]:
        right, wrong = (encode(answer(*problem, q, correct)[0]) for correct in (True, False))
        starts.append(next(i for i, (a, b) in enumerate(zip(right, wrong)) if a != b))
    return statistics.fmean(starts)


def run_all(knobs: Knobs) -> None:
    """The learning rates, then the cells; several processes share the runs."""
    tuning = [(q, SWEEP_SEED) for q in CORNERS]
    worlds = [(q, seed) for q in PLACES for seed in range(1, knobs.seeds + 1)]
    knobs.run(tuning + worlds, ENDS)
    knobs.run(tuning, [(arm, lr) for arm in ARMS for lr in RATES])
    cells = cells_of(knobs)
    knobs.run([world for world in worlds if world not in cells.unusable], list(cells.rates.items()))


# What the rows show.


def cells_of(knobs: Knobs) -> "Cells":
    """Raises BadInput if a learning rate has not been tried."""
    rows = knobs.finished()
    teachers = {key[:2]: row["accuracy"] for key, row in rows.items() if key[2] == "teacher"}
    unusable = {world: found for world, found in teachers.items() if float(found) < LEAST_TEACHER}
    rates = knobs.chosen_rates(rows, ARMS)
    if lacking := [arm for arm in ARMS if arm not in rates]:
        raise BadInput(f"the learning rates of {', '.join(lacking)} are not all tried: run without --report")
    usable = {key: row for key, row in rows.items() if key[:2] not in unusable}
    return Cells(dict(sorted(knobs.results(usable, rates).items())), rates, unusable)


class Cells(NamedTuple):
    """What the rows say with the chosen learning rates."""

    places: dict[float, Results]  # without the unusable worlds
    rates: dict[str, str]
    unusable: dict[tuple[float, int], str]  # the worlds whose teacher has not learned the task: its accuracy

    def gains(self, q: float, arm: str) -> list[tuple[float, float]]:
        """The accuracies of the arm and of full, minus that of the student, for the seeds with all three."""
        shared = claims.with_all(self.places[q], arm, "full", "student")
        return list(zip(*(claims.gaps(shared, name, "student") for name in (arm, "full"))))

    def share(self, q: float, arm: str) -> Interval | None:
        """The share of full's gain that the arm keeps, which is the ratio of the mean gains.

        Its standard error is that of the mean of (gain - share * full's gain) / full's mean gain. None with
        fewer than MIN_SEEDS seeds, or where full is not shown to gain.
        """
        gains = self.gains(q, arm)
        of_full = interval_of([full for _, full in gains])
        if not of_full or of_full.low <= 0:
            return None
        share = statistics.fmean(ours for ours, _ in gains) / of_full.mean
        residuals = [(ours - share * full) / of_full.mean for ours, full in gains]
        return interval(share, interval_of(residuals).se, len(gains))

    def missing(self, knobs: Knobs) -> str:
        """The places that lack seeds, with how many there are."""
        arms = ("student", *ARMS)
        counts = {q: min(len(self.places.get(q, {}).get(arm, {})) for arm in arms) for q in PLACES}
        lacking = [f"q {q:g} ({n} of {knobs.seeds} seeds)" for q, n in counts.items() if n < knobs.seeds]
        return f"missing: {', '.join(lacking)}" if lacking else ""


def report(cells: Cells, knobs: Knobs) -> str:
    """Per place: the two places in tokens, accuracies, and each arm's share of full's gain."""
    words = {YES: "keeps", NO: "loses", OPEN: "cannot be told"}
    lines = [f"[ ]: 95 % t interval over seeds. keeps, loses: it lies above, below {KEPT:.0%} of full's gain"]
    for (q, seed), teacher in cells.unusable.items():
        lines += [f"left out: q {q:g}, seed {seed}, whose teacher has an accuracy of {float(teacher):.0%}"]
    lines += ["learning rates: " + ", ".join(f"{arm} {lr}" for arm, lr in cells.rates.items())]
    for q, results in cells.places.items():
        lines += ["", f"q {q:g}, {len(cells.gains(q, 'full'))} seeds"]
        for name in ("announced", "auto"):
            values = claims.values(results, "student", name)
            mean = f"{statistics.fmean(values):.1f} tokens"
            lines += [f"  {name:10} {mean}, {min(values):g} to {max(values):g}"]
        for arm in ("student", "teacher", "full"):
            lines += [f"  {arm:10} accuracy {shown(interval_of(claims.values(results, arm)))}"]
        for arm in list(ARMS)[1:]:
            share = cells.share(q, arm)
            lines += [f"  {arm:10} {words[verdict(share, KEPT, math.inf)]:15} {shown(share)}"]
    return "\n".join([*lines, "", cells.missing(knobs)])


def text_of(cells: Cells, q: float, arm: str) -> str:
    """The share and half of its interval; of full, to which it refers, the gain in points."""
    share = cells.share(q, arm)
    if share and arm == "full":
        return f"{100 * statistics.fmean(full for _, full in cells.gains(q, arm)):+.0f} points"
    return f"{share.mean:.0%}\n\u00b1 {share.high - share.mean:.0%}" if share else "missing"


def draw_columns(axis, cells: Cells, arms: list[str], edges: list[float]) -> None:
    """The shares of these arms as colours and numbers, the places from below."""
    shares = [[cells.share(q, arm) for arm in arms] for q in cells.places]
    numbers = [[share.mean if share else math.nan for share in row] for row in shares]
    rows = [row - 0.5 for row in range(len(shares) + 1)]
    axis.pcolormesh(edges, rows, numbers, vmin=0, vmax=1, edgecolors="white", cmap="viridis")
    for row, q in enumerate(cells.places):
        for number, arm in enumerate(arms):
            colour = "white" if numbers[row][number] < 0.5 else "black"
            look = {"color": colour, "fontsize": 9, "ha": "center", "va": "center"}
            middle = (edges[number] * edges[number + 1]) ** 0.5
            axis.text(middle, row + 0.2, text_of(cells, q, arm), **look)


def draw(cells: Cells, knobs: Knobs, path: Path) -> Path:
    """The heat map: place against horizon; colour and numbers are the share of full's gain."""
    shape = {"sharey": True, "width_ratios": (7, 2), "layout": "constrained", "figsize": (10, 5.5)}
    figure, (axis, others) = plt.subplots(1, 2, **shape)
    horizons = [*HORIZONS, 1.0]
    between = [(a * b) ** 0.5 for a, b in zip(horizons, horizons[1:])]
    draw_columns(axis, cells, [*TOPD, "full"], [0.035, *between, 2**0.5])
    draw_columns(others, cells, ["auto", "popd"], [1.0, 4.0, 16.0])
    axis.vlines(HORIZONS, *axis.get_ylim(), colors="white", linestyles=":", alpha=0.5)
    for name, label, marker, colour in MARKERS:
        found = [claims.values(results, "student", name) for results in cells.places.values()]
        at = [(row - 0.25, value) for row, values in enumerate(found) for value in values]
        x = [(value + (name == "announced")) / toy.PRESET["max_new_tokens"] for _, value in at]
        y = [row for row, _ in at]
        axis.plot(x, y, marker=marker, color=colour, linestyle="", markersize=9, alpha=0.6, label=label)
    axis.set(xscale="log", xlim=(0.006, 2**0.5), xlabel="horizon of TOPD, as a fraction of T")
    axis.set_xticks([0.01, 0.02, *horizons], [0.01, 0.02, *HORIZONS, "full"])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(cells.places)), [f"{q:g}" for q in cells.places])
    axis.set_ylabel("fraction of the countdown before the models differ")
    others.set(xscale="log", xticks=[2.0, 8.0], xticklabels=["auto", "POPD"])
    others.set_xticks([], minor=True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    title = "share of full's gain that is kept, \u00b1 half a 95 % interval over seeds"
    figure.suptitle(f"{title}\n{cells.missing(knobs)}".strip(), fontsize=10)
    return save(figure, path.with_suffix(".png"))


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    if not knobs.report:
        run_all(knobs)
    cells = cells_of(knobs)
    print(report(cells, knobs))
    print(f"figure: {draw(cells, knobs, Path(knobs.csv))}")


if __name__ == "__main__":
    run_main(main)
