"""What every probe needs: its knobs, two or three models, problems and prompts; on the toy by default."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import fast
import memory
import models
import report
import toy
from cli import BadInput, knob
from eval_math import INSTRUCTION
from grading import Grader
from schedules import SCHEDULES, make_schedule
from train import Knobs as TrainKnobs
from train import update


@dataclass(frozen=True)
class Knobs:
    student: str = knob("", "hub name or folder, before training; the toy's, like the next two, if empty")
    teacher: str = knob("", "hub name or folder; same tokenizer as the student's")
    data: str = knob("", "hub name[:config], folder or file: its test split, for profile its train split")
    world: str = knob("opening", "the toy's world", choices=toy.WORLDS)
    problems: int = knob(100, "a random subset drawn by the seed", 2)
    samples: int = knob(4, "answers to each problem", 1)
    instruction: str = knob(INSTRUCTION, "text after each problem; the toy: none")
    system_prompt: str = knob("", "system message; the chat template's own if empty")
    max_new_tokens: int = knob(1024, "T, the full response length; the toy: 128", 2)
    temperature: float = knob(1.0, "of the sampling, and of both models' laws", 0.01)
    sample_batch: int = knob(100, "answers sampled together; it decides which random numbers they get", 1)
    micro_batch: int = knob(8192, "tokens scored together", 1)
    seed: int = knob(0, "of problems, sampling and the toy's training", 0, most=2**32)
    dtype: str = knob("", "default: the faster one here", choices=("bfloat16", "float32"))
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    out: str = knob("", "CSV file, its figure goes beside it; default: results/probe_NAME.csv")

    def settings(self, probe: str) -> dict[str, str]:
        """What the rows of a CSV file must have in common, as text; of a folder the end of its path."""
        found = {"probe": probe} | {name: value for name, value in asdict(self).items() if name != "out"}
        texts = {k: "" if v is None else str(v).replace(f"{toy.CACHE}/", "toy/") for k, v in found.items()}
        return {k: "/".join(Path(v).parts[-2:]) if Path(v).is_absolute() else v for k, v in texts.items()}


@dataclass(frozen=True)
class ProfileKnobs(Knobs):
    problems: int = knob(250, "a random subset drawn by the seed; times samples: the rollouts", 2)
    share: float = knob(0.45, "of the reverse KL that the suggested horizon holds", 0.01, most=1)


@dataclass(frozen=True)
class PrefixKnobs(Knobs):
    prefixes: str = knob("0 0.05 0.1 0.2 0.4 0.6", "values of k: below 1 a share of T, else tokens")


@dataclass(frozen=True)
class TrainedKnobs(Knobs):
    samples: int = knob(16, "answers to each problem: a few that derail hold most of the reverse KL", 1)
    trained: str = knob("", "the student after training, RUN/student; the toy trains one if empty")
    horizon: float | None = knob(None, "N of that training, as train.py's --horizon; the toy's own: 20")
    schedule: str = knob("esr", "of the toy's training", choices=SCHEDULES)
    steps: int = knob(40, "of the toy's training", 1)

    def window(self) -> int:
        """N: training saw the positions 0 to N - 1, at its end if they grew in number."""
        steps = max(self.steps, 1)
        return make_schedule(self.schedule or "esr", self.max_new_tokens, steps, self.horizon)(steps - 1)


@dataclass(frozen=True)
class SwapKnobs(PrefixKnobs, TrainedKnobs):
    samples: int = knob(4, "answers to each problem", 1)


class Setup(NamedTuple):
    before: models.Pair
    after: models.Pair | None  # the same teacher, the student after training
    problems: list[data.Problem]
    prompts: list[list[int]]
    grader: Grader


def settle(knobs_class: type, given: dict) -> Knobs:
    """The knobs: those given over the toy's, if no model is given, over the defaults. Raises BadInput."""
    real = {"student", "teacher", "data"} & given.keys()
    if real and (len(real) < 3 or "world" in given):
        raise BadInput("--student, --teacher and --data go together: give all three, or none and --world")
    trained = issubclass(knobs_class, TrainedKnobs) and bool(real or "trained" in given)
    if trained and (not {"trained", "horizon"} <= given.keys() or {"schedule", "steps"} & given.keys()):
        what = "a student that is trained already needs --trained RUN/student and --horizon, its N"
        raise BadInput(f"{what}; --schedule and --steps are of the toy's own training: drop them")
    defaults = {"world": ""} if real else toy.preset(given.get("world", Knobs.world))
    defaults |= {"schedule": "", "steps": 0} if trained else {}
    defaults |= {"horizon": 20.0} if given.get("schedule", "esr") == "esr" else {}
    known = knobs_class.__dataclass_fields__
    knobs = knobs_class(**({name: value for name, value in defaults.items() if name in known} | given))
    dtype = models.dtype_name(knobs.dtype, models.find_device(knobs.device))
    if isinstance(knobs, TrainedKnobs):
        knobs.window()  # raises BadInput now, not after minutes of loading
    prefixes = {"prefixes": prefix_lengths(knobs)} if isinstance(knobs, PrefixKnobs) else {}
    return replace(knobs, dtype=dtype, **prefixes)


