"""What every probe needs: its settings, two or three models, problems and prompts; by default the toy's."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from eval_math import INSTRUCTION
from schedules import SCHEDULES, make_schedule
from support import data, models, run_folder, toy
from support.batch_size import batch_that_fits
from support.cli import BadInput, knob
from support.workers import Grader


@dataclass(frozen=True)
class Knobs:
    student: str = knob("", "hub name or folder, before training; default, also of the next two: the toy's")
    teacher: str = knob("", "hub name or folder; same tokenizer as the student's")
    data: str = knob("", "hub name[:config], folder or file: its test split")
    world: str = knob("opening", "the toy's world", choices=toy.WORLDS)
    problems: int = knob(100, "a random subset drawn by the seed", least=2)
    samples: int = knob(4, "answers to each problem", least=1)
    instruction: str = knob(INSTRUCTION, "text after each problem; the toy: none")
    system_prompt: str = knob("", "system message; the chat template's own if empty")
    max_new_tokens: int = knob(1024, "T, the full response length; the toy: 128", least=2)
    temperature: float = knob(1.0, "of the sampling, and of both models' distributions", least=0.01)
    sample_batch: int = knob(100, "answers sampled together", least=1)
    micro_batch: int = knob(8192, "tokens scored together", least=1)
    seed: int = knob(0, "of problems, sampling and the toy's training", least=0, most=2**32)
    dtype: str = knob("", "default: the faster one here", choices=("bfloat16", "float32"))
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    out: str = knob("", "CSV file, its figure is written next to it; default: results/probe_NAME.csv")

    def settings(self, probe: str) -> dict[str, str]:
        """What all rows of a CSV file have, as text. Of a folder, the last two parts of its path."""
        found = {"probe": probe} | {name: value for name, value in asdict(self).items() if name != "out"}
        for name, value in found.items():
            text = "" if value is None else str(value).replace(f"{toy.CACHE}/", "toy/")
            found[name] = "/".join(Path(text).parts[-2:]) if Path(text).is_absolute() else text
        return found


@dataclass(frozen=True)
class PrefixKnobs(Knobs):
    prefixes: str = knob("0 0.05 0.1 0.2 0.4 0.6", "values of k: below 1 a fraction of T, otherwise tokens")


@dataclass(frozen=True)
class TrainedKnobs(Knobs):
    samples: int = knob(
        16, "answers to each problem: a few degenerate ones hold most of the reverse KL", least=1
    )
    trained: str = knob("", "the student after training, RUN/student; default: the toy's, trained first")
    horizon: float | None = knob(None, "N of that training, as train.py's --horizon; the toy: 20")
    schedule: str = knob("esr", "of the toy's training", choices=SCHEDULES)
    steps: int = knob(40, "of the toy's training", least=1)

    def horizon_at(self, step: int) -> int:
        name = self.schedule or "esr"
        return make_schedule(name, self.max_new_tokens, max(self.steps, 1), self.horizon)(step)

    def window(self) -> int:
        """N: training reached the positions 0 to N - 1, if the horizon grew at its end."""
        return self.horizon_at(max(self.steps, 1) - 1)


@dataclass(frozen=True)
class SwapKnobs(PrefixKnobs, TrainedKnobs):
    samples: int = knob(4, "answers to each problem", least=1)


class Setup(NamedTuple):
    before: train.Pair
    after: train.Pair | None  # the same teacher, the student after training
    problems: list[data.Problem]
    prompts: list[list[int]]
    grader: Grader | None


def complete(knobs_class: type, given: dict) -> Knobs:
    """The given settings over the toy's, or over the defaults if models are given. Raises BadInput."""
    real = given.keys() & {"student", "teacher", "data"}
    if real and (len(real) < 3 or "world" in given):
        raise BadInput("--student, --teacher and --data go together: give all three, or none and --world")
    known = knobs_class.__dataclass_fields__
    defaults = {"world": ""} if real else toy.preset(given.get("world", Knobs.world))
    if issubclass(knobs_class, TrainedKnobs):
        if real or "trained" in given:
            if not {"trained", "horizon"} <= given.keys() or given.keys() & {"schedule", "steps"}:
                what = "a student that is trained already needs --trained RUN/student and --horizon, its N"
                raise BadInput(f"{what}; --schedule and --steps are the toy's own training: drop them")
            defaults |= {"schedule": "", "steps": 0}
        elif given.get("schedule", "esr") == "esr":
            defaults |= {"horizon": 20.0}
    knobs = knobs_class(**({name: value for name, value in defaults.items() if name in known} | given))
    if isinstance(knobs, TrainedKnobs):
        knobs.window()  # raises BadInput before minutes of loading
    if isinstance(knobs, PrefixKnobs):
        knobs = replace(knobs, prefixes=prefix_lengths(knobs))
    return replace(knobs, dtype=models.dtype_name(knobs.dtype, models.find_device(knobs.device)))


