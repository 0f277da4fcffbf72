"""Which arms keep full's gain in a world whose gap between student and teacher was not designed, and why.

    python experiments/words.py                             learning rates, then the seeds of every arm
    python experiments/words.py --report                    table, verdicts and figure of the existing rows
    python experiments/words.py --decay                     whether the teacher decays on the student's text
    python experiments/words.py --arms esr --rate 0.0005    with another learning rate than the best

The world is that of support/words.py; the arms are in arms.py. sweep.py says how learning rates are chosen
and what a row of the CSV is. Student and teacher of every seed come first, then one arm after the other, the
most important ones first, in case the sweep is stopped.

Columns: `correct` and `correct_greedy` have a digit per held-out problem. `kl_WRITER_i` is the exact reverse
KL in nats per token, in the i-th tenth of T, on full rollouts to held-out problems by the student before
training, by the teacher (the same for all arms), and by the trained student itself (own); the runs that
choose a learning rate leave it out. `grad_norm_mean` and `grad_norm_max` are over its steps, `accuracy_i` is
the sampled accuracy after the i-th quarter of them, `auto` the horizon of `--horizon auto`, which is esr's N.
"""

import math
import statistics
import textwrap
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import claims
import probe
import sweep
from arms import ARMS
from claims import MARGIN, Results, Row, interval_of, shown, verdict
from compare import Setup
from figures import STYLES, VERMILION, plt, save
from root import RESULTS
from sweep import ENDS, SWEEP_SEED, Sweep

import train
from eval_math import boxed, extract
from extras import profile_horizon
from rollout import rollout
from support import run_folder, words
from support.cli import BadInput, knob, parse, run_main
from support.workers import Grader

WORLD = "words"  # the only place of this sweep
RUN = ("full", "popd", "topd-0.25", "topd-0.1", "esr", "no-teacher", "seqkd")  # arms, by importance
RUN += ("first", "self-teacher", "no-end", "seqkd-0.1", "gkd", "lora", "lora-esr")
RATES = ("0.00017", "0.0005", "0.0015", "0.0045", "0.0135")
WRITERS = {  # whose rollouts the reverse KL is measured on
    "student": "on the same rollouts of the student before",
    "teacher": "on the same rollouts of the teacher",
    "own": "on each student's own rollouts",
}
DRAWN = ("student", "full", "topd-0.1", "esr")  # their reverse KL by position
TENTHS = range(10)
PREFIXES = "0 10 25 50 75"
SCORES = {"sampled": "accuracy", "greedy": "greedy"}  # the columns of the two accuracies
CLAIMS = {  # about an arm: the arm it is compared with, and the least difference
    "is at least as good as full": ("full", -MARGIN),
    "passes its teacher": ("teacher", 0.0),
    "is better than the student before": ("student", 0.0),
}
TABLE = {  # column of the CSV: heading, how it is shown
    "response_tokens": ("tokens", ",.0f"),
    "seconds": ("seconds", ".1f"),
    "accuracy_0": ("at 1/4", ".1%"),  # of the run, sampled
    "accuracy_1": ("at 2/4", ".1%"),
    "accuracy_2": ("at 3/4", ".1%"),
    "mean_length": ("length", ".0f"),
    "truncated": ("cut", ".1%"),
    "repeating": ("loops", ".1%"),
    "grad_norm_mean": ("gradient", ".2f"),
    "grad_norm_max": ("largest", ".2f"),
}
LOOKS = dict(zip(("full", "topd-0.1", "esr"), STYLES))  # of an arm that is not here: black
LOOKS["student"] = {"color": "#999999", "marker": "", "linestyle": ":", "linewidth": 2}
LOOKS["teacher"] = {"color": "#555555", "marker": "", "linestyle": "--"}


