"""Worlds x seeds x arms x learning rates in one CSV file: what phase.py and words.py have in common.

A row of the CSV is an untrained model or a finished run, scored on held-out problems after its last step.
Runs whose rows exist are not repeated, and rows of other settings are refused. Each seed has its own
problems, student, teacher and training. The learning rate of each arm is chosen on a separate seed, by the
highest mean accuracy, and then kept. Several processes share the work by locks.
"""

import statistics
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import compare
from arms import Arm
from claims import Results, Row, check_settings, read_rows
from compare import Setup
from filelock import FileLock, Timeout

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

    place: Place
    seed: int
    runs: list[tuple[str, str]]


def load(folder: Path, preset: dict, **changes: Any) -> Setup:
    """Models and problems of the world in `folder`; settings are those of the preset, but for `changes`."""
    names = {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "data": str(folder)}
    return compare.load(compare.Knobs(**preset | names | {"device": "cpu", "eval_every": 0} | changes))


def train_arm(setup: Setup, arm: Arm, lr: str, auto: str | int, looks: int = 1) -> compare.ArmRun:
    """Train the student as the arm says; `auto` is the horizon of `esr` in tokens."""
    knobs = replace(setup.knobs, lr=float(lr), esr_tokens=int(auto), curve_points=looks)
    return compare.train_arm(setup._replace(knobs=knobs), arm)


def horizon_auto(setup: Setup) -> int:
    """The horizon that `--horizon auto` suggests."""
    tokens = profile_horizon.measure(train.score, setup.pair, setup.prompts, setup.knobs)
    return profile_horizon.horizon_of_profile(tokens["reverse_kl"], tokens["position"])


def settings_of(preset: dict, **own: Any) -> Row:
    """The columns in which all rows have the same values."""
    shared = own | {name: getattr(compare.Knobs(**preset), name) for name in SETTINGS}
    return {name: str(value) for name, value in shared.items()}


class Sweep:
    """What the settings of a sweep can do with its CSV file. Their class has the names that stand here.

    `measure` trains the student as the arm says, or only scores the student or the teacher: columns of a row.
    """

    csv: str
    column: str  # that of the place
    place_of: type  # of the text in that column
    tuning: Collection[Place]  # the places in which learning rates are tried
    rates: tuple[str, ...]
    least_teacher = 0.0  # accuracy; a world whose teacher is below it is left out
    settings: Callable[[], Row]  # the columns in which all rows agree
    load: Callable[[Place, int, str], Setup]  # of place, seed and arm; builds the world if it does not exist
    measure: Callable[[Setup, Place, str, str, Row], Row]  # arm, learning rate, the untrained student's row

    def run(self, units: list[Unit]) -> None:
        """First the units that no other process is at; then, once they are free, what the others lack."""
        run_folder.prepare_file(Path(self.csv), "--csv")
        CACHE.mkdir(parents=True, exist_ok=True)
        for timeout in (0, -1):
            for unit in units:
                name = "-".join(map(str, (self.column, unit.place, unit.seed, *unit.runs[0])))
                try:
                    with FileLock(CACHE / f"{name}.lock", timeout=timeout):
                        self.run_unit(unit)
                except Timeout:
                    continue

    def run_unit(self, unit: Unit) -> None:
        """Make the rows of the unit that are missing."""
        path = Path(self.csv)
        lock = FileLock(CACHE / f"{path.name}.lock")
        with lock:
            done = self.read()
        place, seed, runs = unit
        missing = [run for run in runs if (place, seed, *run) not in done]
        if not missing or (place, seed) in self.unusable(done):
            return
        setup = self.load(place, seed, missing[0][0])
        student = done.get((place, seed, "student", ""), {})  # otherwise the student is the first run
        for arm, lr in compare.each_from_start(setup.pair, missing):
            found = self.measure(setup, place, arm, lr, student)
            student = found if arm == "student" else student
            row = {self.column: place, "seed": seed, "arm": arm, "lr": lr} | found | self.settings()
            with lock:
                run_folder.append_csv(path, [row])
            print(f"{self.column} {place}, seed {seed}, {arm} {lr}: {found['accuracy']:.0%}", flush=True)
            if arm == "teacher" and found["accuracy"] < self.least_teacher:
                return

    def read(self) -> dict[Key, Row]:
        """The rows. Raises BadInput for one of other settings, an incomplete one, or one twice."""
        rows = read_rows(Path(self.csv), (self.column, "seed", "arm", "lr"))
        check_settings(Path(self.csv), rows.values(), self.settings())
        return {(self.place_of(place), int(seed), *run): row for (place, seed, *run), row in rows.items()}

    def finished(self) -> dict[Key, Row]:
        """The rows; raises BadInput if there are none."""
        rows = self.read()
        if not rows:
            raise BadInput(f"there is no row in {self.csv}: run without --report first, or name --csv")
        return rows

    def unusable(self, rows: dict[Key, Row]) -> dict[tuple[Place, int], str]:
        """The worlds whose teacher has not learned the task, and its accuracy."""
        teachers = {key[:2]: row["accuracy"] for key, row in rows.items() if key[2] == "teacher"}
        return {world: found for world, found in teachers.items() if float(found) < self.least_teacher}

    def chosen_rates(self, rows: dict[Key, Row], arms: Collection[str]) -> dict[str, str]:
        """The best learning rate of each arm for which all have been tried; if equal, the lowest."""
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

    def results(self, rows: dict[Key, Row], rates: dict[str, str]) -> dict[Place, Results]:
        """By place the rows with these learning rates, but those of SWEEP_SEED and of unusable worlds."""
        unusable = self.unusable(rows)
        found: dict[Place, Results] = {}
        for (place, seed, arm, lr), row in rows.items():
            if seed != SWEEP_SEED and (place, seed) not in unusable and lr == rates.get(arm, ""):
                found.setdefault(place, {}).setdefault(arm, {})[seed] = row
        return found
