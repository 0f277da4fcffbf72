"""Worlds x seeds x arms x learning rates in one CSV file: what phase.py and words.py have in common.

A row of the CSV is an untrained model or a finished run, scored on held-out problems after its last step.
Runs whose rows exist are not repeated, and rows of other settings are refused. Each seed has its own
problems, student, teacher and training. The learning rate of each arm is chosen on a separate seed, by the
highest mean accuracy, and then kept. Several processes share the work by locks.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import compare
import torch
from arms import Arm
from claims import Results, Row, check_settings, mean_of, read_rows
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

    `measure` builds the world if it does not exist, trains its student as the arm says, or only scores the
    student or the teacher, and returns columns of the row.
    """

    csv: str
    column: str  # that of the place
    place_of: type  # of the text in that column
    tuning: Collection[Place]  # the places in which learning rates are tried
    rates: tuple[str, ...]
    settings: Callable[[], Row]  # the columns in which all rows agree
    measure: Callable[..., Row]  # (place, seed, arm, learning rate, the untrained student's row)

    def run(self, worlds: list[tuple[Place, int]], runs: list[tuple[str, str]]) -> None:
        """Make the rows of these worlds, by place and seed, and these arms, each with its learning rate.

        First the runs that no other process is at; then, once they are free, what the others lack. ENDS have
        to come before the arms.
        """
        run_folder.prepare_file(Path(self.csv), "--csv")
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)  # each core has a process of its own
        for timeout in (0, -1):
            for (place, seed), (arm, lr) in product(worlds, runs):
                try:
                    name = f"{self.column}-{place}-{seed}-{arm}-{lr}.lock"
                    with FileLock(CACHE / name, timeout=timeout):
                        self.run_once(place, seed, arm, lr)
                except Timeout:
                    continue

    def run_once(self, place: Place, seed: int, arm: str, lr: str) -> None:
        """Make the row if it is missing."""
        path = Path(self.csv)
        lock = FileLock(CACHE / f"{path.name}.lock")
        with lock:
            done = self.read()
        if (place, seed, arm, lr) in done:
            return
        student = done.get((place, seed, "student", ""), {})
        found = self.measure(place, seed, arm, lr, student)
        row = {self.column: place, "seed": seed, "arm": arm, "lr": lr} | found | self.settings()
        with lock:
            run_folder.append_csv(path, [row])
        print(f"{self.column} {place}, seed {seed}, {arm} {lr}: {found['accuracy']:.0%}", flush=True)

    def read(self) -> dict[Key, Row]:
        """The rows. Raises BadInput for one of other settings, an incomplete or damaged one, or one twice."""
        rows = read_rows(Path(self.csv), (self.column, "seed", "arm", "lr"), ("accuracy",))
        check_settings(Path(self.csv), rows.values(), self.settings())
        found: dict[Key, Row] = {}
        try:
            for (place, seed, *run), row in rows.items():
                float(row["accuracy"])
                found[(self.place_of(place), int(seed), *run)] = row
        except ValueError as error:
            what = f"{self.csv} has a damaged row ({error})"
            raise BadInput(f"{what}: restore it, or name another --csv") from error
        return found

    def finished(self) -> dict[Key, Row]:
        """The rows; raises BadInput if there are none."""
        rows = self.read()
        if not rows:
            raise BadInput(f"there is no row in {self.csv}: run without --report first, or name --csv")
        return rows

    def chosen_rates(self, rows: dict[Key, Row], arms: Collection[str]) -> dict[str, str]:
        """The best learning rate of each arm for which all have been tried; if equal, the lowest."""
        rates = {}
        for arm in arms:
            runs = {lr: [(place, SWEEP_SEED, arm, lr) for place in self.tuning] for lr in self.rates}
            if all(key in rows for keys in runs.values() for key in keys):
                means = {lr: mean_of([rows[key] for key in keys], "accuracy") for lr, keys in runs.items()}
                rates[arm] = max(means, key=means.get)
        return rates

    def results(self, rows: dict[Key, Row], rates: dict[str, str]) -> dict[Place, Results]:
        """By place the rows with these learning rates, but those of SWEEP_SEED."""
        found: dict[Place, Results] = {}
        for (place, seed, arm, lr), row in rows.items():
            if seed != SWEEP_SEED and lr == rates.get(arm, ""):
                found.setdefault(place, {}).setdefault(arm, {})[seed] = row
        return found
