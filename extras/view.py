"""A page that shows a run token by token: one HTML file that needs neither a server nor the network.

    python -m extras.view RUN            writes RUN/view.html; RUN is a finished run

For a few held-out problems it shows the answers of the student before and after training, and with --teacher
the teacher's own. All answers to a problem are sampled with the same noise, at the temperature of training
and at full length, and every token is scored by all three models.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train
from eval_math import boxed, extract
from opd import reverse_kl
from rollout import Rollout, rollout, sampling_noise
from support import data, models, run_folder
from support.cli import BadInput, knob, parse, run_main
from support.prompts import decode_answers
from support.report import token_texts
from support.workers import one_grader

TEMPLATE = Path(__file__).with_suffix(".html")
TOP = 5  # tokens of each distribution that are shown
UNITS = {"kl": 1e4, "logp": 1e3, "entropy": 1e3, "p": 1e3}  # the page holds whole numbers of 1 / UNITS
SIGNS = {"\n": "\u21b5\n", "\t": "\u21e5"}


@dataclass(frozen=True)
class Knobs:
    answers: int = knob(8, "held-out problems", least=1, most=100, group="the page")
    data: str = knob("", "file, folder or hub data set instead of the run's held-out problems")
    teacher: bool = knob(False, "also show the teacher's own answers")
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")


def visible(text: str) -> str:
    """`text` with each character that is invisible, or acts on others, replaced by visible ones."""
    return "".join(SIGNS.get(c) or (c if c.isprintable() else f"\u27e8U+{ord(c):04X}\u27e9") for c in text)


class Texts:
    """The table of all texts of a page, each stored once."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.index: dict[str, int] = {}

    def add(self, text: str) -> int:
        return self.index.setdefault(visible(text), len(self.index))

    def add_token(self, token: int) -> int:
        """Add the text of a token on its own; one that is not a whole character is shown with its id."""
        text = self.tokenizer.decode([token])
        return self.add(f"{text} id {token}" if "\ufffd" in text else text)