@dataclass(frozen=True)
class Knobs(Sweep):
    arms: tuple[str, ...] = knob(RUN, "may be repeated", choices=RUN)
    seeds: int = knob(8, "worlds, besides that of the learning rates", least=1)
    steps: int = knob(words.PRESET["steps"], "of training", least=1)
    problems: int = knob(500, "held-out, answered once at temperature 1 and once greedily", least=2)
    rollouts: int = knob(128, "for the reverse KL by position, of each writer", least=2)
    rate: str = knob("", "learning rate of all of --arms, full too; default: the best of each", choices=RATES)
    csv: str = knob(str(RESULTS / "words.csv"), "results; the figure is written next to it")
    decay: bool = knob(False, "only measure the decay of the teacher in all other worlds, into ..._decay.csv")
    report: bool = knob(False, "train nothing: table, verdicts and figure of the rows in the CSV")

    column = "world"
    place_of = str
    tuning = (WORLD,)
    rates = RATES

    def chosen_rates(self, rows: dict[sweep.Key, Row], arms: tuple[str, ...]) -> dict[str, str]:
        return dict.fromkeys(arms, self.rate) if self.rate else super().chosen_rates(rows, arms)

    def settings(self) -> Row:
        """`worlds` is a hash of how the worlds are made."""
        worlds = f"words-{sha256(Path(words.__file__).read_bytes()).hexdigest()[:8]}"
        own = {"steps": self.steps, "problems": self.problems, "rollouts": self.rollouts}
        return sweep.settings_of(words.PRESET, worlds=worlds, **own)

    def load(self, seed: int, arm: str) -> Setup:
        low_memory = arm in ARMS and ARMS[arm].low_memory
        ours = {"steps": self.steps, "eval_limit": self.problems, "seed": seed, "low_memory": low_memory}
        return sweep.load(words.build(rollout, words.Recipe(seed)), words.PRESET, **ours)

    def measure(self, place: str, seed: int, arm: str, lr: str, student: Row) -> Row:
        setup = self.load(seed, arm)
        start = deepcopy(setup.pair.student)
        whole = seed != SWEEP_SEED  # other runs only choose a learning rate
        row = dict.fromkeys(claims.COSTS, 0)
        if arm in ARMS:
            run = sweep.train_arm(setup, ARMS[arm], lr, student["auto"], looks=4 if whole else 1)
            norms = [step["grad_norm"] for step in run.rows]
            row = run.costs() | {"grad_norm_mean": statistics.fmean(norms), "grad_norm_max": max(norms)}
            row |= {f"accuracy_{round(4 * look['part']) - 1}": look["accuracy"] for look in run.looks}
        row |= setup.scores(setup.pair.teacher if arm == "teacher" else setup.pair.student, "repeating")
        if arm == "student":
            row["auto"] = sweep.horizon_auto(setup)
        if arm == "student" or (arm in ARMS and whole):
            for name, writer in zip(WRITERS, (start, setup.pair.teacher, setup.pair.student)):
                prompts, how = setup.held_out.prompts, {"rollouts": self.rollouts, "writer": writer}
                tokens = profile_horizon.measure(train.score, setup.pair, prompts, setup.knobs, **how)
                found = by_tenth(tokens, setup.knobs.max_new_tokens)
                row |= {f"kl_{name}_{i}": value for i, value in found.items()}
        return row


def by_tenth(tokens: dict, length: int) -> dict[int, float]:
    """The mean reverse KL of the tokens in each tenth of `length` positions that has some."""
    tenth = tokens["position"] * 10 // length
    return {i: tokens["reverse_kl"][tenth == i].mean().item() for i in tenth.unique().tolist()}


def run_all(knobs: Knobs) -> None:
    """The untrained models, then one arm after the other; several processes share the runs."""
    tuning = [(WORLD, SWEEP_SEED)]
    worlds = [(WORLD, seed) for seed in range(1, knobs.seeds + 1)]
    knobs.run(tuning + worlds, ENDS)
    for arm in knobs.arms:
        if not knobs.rate:
            knobs.run(tuning, [(arm, lr) for lr in RATES])
        knobs.run(worlds, list(knobs.chosen_rates(knobs.read(), (arm,)).items()))


# The teacher on the student's text.


