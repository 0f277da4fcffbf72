"""What training with a teacher of another family does to a student: answers, and text scored by the teacher.

    python train.py --student A --teacher T --data FILE --divergence sampled --schedule esr --out RUN
    python experiments/other_family.py --student A --teacher T --data FILE --trained RUN/student

Every student answers the same held-out problems at temperature 1. The rows of the CSV are its accuracy, the
fractions of its answers that are cut and that repeat themselves, the fraction of full stops that are followed
by a newline, and (log q - log p) / bytes on some answers of the untrained student, the same texts for all.
Intervals are 95 % over problems. A run that was stopped has a student as well.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from arms import by_place
from probe import ratio
from root import RESULTS

import train
from eval_math import boxed, extract
from extras.other_tokenizer import prepare
from extras.profile_horizon import in_batches
from rollout import Rollout
from support import data, models, run_folder
from support.cli import knob, parse, run_main
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


def sums_of_answers(answers: list[dict], problems: list[data.Problem]) -> dict[str, tuple[list, list]]:
    """For each readout of a student's answers two numbers of each answer: the readout is the sums' ratio."""
    texts = [answer["response"] for answer in answers]
    with Grader(extract, boxed) as grader:
        verdicts = grader.grade(texts, [problem.answer for problem in problems])
    one = [1] * len(answers)
    return {
        "accuracy": ([verdict["correct"] for verdict in verdicts], one),
        "cut": ([not answer["finished"] for answer in answers], one),
        "repeating": ([is_repeating(text) for text in texts], one),
        "newline": ([text.count(".\n") for text in texts], [text.count(".") for text in texts]),
    }


@torch.no_grad()
def sums_of_text(pair: train.Pair, scorer, part: Rollout) -> tuple[list, list]:
    """log q - log p, over the tokens that the teacher scores, and the bytes of each of the fixed answers."""
    _, tokens = scorer(pair, part)
    log_ratios = -by_place(part, tokens, "reverse_kl").sum(1)  # (B,) nats
    answers = decode_answers(part, pair.tokenizer)
    return log_ratios.tolist(), [len(answer["response"].encode()) for answer in answers]


def measure(knobs: Knobs) -> list[dict]:
    """The rows of the student before training and of each trained one. Raises BadInput."""
    _, test = data.train_and_test(knobs.data, knobs.eval_data, knobs.problems, seed=0)
    shared = {name: getattr(knobs, name) for name in ("teacher", "instruction", "max_new_tokens")}
    shared |= {"divergence": "sampled", "checkpointing": False, "dtype": "float32"}
    rows = []
    fixed = None
    for name in (knobs.student, *knobs.trained):
        settings = train.Knobs(student=name, **shared)
        pair = train.load_pair(settings, models.find_device(""))
        prompts = render(pair.tokenizer, test, knobs.instruction)
        scorer, _ = prepare(pair, prompts, test, test, settings)
        parts = answers_of(pair, prompts, knobs.max_new_tokens)
        sums = sums_of_answers([a for part in parts for a in decode_answers(part, pair.tokenizer)], test)
        if fixed is None:
            (fixed,) = answers_of(pair, prompts[: knobs.texts], knobs.max_new_tokens)
        sums["log_ratio_per_byte"] = sums_of_text(pair, scorer, fixed)
        curve = Path(name).parent.name if name in knobs.trained else "before"
        for readout, both in sums.items():
            if any(both[1]):  # there may be no full stop
                rows.append(ratio(curve, readout, *(torch.tensor(x, dtype=torch.double) for x in both)))
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