def prefix_lengths(knobs: PrefixKnobs) -> str:
    """--prefixes in tokens, sorted, with N if there is one. Raises BadInput."""
    try:
        numbers = [float(k) for k in knobs.prefixes.split()]
        lengths = {int(k) if k >= 1 else round(k * knobs.max_new_tokens) for k in numbers}
    except (ValueError, OverflowError) as error:
        raise BadInput(
            f"--prefixes {knobs.prefixes!r} ({error}): give numbers such as '0 0.1 100'"
        ) from error
    flags = f"--prefixes {knobs.prefixes!r}"
    if isinstance(knobs, SwapKnobs):
        lengths.add(knobs.window())
        flags += " and --horizon"
    if not lengths or not 0 <= min(lengths) <= max(lengths) < knobs.max_new_tokens or max(lengths) == 0:
        limit = f"below --max-new-tokens {knobs.max_new_tokens}, one of them above 0"
        raise BadInput(f"{flags} give the lengths {sorted(lengths)}: give some {limit}")
    return " ".join(map(str, sorted(lengths)))


def check_results(path: Path, settings: dict[str, str], flag: str = "--out") -> None:
    """Raises BadInput if `path` has results of other settings, which would be lost or mixed."""
    if path.suffix != ".csv":
        raise BadInput(f"{flag} {path} is not a .csv file: name one, the figure is written next to it")
    run_folder.check_file(path, flag)
    for row in run_folder.read_csv(path) if path.exists() else []:
        for name, value in settings.items():
            if row.get(name) != value:
                what = f"{path} holds results of other settings ({name} {row.get(name)!r}, here {value!r})"
                raise BadInput(f"{what}: move it away, or name another {flag}")


def load(knobs: Knobs, grader: Grader | None) -> Setup:
    """Models, problems and prompts; trains the toy's student if the probe needs it. Raises BadInput."""
    if knobs.world:
        toy.build(knobs.world)
    problems = data.subset(data.read_problems(knobs.data, "test"), knobs.problems, knobs.seed)
    if len(problems) < 2:
        raise BadInput(f"{knobs.data} has one problem: it needs two or more")
    device = models.find_device(knobs.device)
    pair = train.load_pair(knobs.student, knobs.teacher, knobs.dtype, device)
    prompts = data.render(pair.tokenizer, problems, knobs.instruction, knobs.system_prompt)
    models.check_context([pair.student, pair.teacher], prompts, knobs.max_new_tokens)
    batch_that_fits(pair.teacher, prompts, knobs.max_new_tokens, knobs.sample_batch)
    after = after_training(pair, knobs, device) if isinstance(knobs, TrainedKnobs) else None
    return Setup(pair, after, problems, prompts, grader)


def after_training(pair: train.Pair, knobs: TrainedKnobs, device: torch.device) -> train.Pair:
    """The pair with the student of --trained, or with the toy's student, which is trained here."""
    name = knobs.trained or knobs.student
    models.tokenizers_differ(name, knobs.teacher, allowed=False)
    student = models.load_model(name, torch.float32, device).requires_grad_(not knobs.trained)
    dtype = getattr(torch, knobs.dtype)
    after = train.make_pair(student, pair.teacher, pair.tokenizer, pair.vocab_size, pair.eos_ids, dtype)
    if not knobs.trained:
        train_toy(after, knobs)
    return after


class RunWithBar(run_folder.Run):
    def steps(self, total: int) -> Iterator[int]:
        yield from tqdm(super().steps(total), "training", total, leave=False)


def train_toy(pair: train.Pair, knobs: TrainedKnobs) -> None:
    """Train the pair's student as train.py does with the toy's preset and this schedule, horizon and seed."""
    names = ("schedule", "horizon", "steps", "seed", "max_new_tokens")
    changes = {name: getattr(knobs, name) for name in names} | {"eval_every": 0}
    settings = train.Knobs(**(toy.preset(knobs.world) | changes))
    prompts = data.render(pair.tokenizer, data.read_problems(knobs.data, "train"), settings.instruction)
    run = RunWithBar(pair.student.device)
    train.train(pair, train.adamw(pair, settings), prompts, knobs.horizon_at, settings, run)