def decay(setup: Setup, problems: int) -> list[dict]:
    """The teacher's accuracy when it continues k tokens by the student, and k of its own."""
    names = ("data", "instruction", "max_new_tokens")
    settings = {name: getattr(setup.knobs, name) for name in names} | {"problems": problems}
    knobs = probe.Knobs(**settings, prefixes=PREFIXES, sample_batch=setup.knobs.eval_batch)
    with Grader(extract, boxed) as grader:
        return list(probe.decay(probe.set_up(setup.pair, None, grader, knobs)))


def decay_in_worlds(knobs: Knobs) -> str:
    """The decay in every world of the arms, before and after full training; means with a t interval.

    Raises BadInput if the file has other settings, or if the learning rate of full has not been chosen yet.
    """
    path = Path(knobs.csv).with_stem(f"{Path(knobs.csv).stem}_decay")
    run_folder.prepare_file(path, "--csv")
    claims.check_settings(path, run_folder.read_csv(path) if path.exists() else [], knobs.settings())
    lr = knobs.chosen_rates(knobs.finished(), ("full",)).get("full")
    if not lr:
        raise BadInput(f"{knobs.csv} has no learning rate of full: run words.py without --decay first")
    rows = []
    for seed in range(1, knobs.seeds + 1):
        setup = knobs.load(seed, "full")
        rows += [{"seed": seed, "student": "before"} | row for row in decay(setup, knobs.problems)]
        sweep.train_arm(setup, ARMS["full"], lr, auto=1)
        rows += [{"seed": seed, "student": "after full"} | row for row in decay(setup, knobs.problems)]
    rows = [row | knobs.settings() for row in rows]
    run_folder.write_csv(path, list(rows[0]), rows)
    values: dict[str, list[float]] = {}
    for row in rows:
        name = "{student:10} {curve:20} {at:>5}".format_map(row)
        values.setdefault(name, []).append(row["value"])
    shares = {name: shown(interval_of(found), ".1%") for name, found in values.items()}
    return "\n".join(f"{name} {share}, {len(values[name])} worlds" for name, share in shares.items())


# What the rows show.


def results_of(knobs: Knobs) -> tuple[Results, dict[str, str]]:
    """By arm and seed the rows with the chosen learning rates, and these."""
    rows = knobs.finished()
    rates = knobs.chosen_rates(rows, knobs.arms)
    results = knobs.results(rows, rates).get(WORLD, {})
    return {arm: results[arm] for arm in (*claims.ENDS, *rates) if arm in results}, rates


def missing(results: Results, knobs: Knobs) -> str:
    lacking = claims.missing(results, knobs.arms, knobs.seeds, first=1)
    return f"missing: {'; '.join(lacking)}" if lacking else ""


def mean(results: Results, arm: str, name: str) -> float:
    return statistics.fmean(claims.values(results, arm, name) or [math.nan])


def cell(value: float, form: str) -> str:
    return f"{'-':>10}" if math.isnan(value) else f"{value:10{form}}"


def report(results: Results, rates: dict[str, str], knobs: Knobs) -> str:
    edges = {RATES[0]: " (the lowest)", RATES[-1]: " (the highest)"}
    lines = ["learning rates: " + ", ".join(f"{arm} {lr}{edges.get(lr, '')}" for arm, lr in rates.items())]
    lines += ["[ ]: 95 % t interval over seeds, each of which redraws problems, student, teacher, training"]
    heads = "".join(f"{head:>10}" for head, _ in TABLE.values())
    lines += ["", f"{'arm':13}{'sampled':24}{'greedy':24}{'sd':>6}{heads}{'seeds':>6}"]
    for arm, of_arm in results.items():
        values = [claims.values(results, arm, name) for name in SCORES.values()]
        spread = statistics.stdev(values[0]) if len(of_arm) > 1 else math.nan
        cells = "".join(cell(mean(results, arm, name), form) for name, (_, form) in TABLE.items())
        sampled, greedy = (shown(interval_of(of_kind), ".1%") for of_kind in values)
        lines += [f"{arm:13}{sampled:24}{greedy:24}{spread:6.1%}{cells}{len(of_arm):6}"]
    lines += ["sd: of sampled over seeds; at 1/4: sampled, after a quarter of the steps; length, cut, loops:"]
    lines += ["of sampled answers; gradient: its norm in training"]
    lines += ["", *verdicts(results), "", "reverse KL, nats per token, in each tenth of T"]
    for writer, title in WRITERS.items():
        for arm in filter(results.get, DRAWN):
            means = "".join(f"{mean(results, arm, f'kl_{writer}_{i}'):8.3f}" for i in TENTHS)
            lines += [f"{arm:13}{title:45}{means}"]
    return "\n".join([*lines, "", missing(results, knobs)])


