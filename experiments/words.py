"""A world in which nobody placed the gap between student and teacher: which arms keep full's gain, and why.

    python experiments/words.py --predict   the validation world alone, before any training
    python experiments/words.py             learning rates, then 5 seeds of every arm; twice for two cores
    python experiments/words.py --report    table, verdicts and figure of the existing rows

The world is that of support/words.py (or one of the toy's, for a trial); the arms are in arms.py. sweep.py
says how learning rates are chosen and what a row of the CSV is. Work is done in the order of need: student
and teacher of every seed, then the arms of FIRST, then those of THEN one by one; a stop leaves out the last.

Columns: `correct` and `correct_greedy` have a digit per held-out problem. `kl_WRITER_i` is the exact reverse
KL in nats per token, in the i-th tenth of T, on full rollouts to held-out problems by the student before
training, by the teacher (the same for all arms), and by the trained student itself (own). `NAME_i` of a run
is the mean over its i-th quarter of the steps. `auto` is the horizon of `--horizon auto`, which is esr's N.
"""

import math
import statistics
import sys
import textwrap
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import claims
import compare
import probe
import probe_setup
import sweep
from arms import ARMS
from claims import MARGIN, OPEN, verdict
from figures import STYLES, VERMILION, plt, save
from sweep import CACHE, ENDS, SWEEP_SEED, Cells, Row, Unit, World, mean_of, shown

from eval_math import extract, has_box
from rollout import rollout
from support import run_folder, scores, toy
from support.cli import knob, parse, run_main
from support.grading import Grader

FIRST = ("full", "popd", "topd-0.25", "topd-0.1", "esr", "no-teacher", "seqkd")
THEN = ("first", "self-teacher", "no-end", "seqkd-0.1", "gkd", "lora", "lora-esr")
RATES = ("0.0004", "0.001", "0.002")
WRITERS = ("student", "teacher", "own")
ALONG = ("grad_norm", "reverse_kl", "response_length", "truncated")
QUARTERS = [f"{name}_{i}" for name in ALONG for i in range(4)]
OF_RUN = ("grad_norm_mean", "grad_norm_max", *QUARTERS)
TENTHS = range(10)
PREFIXES = (0, 10, 25, 50, 75, 100)
BATCH = 250  # answers sampled together
SCORES = {"sampled": "accuracy", "greedy": "greedy"}  # the columns of the two accuracies
CLAIMS = {  # about an arm: the arm it is compared with, and the least difference
    "is at least as good as full": ("full", -MARGIN),
    "passes its teacher": ("teacher", 0.0),
    "is better than the student before": ("student", 0.0),
}


@dataclass(frozen=True)
class Knobs:
    world: str = knob("words", "opening and closing are the toy's", choices=("words", *toy.WORLDS))
    arms: tuple[str, ...] = knob((), "may be repeated; default: all", choices=(*FIRST, *THEN))
    seeds: int = knob(5, "worlds, besides that of the learning rates", least=1)
    steps: int = knob(0, "of training; 0: as the world's preset says", least=0)
    problems: int = knob(500, "held-out, answered once at temperature 1 and once greedily", least=2)
    rollouts: int = knob(128, "for the reverse KL by position, of each writer", least=2)
    csv: str = knob(str(ROOT / "results" / "words.csv"), "results; the figure is written next to it")
    predict: bool = knob(False, "only measure the validation world, into ..._before.csv")
    report: bool = knob(False, "train nothing: table, verdicts and figure of the rows in the CSV")

    def chosen(self) -> tuple[str, ...]:
        return tuple(arm for arm in (*FIRST, *THEN) if arm in (self.arms or (*FIRST, *THEN)))

    def preset(self) -> dict:
        steps = {"steps": self.steps} if self.steps else {}
        return module_of(self.world).PRESET | {"eval_batch": BATCH, "eval_limit": self.problems} | steps

    def sweep(self) -> sweep.Sweep:
        """`worlds` is a hash of how the worlds are made."""
        source = Path(module_of(self.world).__file__).read_bytes()
        own = {"worlds": f"{self.world}-{sha256(source).hexdigest()[:8]}", "steps": self.preset()["steps"]}
        own |= {"problems": self.problems, "rollouts": self.rollouts}
        return sweep.Sweep(
            path=Path(self.csv),
            settings=sweep.settings_of(self.preset(), **own),
            column="world",
            place_of=str,
            tuning=(self.world,),
            rates=RATES,
            load=partial(load, knobs=self),
            measure=partial(measure, rollouts=self.rollouts),
        )


