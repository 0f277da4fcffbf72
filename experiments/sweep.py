"""Worlds x seeds x arms x learning rates in one CSV file: what phase.py and words.py have in common.

A row of the CSV is an untrained model or a finished run, scored on held-out problems after its last step.
Runs whose rows exist are not repeated, and rows of other settings are refused. A seed redraws problems,
student, teacher and training. The learning rate of each arm is chosen on a seed of its own and then kept: the
one with the highest mean accuracy. Several processes share the work by locks.
"""

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import compare
from arms import Arm
from claims import MIN_SEEDS, Interval, Row, check_settings, interval, read_rows
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

import train
from extras import profile_horizon
from support import run_folder, toy
from support.cli import BadInput

CACHE = toy.CACHE  # where the locks are
SWEEP_SEED = 0  # that of the learning rates; the others are 1, 2, ...
SETTINGS = ("max_new_tokens", "batch_size", "divergence", "warmup", "decay", "beta2", "clip", "dtype")
ENDS = [("student", ""), ("teacher", "")]  # arms without a learning rate: what is scored without training

Place = float | str  # which world
Key = tuple[Place, int, str, str]  # place, seed, arm, learning rate


class Unit(NamedTuple):
    """Runs that one process makes in a row: pairs of an arm and its learning rate, as text."""

    lock: str
    place: Place
    seed: int
    runs: list[tuple[str, str]]


class World(NamedTuple):
    place: Place
    setup: compare.Setup
    settings: compare.Knobs  # train.py's


def load(place: Place, folder: Path, preset: dict, **changes: Any) -> World:
    """The world in `folder`: models, problems and train.py's settings."""
    names = {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "data": str(folder)}
    settings = compare.Knobs(**preset | names | {"device": "cpu", "eval_every": 0} | changes)
    return World(place, compare.load(settings), settings)


def train_arm(
    world: World,
    arms: dict[str, Arm],
    name: str,
    lr: str,
    auto: str | int,
    score_point: Callable | None = None,
    points: int = 1,
) -> compare.ArmRun:
    """Train the student as the arm says; `auto` is the horizon of `esr` in tokens.

    With `points` above 1, `score_point` is called between the parts of the run.
    """
    settings = replace(world.settings, lr=float(lr), esr_tokens=int(auto), curve_points=points)
    with tqdm(disable=True) as bar:
        return compare.train_arm(world.setup, name, settings, bar, score_point, arms)


def reverse_kl(world: World, prompts: list[list[int]], **how: Any) -> dict[str, Tensor]:
    """The token statistics of full rollouts, as `profile_horizon.measure` has them."""
    settings = world.settings
    how |= {"micro_batch": settings.micro_batch, "seed": settings.seed}
    return profile_horizon.measure(train.score, world.setup.pair, prompts, settings.max_new_tokens, **how)


def horizon_auto(world: World) -> int:
    """The horizon that `--horizon auto` suggests."""
    tokens = reverse_kl(world, world.setup.prompts)
    return profile_horizon.horizon_of_profile(tokens["reverse_kl"], tokens["position"])


def settings_of(preset: dict, **own: Any) -> Row:
    """The columns in which all rows agree."""
    shared = own | {name: getattr(compare.Knobs(**preset), name) for name in SETTINGS}
    return {name: str(value) for name, value in shared.items()}