def verdicts(results: Results) -> list[str]:
    lines = [f"A claim holds if the interval lies above {-MARGIN:.0%} against full, above 0 otherwise"]
    for text, (other, low) in CLAIMS.items():
        for arm in [arm for arm in results if arm in ARMS and arm != other and other in results]:
            texts = []
            for kind, name in SCORES.items():
                found = interval_of(claims.gaps(results, arm, other, name))
                texts.append(f"{kind} {verdict(found, low, math.inf)}, {shown(found, '+.1%')}")
            lines.append(f"{arm} {text}: {'; '.join(texts)}")
    return lines


def draw(results: Results, knobs: Knobs) -> Path:
    """Top: what every arm gains; bottom: the reverse KL by position, before and after training."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 9.5), layout="constrained", sharey="row")
    for axis, (kind, name) in zip(axes[0], SCORES.items()):
        draw_scores(axis, results, name)
        axis.set(title=f"{kind} answers", xlabel="gain over the student before, points, 95 % over seeds")
    middles = [(i + 0.5) * words.PRESET["max_new_tokens"] / 10 for i in TENTHS]
    for axis, writer in zip(axes[1], ("student", "own")):
        for arm in filter(results.get, DRAWN):
            means = [math.nan] * len(TENTHS)  # where a seed has no token: few answers are that long
            for i in TENTHS:
                values = claims.values(results, arm, f"kl_{writer}_{i}")
                if len(values) == len(results[arm]):
                    means[i] = statistics.fmean(values)
            axis.plot(middles, means, **LOOKS[arm], markersize=5, label=arm)
        axis.set(title=WRITERS[writer], xlabel="position in the answer", yscale="log")
    axes[1, 0].set_ylabel("reverse KL, nats per token")
    axes[0, 1].legend(frameon=False, loc="upper left")
    axes[1, 0].legend(frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(missing(results, knobs), 110), fontsize=8, color=VERMILION)
    return save(figure, Path(knobs.csv).with_suffix(".png"))


def draw_scores(axis, results: Results, name: str) -> None:
    """A row for each arm, with its tokens as a share of full's, and lines for student and teacher.

    A gain is paired by seed, so the worlds' different students do not widen its interval.
    """
    arms = [arm for arm in results if arm in ARMS]
    gains = {arm: interval_of(claims.gaps(results, arm, "student", name)) for arm in results}
    for arm, found in gains.items():
        if found and arm in claims.ENDS:
            axis.axvline(100 * found.mean, **LOOKS[arm], label=arm)
        elif found:
            look = LOOKS.get(arm, {"color": "black", "marker": "o"}) | {"linestyle": "", "capsize": 3}
            error = 100 * (found.high - found.mean)
            axis.errorbar(100 * found.mean, arms.index(arm), xerr=error, **look)
    tokens = {arm: mean(results, arm, "response_tokens") for arm in ("full", *arms)}
    axis.set_yticks(range(len(arms)), [f"{arm}, {tokens[arm] / tokens['full']:.0%}" for arm in arms])
    axis.set_ylim(len(arms) - 0.5, -0.7)
    axis.set_ylabel("arm, and its tokens as a share of full's" if name == "accuracy" else "")


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    if knobs.decay and knobs.rate:
        raise BadInput(f"--decay is measured with full's best learning rate: drop --rate {knobs.rate}")
    if knobs.decay:
        print(decay_in_worlds(knobs))
        return
    if not knobs.report:
        run_all(knobs)
    results, rates = results_of(knobs)
    print(report(results, rates, knobs))
    if not knobs.rate:
        print(f"figure: {draw(results, knobs)}")


if __name__ == "__main__":
    run_main(main)