def prefix_lengths(knobs: PrefixKnobs) -> str:
    """--prefixes in tokens, in order, and N if there is one. Raises BadInput."""
    ks = {knobs.window()} if isinstance(knobs, SwapKnobs) else set()
    try:
        asked = [float(k) for k in knobs.prefixes.split()]
        ks |= {int(k) if k >= 1 else round(k * knobs.max_new_tokens) for k in asked}
    except (ValueError, OverflowError) as error:
        raise BadInput(f"--prefixes {knobs.prefixes!r} ({error}): give such as '0 0.1 100'") from error
    if not ks or not 0 <= min(ks) <= max(ks) < knobs.max_new_tokens or max(ks) == 0:
        limit = f"below --max-new-tokens {knobs.max_new_tokens}, one of them above 0"
        what = f"--prefixes {knobs.prefixes!r}{' and --horizon' * isinstance(knobs, SwapKnobs)}"
        raise BadInput(f"{what} make lengths {sorted(ks)}: give some {limit}")
    return " ".join(map(str, sorted(ks)))


def check_results(path: Path, settings: dict[str, str]) -> None:
    """Raises BadInput if `path` has results of other settings: they are not to be lost, or mixed."""
    if path.suffix != ".csv":
        raise BadInput(f"--out {path} is no .csv file: name one, its figure goes beside it")
    for row in report.read_csv(path) if path.exists() else []:
        for name, value in settings.items():
            if row.get(name) != value:
                what = f"{path} holds results of other settings ({name} {row.get(name)!r}, here {value!r})"
                raise BadInput(f"{what}: move it away, or name another --out")


def load(knobs: Knobs, grader: Grader) -> Setup:
    """Models, problems and prompts; trains the toy's student where one is needed. Raises BadInput."""
    if knobs.world:
        toy.build(knobs.world)
    split = "train" if isinstance(knobs, ProfileKnobs) else "test"
    problems = data.subset(data.read_problems(knobs.data, split), knobs.problems, knobs.seed)
    if len(problems) < 2:
        raise BadInput(f"{knobs.data} has one problem: needs two or more")
    names, device = (knobs.student, knobs.teacher), models.find_device(knobs.device)
    pair = models.load_pair(*names, knobs.dtype, device, checkpointing=False)
    prompts = data.render(pair.tokenizer, problems, knobs.instruction, knobs.system_prompt)
    models.check_context([pair.student, pair.teacher], prompts, knobs.max_new_tokens)
    memory.batch_that_fits(pair.teacher, prompts, knobs.max_new_tokens, knobs.sample_batch)
    after = None
    if isinstance(knobs, TrainedKnobs):
        name = knobs.trained or knobs.student
        models.shared_vocab(name, knobs.teacher, models.load_tokenizer(name), pair.tokenizer)
        student = models.load_model(name, torch.float32, device).requires_grad_(not knobs.trained)
        rest = pair.teacher, pair.tokenizer, pair.vocab_size, pair.ends, getattr(torch, knobs.dtype)
        after = models.make_pair(student, *rest)
        if not knobs.trained:
            train_toy(after, knobs)
    return Setup(pair, after, problems, prompts, grader)


def train_toy(pair: models.Pair, knobs: TrainedKnobs) -> None:
    """Move the pair's student as train.py does with the toy's preset, and this schedule, horizon and seed."""
    ours = {name: getattr(knobs, name) for name in ("schedule", "horizon", "steps", "seed", "max_new_tokens")}
    how = TrainKnobs(**(toy.preset(knobs.world) | ours))
    horizon = make_schedule(how.schedule, how.max_new_tokens, how.steps, how.horizon)
    prompts = data.render(pair.tokenizer, data.read_problems(knobs.data, "train"), how.instruction)
    rng = torch.Generator(pair.student.device).manual_seed(how.seed)
    optimizer = torch.optim.AdamW(pair.masters.values(), betas=(0.9, how.beta2), weight_decay=0, fused=True)
    sampler = fast.sampler("", pair.student)
    for step in tqdm(range(how.steps), "training the toy's student", leave=False):
        batch = [prompts[i] for i in data.batch(len(prompts), how.batch_size, step, how.seed)]
        ro = sampler(pair.student, batch, horizon(step), pair.ends, how.temperature, pair.vocab_size, rng)
        update(pair, optimizer, ro, how, step)