def module_of(world: str):
    if world in toy.WORLDS:
        return toy
    from support import words

    return words


def build(world: str, seed: int) -> Path:
    """The folder of the world, built if it does not exist."""
    if world in toy.WORLDS:
        return toy.build(world, toy.Recipe(seed), CACHE)
    return module_of(world).build(seed, rollout)


def load(unit: Unit, knobs: Knobs) -> World:
    arm = ARMS.get(unit.runs[0][0])
    ours = {"seed": unit.seed, "eval_temperature": 1.0, "low_memory": bool(arm and arm.low_memory)}
    return sweep.load(unit.place, build(unit.place, unit.seed), knobs.preset(), **ours)


# A run.


def measure(world: World, arm: str, lr: str, student: Row, rollouts: int) -> dict:
    """Train the student as the arm says, or only score the student or the teacher: columns of a row."""
    _, setup, settings = world
    start = deepcopy(setup.pair.student)
    costs, of_run = dict.fromkeys(claims.COSTS, 0), dict.fromkeys(OF_RUN, "")
    auto = sweep.horizon_auto(world) if arm == "student" else ""
    if arm in ARMS:
        run = sweep.train_arm(world, ARMS, arm, lr, student["auto"])
        costs, of_run = run.costs(), along(run.rows)
    model = setup.pair.teacher if arm == "teacher" else setup.pair.student
    row = costs | compare.scores_of(setup, model, settings, "repeating") | of_run | {"auto": auto}
    for name, writer in zip(WRITERS, (start, setup.pair.teacher, setup.pair.student)):
        found = dict.fromkeys(TENTHS, "")
        if arm != "teacher":
            tokens = sweep.reverse_kl(world, setup.test_prompts, writer=writer, rollouts=rollouts)
            found = by_tenth(tokens, settings.max_new_tokens)
        row |= {f"kl_{name}_{i}": value for i, value in found.items()}
    return row


