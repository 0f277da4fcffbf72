"""A pair of real weights with a large gap: a small instruction-tuned model, and itself after fine-tuning.

    user       Sam has 8 books. On Monday, Sam buys 5 books. On Tuesday, Sam loses 3 books. How many ...
    assistant  Let us count day by day. Sam starts with 8 books. On Monday, Sam buys 5 books, so 8 ...

The teacher learns worked answers by train.py's own loop, with `nll` as the loss and the worked answers in
place of rollouts. Student and teacher differ both in the form of an answer and in its arithmetic.

    python experiments/english.py                        makes the teacher; prints the FOLDER of the next line
    python experiments/compare.py --student FOLDER/student --teacher FOLDER/teacher --data FOLDER \\
        --arms full --arms popd --arms topd-0.1 --arms esr --arms seqkd --steps 40 --batch-size 8 --lr 1e-4 \\
        --max-new-tokens 160 --eval-limit 200 --seeds 3 --curve-points 1 --dtype float32 --keep kept
    python experiments/english.py --score kept/full-0 --score kept/topd-0.1-0 --score kept/esr-0

The last command writes the exact reverse KL to the teacher, on the same rollouts for every student, in the
format of probe.py: `at` is the tenth of the budget, or `all`.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from figures import STYLES, plt, save
from probe import ratio, sums_by_problem
from root import RESULTS, ROOT

import train
from eval_math import INSTRUCTION
from extras.profile_horizon import in_batches, scored
from rollout import Rollout
from support import data, run_folder
from support.cli import knob, parse, run_main
from support.prompts import render
from support.run import Run

CACHE = ROOT / ".cache" / "english"
MAX_NEW_TOKENS = 160
BATCH = 64  # rollouts sampled together
NAMES = ("Sam", "Ann", "Tom", "Eve", "Ben", "Mia")
THINGS = ("books", "coins", "apples", "cards", "stones", "shells")
GAINS = ("buys", "finds", "gets")
LOSSES = ("sells", "loses", "gives away")
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines problems and teacher; the cache is keyed by it."""

    student: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    seed: int = 0
    days: tuple[int, int] = (2, 4)
    largest: int = 20  # total
    problems: int = 2000  # in train.jsonl
    held_out: int = 400
    steps: int = 60  # of fine-tuning
    batch: int = 8
    lr: float = 1e-4


