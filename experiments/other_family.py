"""What training with a teacher of another family does to a student: answers, and text scored by the teacher.

    python train.py --student A --teacher T --data FILE --divergence sampled --schedule esr --out RUN
    python experiments/other_family.py --student A --teacher T --data FILE --trained RUN/student

Every student answers the same held-out problems at temperature 1. The rows of the CSV are its accuracy, the
fractions of its answers that are cut and that repeat themselves, the fraction of full stops that are followed
by a newline, and (log q - log p) / bytes on some answers of the untrained student, the same texts for all.
Intervals are 95 % over problems. A run that was stopped has a student as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from arms import by_place
from probe import mean_of_tokens
from root import RESULTS

import train
from eval_math import boxed, extract
from extras.other_tokenizer import prepare
from extras.profile_horizon import in_batches
from rollout import Rollout
from support import data, models, run_folder
from support.cli import BadInput, knob, parse, run_main
from support.prompts import decode_answers, render
from support.scores import is_repeating
from support.workers import Grader

BATCH = 64  # rollouts sampled together


@dataclass(frozen=True)
class Knobs:
    student: str = knob(train.Knobs.student, "hub name or folder, before training", group="models and data")
    teacher: str = knob(train.Knobs.teacher, "with another tokenizer")
    trained: tuple[str, ...] = knob((), "RUN/student of a training run; may be repeated")
    data: str = knob(train.Knobs.data, "as in train.py; its held-out problems are used")
    eval_data: str = knob("", "held-out problems, as in train.py")
    instruction: str = knob(train.Knobs.instruction, "text after each problem")
    problems: int = knob(train.Knobs.eval_limit, "held-out problems", least=2, group="measurement")
    texts: int = knob(32, "answers of the untrained student that all models score", least=2, most=BATCH)
    max_new_tokens: int = knob(256, "longest answer", least=1)
    csv: str = knob(str(RESULTS / "other_family.csv"), "the table")


def answers_of(pair: train.Pair, prompts: list[list[int]], horizon: int) -> list[Rollout]:
    """A sampled answer of the student to each prompt; every student gets the same noise."""
    return list(in_batches(pair.student, pair, prompts, horizon, 1.0, "other family", BATCH))


def rows_of_answers(
    name: str, tokenizer, parts: list[Rollout], problems: list[data.Problem]
) -> Iterator[dict]:
    """Accuracy, cut, repeating and newline of a student's answers."""
    answers = [answer for part in parts for answer in decode_answers(part, tokenizer)]
    texts = [answer["response"] for answer in answers]
    with Grader(extract, boxed) as grader:
        verdicts = grader.grade(texts, [problem.answer for problem in problems])
    every = torch.arange(len(answers))
    shares = {
        "accuracy": [verdict["correct"] for verdict in verdicts],
        "cut": [not answer["finished"] for answer in answers],
        "repeating": [is_repeating(text) for text in texts],
    }
    for readout, holds in shares.items():
        yield mean_of_tokens(name, readout, torch.tensor(holds), every, len(answers))
    stops = [(i, after[:1] == "\n") for i, text in enumerate(texts) for after in text.split(".")[1:]]
    if stops:
        answer, newline = zip(*stops)
        yield mean_of_tokens(name, "newline", torch.tensor(newline), torch.tensor(answer), len(answers))


@torch.no_grad()
def row_of_text(name: str, pair: train.Pair, scorer, part: Rollout) -> dict:
    """(log q - log p) / bytes of the fixed answers, over the tokens that the teacher scores."""
    _, tokens = scorer(pair, part)
    ratio = -by_place(part, tokens, "reverse_kl").sum(1)  # (B,) nats
    sizes = torch.tensor(
        [len(answer["response"].encode()) for answer in decode_answers(part, pair.tokenizer)]
    )
    answer = torch.arange(len(sizes)).repeat_interleave(sizes)
    return mean_of_tokens(name, "log_ratio_per_byte", (ratio / sizes)[answer], answer, len(sizes))


def measure(knobs: Knobs) -> list[dict]:
    """The rows of the student before training and of each trained one. Raises BadInput."""
    for name in (knobs.student, *knobs.trained):  # before minutes of sampling
        if not models.tokenizers_differ(name, knobs.teacher, allowed=True):
            what = f"{name} and {knobs.teacher} have the same tokenizer"
            raise BadInput(f"{what}: name a teacher of another family, or use compare.py")
    _, test = data.train_and_test(knobs.data, knobs.eval_data, knobs.problems, seed=0)
    settings = train.Knobs(
        teacher=knobs.teacher,
        instruction=knobs.instruction,
        max_new_tokens=knobs.max_new_tokens,
        checkpointing=False,
        dtype="float32",
    )
    rows = []
    fixed = None
    for name in (knobs.student, *knobs.trained):
        device = models.find_device("")
        pair = train.load_pair(replace(settings, student=name), device, two_tokenizers=True)
        prompts = render(pair.tokenizer, test, knobs.instruction)
        scorer, _ = prepare(pair, train.hidden_states, prompts, test, test, settings)
        curve = Path(name).parent.name if name in knobs.trained else "before"
        parts = answers_of(pair, prompts, knobs.max_new_tokens)
        rows += rows_of_answers(curve, pair.tokenizer, parts, test)
        if fixed is None:
            (fixed,) = answers_of(pair, prompts[: knobs.texts], knobs.max_new_tokens)
        rows.append(row_of_text(curve, pair, scorer, fixed))
    return rows


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    run_folder.prepare_file(Path(knobs.csv), "--csv")
    rows = measure(knobs)
    run_folder.write_csv(Path(knobs.csv), list(rows[0]), rows)
    for row in rows:
        print("{curve:10} {at:20} {value:8.4f} [{low:.4f} to {high:.4f}] {n:6}".format_map(row))


if __name__ == "__main__":
    run_main(main)