@torch.no_grad()
def score(pair: train.Pair, rollouts: Rollout, temperature: float = 1.0) -> dict[str, Tensor]:
    """What `train.score` returns of each token, (N,) each, and the most likely tokens of both models.

    `student_ids`, `student_p`, `teacher_ids` and `teacher_p` are (N, TOP), the most likely first.
    """
    parts = defaultdict(list)

    def recorded(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
        for name, logp in (("student", student_logp), ("teacher", teacher_logp)):
            values, ids = logp.topk(min(TOP, logp.shape[-1]))
            parts[f"{name}_ids"].append(ids)
            parts[f"{name}_p"].append(values.exp())
        return reverse_kl(student_logp, teacher_logp, tokens)

    _, statistics = train.score(pair, rollouts, divergence=recorded, temperature=temperature)
    return statistics | {name: torch.cat(part) for name, part in parts.items()}


def whole(values: Tensor, unit: float) -> list[int]:
    return (values.double() * unit).round().long().flatten().tolist()


def answer(texts: Texts, writer: str, rollouts: Rollout, row: int, scores: dict[str, dict]) -> dict[str, Any]:
    """One answer as the page reads it; `scores` holds what `score` returns with each of the two students."""
    tokens = rollouts.tokens[row][rollouts.response_mask[row]]
    found: dict[str, Any] = {"writer": writer, "finished": bool(rollouts.finished[row])}
    found["tokens"] = [texts.add(text) for text in token_texts(texts.tokenizer, tokens)]
    found |= {name: {} for name in (*UNITS, "ids")}
    for model, name, role in (
        ("before", "before", "student"),
        ("after", "after", "student"),
        ("teacher", "after", "teacher"),
    ):
        of_row = scores[name]["row"] == row
        values = {key: value[of_row] for key, value in scores[name].items()}
        if role == "student":
            found["kl"][model] = whole(values["reverse_kl"], UNITS["kl"])
        for key in ("logp", "entropy", "p"):
            found[key][model] = whole(values[f"{role}_{key}"], UNITS[key])
        found["ids"][model] = [texts.add_token(token) for token in values[f"{role}_ids"].flatten().tolist()]
    return found


def problems_with_answers(
    pairs: dict[str, train.Pair], problems: list[data.Problem], run: train.Knobs, with_teacher: bool
) -> dict[str, Any]:
    """All problems with their answers, and the table of texts that they refer to."""
    before = pairs["before"]
    configs = [before.student.config, before.teacher.config]
    prompts = models.render_prompts(before.tokenizer, problems, run, configs)
    noise = sampling_noise([(run.seed, "view", i) for i in range(len(problems))], run.max_new_tokens)
    writers = {name: pair.student for name, pair in pairs.items()}
    writers |= {"teacher": before.teacher} if with_teacher else {}
    texts = Texts(before.tokenizer)
    grader = one_grader(extract, boxed)
    shown: list[dict[str, Any]] = [
        {"question": visible(p.question), "gold": visible(p.answer or ""), "answers": []} for p in problems
    ]
    for writer, model in writers.items():
        rollouts = rollout(
            model, prompts, run.max_new_tokens, before.eos_ids, noise, run.temperature, before.vocab_size
        )
        scores = {name: score(pair, rollouts, run.temperature) for name, pair in pairs.items()}
        responses = [decoded["response"] for decoded in decode_answers(rollouts, before.tokenizer)]
        for row, (problem, response) in enumerate(zip(problems, responses)):
            found = answer(texts, writer, rollouts, row, scores)
            if problem.answer is not None:
                found["verdict"] = grader.verdict(response, problem.answer)["verdict"]
            shown[row]["answers"].append(found)
    return {"texts": list(texts.index), "problems": shown}


def page(content: dict[str, Any]) -> str:
    """The template with `content` in it as JSON, in which no "<" can end the script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    return before + text + after


def write(text: str, out: Path) -> None:
    """Write a file that replaces an older one only when it is complete. Raises BadInput."""
    try:
        run_folder.replace_text(out, text)
    except OSError as error:
        raise BadInput(f"cannot write {out} ({error}): make room, or copy the run elsewhere") from error


def settings(argv: list[str]) -> tuple[Knobs, train.Knobs, Path]:
    """The flags, the run's settings, and its folder. Raises BadInput."""
    named = bool(argv) and not argv[0].startswith("-")
    knobs = Knobs(**parse(Knobs, __doc__, argv[named:]))
    if not named:
        raise BadInput("no run is named: python -m extras.view RUN, with flags after it")
    folder = Path(argv[0])
    run = run_folder.resumed(train.Knobs, {"resume": str(folder)})
    if not (folder / "student").is_dir():
        what = f"{folder} has no student, because the run has not finished"
        raise BadInput(f"{what}: continue it with --resume {folder}")
    _, teacher_tokenizer = models.load_tokenizers(run.student, run.teacher, run.divergence)
    if teacher_tokenizer:
        what = f"the models of {folder} have different tokenizers, and the page needs one vocabulary for both"
        raise BadInput(f"{what}: name a run with one tokenizer")
    if not (knobs.data or run.eval_limit):
        raise BadInput(f"{folder} held out no problems (--eval-limit 0): name some with --data")
    return knobs, run, folder


def load_pairs(run: train.Knobs, folder: Path, device: torch.device) -> dict[str, train.Pair]:
    """The student before and after the run, both with the same teacher."""
    names = {"student": run.student, "teacher": run.teacher}
    knobs = train.Knobs(**names, checkpointing=False, dtype=run.dtype)
    before = train.load_pair(knobs, device)
    after = train.load_pair(dataclasses.replace(knobs, student=str(folder / "student")), device)
    after = dataclasses.replace(after, teacher=before.teacher, teacher_head=before.teacher_head)
    return {"before": before, "after": after}


def main() -> None:
    knobs, run, folder = settings(sys.argv[1:])
    device = models.find_device(knobs.device)
    if knobs.data:
        problems = data.read_problems(knobs.data, "test", data.layout_of(run), answers="optional")
        inputs = run_folder.input_hashes({}, (run.student, run.teacher))
    else:
        trained_on, problems = data.problems_of(run)
        inputs = run_folder.training_inputs(run, trained_on, problems)
    run_folder.check_inputs(folder, inputs)
    shown = ("student", "teacher", "schedule", "max_new_tokens", "temperature")
    facts = {name: getattr(run, name) for name in shown}
    facts["steps"] = len(run_folder.read_csv(folder / "metrics.csv"))  # a stopped run has fewer
    facts |= {"run": folder.resolve().name, "horizon": train.schedule_of(run)(0), "top": TOP, "units": UNITS}
    pairs = load_pairs(run, folder, device)
    content = problems_with_answers(pairs, problems[: knobs.answers], run, knobs.teacher)
    out = folder / "view.html"
    write(page({"facts": facts} | content), out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