def draw_problem(recipe: Recipe, rng: random.Random) -> tuple[str, str, int]:
    """A question, a worked answer, and the result; the running total stays between 1 and `largest`."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(1, recipe.largest)
    first_day = rng.randrange(7)
    question = [f"{name} has {total} {thing}."]
    worked = [f"Let us count day by day. {name} starts with {total} {thing}."]
    for day in range(rng.randint(*recipe.days)):
        change = rng.choice([c for c in range(-9, 10) if c and 1 <= total + c <= recipe.largest])
        verb = rng.choice(GAINS if change > 0 else LOSSES)
        event = f"On {WEEK[(first_day + day) % 7]}, {name} {verb} {abs(change)} {thing}"
        question.append(f"{event}.")
        worked.append(f"{event}, so {total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}.")
        total += change
    question.append(f"How many {thing} does {name} have now?")
    worked.append(f"The answer is \\boxed{{{total}}}.")
    return " ".join(question), " ".join(worked), total


def write_problems(folder: Path, recipe: Recipe) -> dict[str, str]:
    """Write train.jsonl and test.jsonl; return worked answers to other questions, by question."""
    rng = random.Random(f"english {recipe.seed}")
    taught = recipe.steps * recipe.batch
    drawn = {}
    while len(drawn) < taught + recipe.held_out + recipe.problems:
        question, worked, result = draw_problem(recipe, rng)
        drawn[question] = (worked, result)
    rows = [{"question": question, "answer": str(result)} for question, (_, result) in drawn.items()]
    held_out = rows[taught : taught + recipe.held_out]
    for name, part in (("test", held_out), ("train", rows[taught + recipe.held_out :])):
        run_folder.write_jsonl(folder / f"{name}.jsonl", part)
    return {row["question"]: drawn[row["question"]][0] for row in rows[:taught]}


def load_pair(student: str, teacher: str) -> train.Pair:
    knobs = train.Knobs(student=student, teacher=teacher, checkpointing=False, dtype="float32")
    return train.load_pair(knobs, torch.device("cpu"))


def teach(pair: train.Pair, worked: dict[str, str], recipe: Recipe) -> None:
    """Fine-tune the student on the worked answers: one pass, a step per batch."""
    problems = [data.Problem(question, None) for question in worked]
    prompts = render(pair.tokenizer, problems, INSTRUCTION)
    ids_of = {}
    for prompt, text in zip(prompts, worked.values()):
        ids_of[tuple(prompt)] = pair.tokenizer.encode(text) + [pair.tokenizer.eos_token_id]

    def sampler(student, questions: list[list[int]], *settings, **more) -> Rollout:
        answers = [torch.tensor(ids_of[tuple(question)]) for question in questions]
        tokens = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
        lengths = torch.tensor([len(ids) for ids in answers])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        finished = torch.ones(len(answers), dtype=torch.bool)
        return Rollout(questions, tokens, mask, logp=None, finished=finished)

    knobs = train.Knobs(steps=recipe.steps, batch_size=recipe.batch, lr=recipe.lr, divergence="nll")
    longest = max(map(len, ids_of.values()))
    run = Run(pair.student.device)
    optimizer = train.adamw(pair, knobs)
    train.train(pair, optimizer, prompts, lambda step: longest, knobs, run, sampler=sampler)


def build(recipe: Recipe = Recipe()) -> Path:
    """The folder with student/, teacher/, train.jsonl and test.jsonl, made if it does not exist."""
    key = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:8]
    folder = CACHE / f"{recipe.seed}-{key}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    worked = write_problems(part, recipe)
    pair = load_pair(recipe.student, recipe.student)
    pair.save_student(part / "student")
    teach(pair, worked, recipe)
    pair.save_student(part / "teacher")
    part.rename(folder)
    return folder


# The reverse KL on fixed rollouts.


def kl_rows(curve: str, pair: train.Pair, parts: list[Rollout]) -> Iterator[dict]:
    """The mean reverse KL of all tokens and of each tenth of the budget; intervals over rollouts."""
    tokens = scored(train.score, pair, parts)
    row, kl = tokens["row"], tokens["reverse_kl"]
    rows = int(row.max()) + 1
    yield ratio(curve, "all", *sums_by_problem(kl, row, rows))
    tenth = tokens["position"] * 10 // MAX_NEW_TOKENS
    for i in tenth.unique().tolist():
        yield ratio(curve, str(i), *sums_by_problem(kl[tenth == i], row[tenth == i], rows))


def score_students(folder: Path, names: tuple[str, ...], rollouts: int) -> list[dict]:
    """The rows of the student before training and of each trained one, on the same rollouts."""
    problems = data.read_problems(str(folder), "test")[-rollouts:]
    fixed: dict[str, list[Rollout]] = {}  # by writer: the student before training, and the teacher
    rows = []
    for name in (str(folder / "student"), *names):
        pair = load_pair(name, str(folder / "teacher"))
        if not fixed:
            prompts = render(pair.tokenizer, problems, INSTRUCTION)
            for writer, model in (("student", pair.student), ("teacher", pair.teacher)):
                parts = in_batches(model, pair, prompts, MAX_NEW_TOKENS, 1.0, writer, BATCH)
                fixed[writer] = list(parts)
        for writer, parts in fixed.items():
            rows += kl_rows(f"{Path(name).name} on the {writer}'s", pair, parts)
    return rows


def draw(rows: list[dict], path: Path) -> Path:
    """The reverse KL by position, on the student's and on the teacher's rollouts, with 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for axis, writer in zip(axes, ("student", "teacher")):
        curves = [c for c in dict.fromkeys(row["curve"] for row in rows) if c.endswith(f"{writer}'s")]
        for curve, look in zip(curves, STYLES):
            points = [row for row in rows if row["curve"] == curve and row["at"] != "all"]
            middles = [(int(row["at"]) + 0.5) * MAX_NEW_TOKENS / 10 for row in points]
            value, low, high = ([row[name] for row in points] for name in ("value", "low", "high"))
            axis.plot(middles, value, **look, markersize=4, label=curve.split()[0])
            axis.fill_between(middles, low, high, color=look["color"], alpha=0.2, linewidth=0)
        axis.set(title=f"on the {writer}'s rollouts", xlabel="position in the answer", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reverse KL to the teacher, nats per token")
    axes[0].legend(frameon=False)
    return save(figure, path.with_suffix(".png"))


@dataclass(frozen=True)
class Knobs:
    student: str = knob(Recipe.student, "hub name or folder; the teacher is trained from it, too")
    score: tuple[str, ...] = knob((), "a trained student, as compare.py --keep writes it; may be repeated")
    rollouts: int = knob(128, "of each writer, for the reverse KL", least=2)
    csv: str = knob(str(RESULTS / "english_kl.csv"), "the reverse KL")


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    run_folder.prepare_file(Path(knobs.csv), "--csv")
    folder = build(Recipe(knobs.student))
    print(f"student, teacher and problems: {folder}")
    if knobs.score:
        rows = score_students(folder, knobs.score, knobs.rollouts)
        run_folder.write_csv(Path(knobs.csv), list(rows[0]), rows)
        for row in rows:
            print("{curve:28} {at:4} {value:7.3f} [{low:.3f} to {high:.3f}] {n:6} tokens".format_map(row))
        print(f"figure: {draw(rows, Path(knobs.csv))}")


if __name__ == "__main__":
    run_main(main)