@dataclass(frozen=True)
class Sweep:
    path: Path  # of the CSV
    settings: Row
    column: str  # that of the place
    place_of: Callable[[str], Place]
    tuning: Collection[Place]  # the places in which learning rates are tried
    rates: tuple[str, ...]
    load: Callable[[Unit], World]
    measure: Callable[[World, str, str, Row], Row]  # (world, arm, learning rate, student's row) -> columns
    least_teacher: float = 0.0  # accuracy; a world whose teacher is below it is left out

    def run(self, units: list[Unit]) -> None:
        """First the units that no other process is at; then, once they are free, what the others lack."""
        run_folder.check_file(self.path, "--csv")
        CACHE.mkdir(parents=True, exist_ok=True)
        for timeout in (0, -1):
            for unit in units:
                try:
                    with FileLock(CACHE / f"{unit.lock}.lock", timeout=timeout):
                        self.run_unit(unit)
                except Timeout:
                    continue

    def run_unit(self, unit: Unit) -> None:
        """Make the rows of the unit that are missing."""
        lock = FileLock(CACHE / f"{self.path.name}.lock")
        with lock:
            done = self.read()
        _, place, seed, runs = unit
        missing = [run for run in runs if (place, seed, *run) not in done]
        if not missing or (place, seed) in self.unusable(done):
            return
        world = self.load(unit._replace(runs=missing))
        masters = world.setup.pair.masters
        start = {name: weight.detach().clone() for name, weight in masters.items()}
        student = done.get((place, seed, "student", ""), {})  # otherwise the student is the first run
        for arm, lr in missing:
            for name, weight in masters.items():
                weight.data.copy_(start[name])
            found = self.measure(world, arm, lr, student)
            student = found if arm == "student" else student
            row = {self.column: place, "seed": seed, "arm": arm, "lr": lr} | found | self.settings
            with lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                run_folder.append_csv(self.path, [row])
            print(f"{self.column} {place}, seed {seed}, {arm} {lr}: {found['accuracy']:.0%}", flush=True)
            if arm == "teacher" and found["accuracy"] < self.least_teacher:
                return

    def read(self) -> dict[Key, Row]:
        """The rows. Raises BadInput for one of other settings, an incomplete one, or one twice."""
        rows = read_rows(self.path, (self.column, "seed", "arm", "lr"))
        check_settings(self.path, rows.values(), self.settings)
        return {(self.place_of(place), int(seed), *run): row for (place, seed, *run), row in rows.items()}

    def finished(self) -> dict[Key, Row]:
        """The rows; raises BadInput if there are none."""
        rows = self.read()
        if not rows:
            raise BadInput(f"there is no row in {self.path}: run without --report first, or name --csv")
        return rows

    def unusable(self, rows: dict[Key, Row]) -> dict[tuple[Place, int], str]:
        """The worlds whose teacher has not learned the task, and its accuracy."""
        teachers = {key[:2]: row["accuracy"] for key, row in rows.items() if key[2] == "teacher"}
        return {world: found for world, found in teachers.items() if float(found) < self.least_teacher}

    def chosen_rates(self, rows: dict[Key, Row], arms: Collection[str]) -> dict[str, str]:
        """The learning rate of each arm for which all have been tried; of equals the lowest."""
        rates = {}
        for arm in arms:
            means = {}
            for lr in self.rates:
                found = [rows.get((place, SWEEP_SEED, arm, lr)) for place in self.tuning]
                if None not in found:
                    means[lr] = statistics.fmean(float(row["accuracy"]) for row in found)
            if len(means) == len(self.rates):
                rates[arm] = max(means, key=means.get)
        return rates


@dataclass(frozen=True)
class Cells:
    """What the rows say with the chosen learning rates, without SWEEP_SEED and the unusable worlds."""

    rows: dict[Key, Row]
    rates: dict[str, str]
    unusable: Collection[tuple[Place, int]]

    def of(self, place: Place, arm: str) -> dict[int, Row]:
        """The row of each seed."""
        wanted = (place, arm, self.rates.get(arm, ""))
        return {
            seed: row
            for (at, seed, *run), row in self.rows.items()
            if (at, *run) == wanted and seed != SWEEP_SEED and (at, seed) not in self.unusable
        }

    def values(self, place: Place, arm: str, name: str = "accuracy") -> dict[int, float]:
        """A number per seed."""
        return {seed: float(row[name]) for seed, row in self.of(place, arm).items()}


def mean_of(values: Collection[float]) -> Interval | None:
    """The mean over seeds; None with fewer than MIN_SEEDS."""
    if len(values) < MIN_SEEDS:
        return None
    return interval(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5, len(values))


def shown(found: Interval | None, form: str = ".0%") -> str:
    return f"{found.mean:{form}} [{found.low:{form}} to {found.high:{form}}]" if found else "no interval"