def along(rows: list[dict]) -> dict[str, float | str]:
    """The gradient norm, and means over quarters of the steps; a quarter without steps is empty."""
    norms = [row["grad_norm"] for row in rows]
    found = {"grad_norm_mean": statistics.fmean(norms), "grad_norm_max": max(norms)}
    for name in ALONG:
        for i in range(4):
            part = [row[name] for row in rows[i * len(rows) // 4 : (i + 1) * len(rows) // 4]]
            found[f"{name}_{i}"] = statistics.fmean(part) if part else ""
    return found


def by_tenth(tokens: dict, length: int) -> dict[int, float | str]:
    """The mean reverse KL of the tokens in each tenth of `length` positions; empty if there are none."""
    tenth = tokens["position"] * 10 // length
    parts = {i: tokens["reverse_kl"][tenth == i] for i in TENTHS}
    return {i: part.mean().item() if len(part) else "" for i, part in parts.items()}


def unit(knobs: Knobs, seed: int, arm: str, lr: str) -> Unit:
    return Unit(f"{knobs.world}-{seed}-{arm}-{lr}", knobs.world, seed, [(arm, lr)])


def run_all(knobs: Knobs) -> None:
    """Several processes share the runs."""
    both = knobs.sweep()
    seeds = range(1, knobs.seeds + 1)
    both.run([unit(knobs, seed, *run) for seed in (SWEEP_SEED, *seeds) for run in ENDS])
    chosen = knobs.chosen()
    first = tuple(arm for arm in chosen if arm in FIRST)
    for group in filter(None, (first, *((arm,) for arm in chosen if arm in THEN))):
        both.run([unit(knobs, SWEEP_SEED, arm, lr) for arm in group for lr in RATES])
        rates = both.chosen_rates(both.read(), group)
        both.run([unit(knobs, seed, *run) for seed in seeds for run in rates.items()])


# Before any training.


def predict(knobs: Knobs) -> str:
    """Scores, the profile of the reverse KL and the teacher's decay in the validation world, as text."""
    path = Path(knobs.csv).with_name(f"{Path(knobs.csv).stem}_before.csv")
    probe_setup.check_results(path, knobs.sweep().settings, "--csv")
    knobs.sweep().run([unit(knobs, SWEEP_SEED, *run) for run in ENDS])
    rows = knobs.sweep().read()
    found = []
    for arm, _ in ENDS:
        row = rows[knobs.world, SWEEP_SEED, arm, ""]
        for name in ("accuracy", "greedy"):
            value, n = float(row[name]), int(row["n"])
            found.append(probe.point(f"{arm}, {name}", "", value, scores.wilson(value, n), n))
    found += probes(knobs)
    part = path.with_suffix(".part")
    run_folder.write_csv(
        part, [*found[0], *knobs.sweep().settings], (r | knobs.sweep().settings for r in found)
    )
    run_folder.atomic_rename(part, path)
    lines = [
        f"{r['curve']:20} {r['at']:>5}  {r['value']:7.3f} [{r['low']:.3f} to {r['high']:.3f}]" for r in found
    ]
    return "\n".join(lines)


def probes(knobs: Knobs) -> list[dict]:
    """The share of the reverse KL in each tenth of T, the horizon with 45 % of it, and the decay."""
    folder = build(knobs.world, SWEEP_SEED)
    preset = knobs.preset()
    given = {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "data": str(folder)}
    given |= {name: preset[name] for name in ("instruction", "max_new_tokens", "dtype", "micro_batch")}
    given |= {"device": "cpu", "sample_batch": BATCH, "problems": min(100, knobs.problems)}
    length = preset["max_new_tokens"]
    given_too = {"prefixes": " ".join(str(k) for k in PREFIXES if k < length)}
    with Grader(extract, has_box) as grader:
        of_profile = probe_setup.complete(probe_setup.ProfileKnobs, given)
        profile = list(probe.profile(probe_setup.load(of_profile, grader), of_profile))
        of_decay = probe_setup.complete(probe_setup.PrefixKnobs, given | given_too)
        decay = list(probe.decay(probe_setup.load(of_decay, grader), of_decay))
    cumulative = [row["value"] for row in profile if row["curve"] == "cumulative"]
    ends = [0.0, *(cumulative[min((i + 1) * length // 10, len(cumulative)) - 1] for i in TENTHS)]
    shares = [b - a for a, b in zip(ends, ends[1:])]
    tenths = [
        probe.point("share of tenth", i, share, (math.nan, math.nan), profile[0]["n"])
        for i, share in enumerate(shares)
    ]
    return tenths + [row for row in profile if row["curve"] == "horizon"] + decay


# What the rows show.


def cells_of(knobs: Knobs) -> Cells:
    rows = knobs.sweep().read()
    return Cells(rows, knobs.sweep().chosen_rates(rows, knobs.chosen()), {})


def missing(cells: Cells, knobs: Knobs) -> str:
    """The arms whose learning rates are not all tried, and those that lack seeds."""
    lacking = []
    for arm in ("student", "teacher", *knobs.chosen()):
        absent = [str(s) for s in range(1, knobs.seeds + 1) if s not in cells.of(knobs.world, arm)]
        if arm in ARMS and arm not in cells.rates:
            lacking.append(f"{arm} (learning rates)")
        elif absent:
            lacking.append(f"{arm} (seed {', '.join(absent)})")
    return f"missing: {'; '.join(lacking)}" if lacking else ""


def text_of(values: list[float], form: str = ".1%") -> str:
    """The mean with its interval; with too few seeds for one, how many there are."""
    if not values:
        return "no seed"
    found = mean_of(values)
    return shown(found, form) if found else f"{statistics.fmean(values):{form}} ({len(values)} seeds)"


def gaps(cells: Cells, world: str, arm: str, other: str, name: str) -> list[float]:
    """The accuracy of an arm minus that of another, for each seed that has both."""
    ours, theirs = cells.values(world, arm, name), cells.values(world, other, name)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def report(cells: Cells, knobs: Knobs) -> str:
    arms = [arm for arm in knobs.chosen() if cells.of(knobs.world, arm)]
    edges = {RATES[0]: " (lowest tried)", RATES[-1]: " (highest tried)"}
    lines = ["[ ]: 95 % t interval over seeds, each of which redraws problems, student, teacher and training"]
    lines += [f"{arm}: learning rate {lr}{edges.get(lr, '')}" for arm, lr in cells.rates.items()]
    lines += ["", f"{'arm':14}{'sampled':26}{'greedy':26}{'tokens':>10}{'seconds':>9}{'seeds':>7}"]
    for arm in ("student", "teacher", *arms):
        rows = list(cells.of(knobs.world, arm).values())
        scores_of_arm = [text_of([float(row[name]) for row in rows]) for name in ("accuracy", "greedy")]
        costs = [claims.mean_of(rows, name) if rows else 0 for name in ("response_tokens", "seconds")]
        lines += ["{:14}{:26}{:26}{:10,.0f}{:9.1f}{:7}".format(arm, *scores_of_arm, *costs, len(rows))]
    return "\n".join(
        [
            *lines,
            "",
            *verdicts(cells, knobs, arms),
            "",
            *stability(cells, knobs, arms),
            "",
            *profiles(cells, knobs, arms),
            "",
            missing(cells, knobs),
        ]
    )


def verdicts(cells: Cells, knobs: Knobs, arms: list[str]) -> list[str]:
    lines = [f"A claim holds if the interval lies above {-MARGIN:.0%} against full, above 0 otherwise"]
    for text, (other, low) in CLAIMS.items():
        for arm in arms:
            texts = []
            for kind, name in SCORES.items():
                found = gaps(cells, knobs.world, arm, other, name)
                outcome = verdict(mean_of(found), low, math.inf) if mean_of(found) else OPEN
                texts.append(f"{kind} {outcome}, {text_of(found, '+.1%')}")
            if arm != other:
                lines.append(f"{arm} {text}: {'; '.join(texts)}")
    return lines


STABILITY = {  # column of the CSV: heading, how it is shown
    "truncated": ("cut", ".1%"),
    "repeating": ("repeating", ".1%"),
    "mean_length": ("length", ".0f"),
    "grad_norm_mean": ("gradient", ".2f"),
    "grad_norm_max": ("largest", ".2f"),
    "reverse_kl_0": ("KL start", ".3f"),
    "reverse_kl_3": ("KL end", ".3f"),
}


def stability(cells: Cells, knobs: Knobs, arms: list[str]) -> list[str]:
    """The spread over seeds, and means of what would show a run that goes wrong."""
    lines = [f"{'arm':14}{'sd':>8}{'greedy':>8}" + "".join(f"{head:>10}" for head, _ in STABILITY.values())]
    for arm in arms:
        of_arm = [list(cells.values(knobs.world, arm, name).values()) for name in ("accuracy", "greedy")]
        cells_of_line = [f"{statistics.stdev(x):8.1%}" if len(x) > 1 else f"{'-':>8}" for x in of_arm]
        for name, (_, form) in STABILITY.items():
            rows = [row for row in cells.of(knobs.world, arm).values() if row[name]]
            cells_of_line.append(f"{claims.mean_of(rows, name):10{form}}" if rows else f"{'-':>10}")
        lines.append(f"{arm:14}" + "".join(cells_of_line))
    return [*lines, "sd: over seeds; cut, repeating, length: of the sampled answers after training"]


def kl_profile(cells: Cells, world: str, arm: str, writer: str) -> list[float]:
    """The mean over seeds of the reverse KL in each tenth of T; nan where no seed has tokens."""
    found = []
    for i in TENTHS:
        values = [row[f"kl_{writer}_{i}"] for row in cells.of(world, arm).values()]
        found.append(statistics.fmean(map(float, filter(None, values))) if any(values) else math.nan)
    return found


def profiles(cells: Cells, knobs: Knobs, arms: list[str]) -> list[str]:
    lines = ["reverse KL, nats per token, in each tenth of T"]
    for writer in WRITERS:
        for arm in ("student", *arms):
            numbers = "".join(f"{x:8.3f}" for x in kl_profile(cells, knobs.world, arm, writer))
            lines.append(
                f"{arm:14}{'own' if writer == 'own' else writer + chr(39) + 's':>10} rollouts{numbers}"
            )
    return lines


LOOKS = dict(zip((*FIRST, *THEN), STYLES[:7] + [look | {"markerfacecolor": "white"} for look in STYLES]))
LOOKS["student"] = {"color": "#999999", "marker": "", "linestyle": ":", "linewidth": 2}
LOOKS["teacher"] = {"color": "#555555", "marker": "", "linestyle": "--"}


def draw(cells: Cells, knobs: Knobs) -> Path:
    """Above accuracy against tokens, below the reverse KL by position before and after."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 9), layout="constrained", sharey="row")
    for axis, kind in zip(axes[0], SCORES):
        draw_scores(axis, cells, knobs, SCORES[kind])
        axis.set(title=f"{kind} answers", xlabel="tokens sampled in training", xscale="log", ylim=(0, 1))
    middles = [(i + 0.5) * knobs.preset()["max_new_tokens"] / 10 for i in TENTHS]
    titles = {
        "student": "on the same rollouts of the student before",
        "own": "on each student's own rollouts",
    }
    for axis, (writer, title) in zip(axes[1], titles.items()):
        for arm in filter(lambda arm: cells.of(knobs.world, arm), ("student", "full", "topd-0.1", "esr")):
            axis.plot(middles, kl_profile(cells, knobs.world, arm, writer), **LOOKS[arm], markersize=5)
        axis.set(title=title, xlabel="position in the answer", yscale="log")
    axes[0, 0].set_ylabel("held-out accuracy, 95 % intervals over seeds")
    axes[1, 0].set_ylabel("reverse KL, nats per token")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(textwrap.fill(missing(cells, knobs), 110), fontsize=8, color=VERMILION)
    return save(figure, Path(knobs.csv).with_suffix(".png"))


def draw_scores(axis, cells: Cells, knobs: Knobs, name: str) -> None:
    """A point for each arm, lines for student and teacher."""
    for arm in filter(lambda arm: cells.of(knobs.world, arm), LOOKS):
        values = list(cells.values(knobs.world, arm, name).values())
        mean = statistics.fmean(values)
        if arm in ARMS:
            tokens = statistics.fmean(cells.values(knobs.world, arm, "response_tokens").values())
            found = mean_of(values)
            error = found.high - found.mean if found else None
            look = LOOKS[arm] | {"linestyle": "", "markersize": 8, "capsize": 3}
            axis.errorbar(tokens, mean, yerr=error, **look, label=arm)
        else:
            axis.axhline(mean, **LOOKS[arm], label=arm)


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    if knobs.predict:
        print(predict(knobs))
        return
    if not knobs.report:
        run_all(knobs)
    cells = cells_of(knobs)
    print(report(cells, knobs))
    print(f"figure: {draw(cells, knobs)}")


if __name__ == "__main__":
    run_main(main)
