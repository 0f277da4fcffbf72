r"""Evaluation: full-length answers to mathematical problems, graded, with standard errors and differences.

    python eval_math.py --model PATH --benchmark gsm8k --limit 128
    python eval_math.py --model A --model B --data FILE        the paired difference of two models
    python eval_math.py --resume FOLDER                        continue a stopped evaluation
    python eval_math.py --regrade FILE.jsonl                   grade saved answers again, without a model

`extract` finds the answer of a response, and support/grading.py compares it with the gold answer;
`is_correct(response, answer)` does both. Answers, verdicts and scores go to the run folder.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

import torch
from tqdm import tqdm

from opd import token_logp
from rollout import Rollout, model_inputs, rollout, sampling_logp, sampling_noise
from support import data, models, run_folder, scores
from support.batch_size import batch_that_fits
from support.cli import BadInput, flag_of, knob, parse, run_main
from support.grading import LONGEST_ANSWER, boxes, is_blank, without_prose, without_reasoning
from support.prompts import decode_answers, render
from support.workers import Grader, one_grader

# The text after each problem.
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
INTEGER_INSTRUCTION = "\nPlease reason step by step. The answer is an integer; put it within \\boxed{}."


class Benchmark(NamedTuple):
    source: str  # a hub data set, a file or a folder
    split: str
    instruction: str


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k:main", "test", INSTRUCTION),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", INSTRUCTION),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", INTEGER_INSTRUCTION),
    "aime25": Benchmark("math-ai/aime25", "test", INTEGER_INSTRUCTION),
    "amc23": Benchmark("math-ai/amc23", "test", INTEGER_INSTRUCTION),
    "minerva": Benchmark("math-ai/minervamath", "test", INSTRUCTION),
    "olympiadbench": Benchmark("math-ai/olympiadbench", "test", INSTRUCTION),
}


def boxed(text: str) -> list[str]:
    r"""The content of each \boxed{...}, in the order in which they close, without blank and overlong ones."""
    contents = [text[start:end] for start, end in boxes(text) if end - start <= LONGEST_ANSWER]
    return [content.strip() for content in contents if not is_blank(content)]


def after_hashes(text: str) -> list[str]:
    """What follows GSM8K's "####", if its first word has a digit and it is no heading like "1. Add"."""
    heading = r"\**\d+[.)][ \t]+\**[A-Za-z]"
    found = re.findall(rf"(?<!#)####(?!#)[ \t]*(?!{heading})(\S[^\n]{{0,200}})", text)
    return [answer.strip(" *") for answer in found if re.search(r"\d", answer.split()[0])]


def after_phrase(text: str) -> list[str]:
    """The first clause with an answer after "answer is", "answer:", "answer =", or below a heading "Answer".

    Other clauses are skipped: "The answer: add 2 and 3. So the answer is 7." gives 7. Below a heading, the
    last line of the text counts, if it begins like a formula.
    """
    # Bounds such as {0,20} keep the search linear in a response that repeats itself without end.
    # `phrase` finds "**Answer**: 5", or a heading "### Answer" above a last line that is a formula.
    heading = r"^[#*]{1,9} ?(?:final )?answer[#* ]{0,9}\n(?=\s{0,9}[-$\\\d][^\n]*\s*\Z)"
    phrase = rf"(?:answer\*{{0,3}}(?: is| ?:| =)|{heading})(?:[\s:*]|(?:\$\$|\\\[)\s*\n){{0,20}}"
    # A comma ends the answer in "1 hour, or 60 minutes", but not before the last part of "1, 2, and 3".
    last_part = r"(?:and|or)\s+[-−$\\\d(][^\s%,;]*(?:[,;]|\s*$|\s+[^a-z\s])"
    end = re.compile(
        r"\.\s"  # a full stop
        r"|\.?\*{0,9}[ \t]{0,20}$|\n"  # the end of a line or of the text; stars are Markdown's bold type
        rf"|[,;]\s(?!{last_part})(?=[a-z]{{2}})"  # a comma before a word
        r"|\s\(?(?:because|since)\s",
        re.M,
    )
    for match in islice(re.finditer(phrase, text, re.I | re.M), 100):
        rest = text[match.end() : match.end() + 240]
        sentence = rest[: end.search(rest).start()].lstrip(" *`").rstrip(" *.`")
        answer = without_prose(sentence)  # 12 from "therefore 12"; None from "add 2 and 3"
        if answer and len(answer) <= 200:
            return [answer]
    return []


def last_number(text: str) -> list[str]:
    """The last number, such as -$1,042.50, .5, 5%, 1.2e5, 3/4 or \\frac{3}{4}, in a list of at most one."""
    fraction = r"\\[dt]?frac\{\d+\}\{\d+\}"
    number = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
    exponent_or_denominator = r"(?:[eE][-+]?\d+(?!\w|\.\d)|/\d+)?"
    value = rf"(?:{fraction}|\$?{number}{exponent_or_denominator})"
    return re.findall(rf"(?<![\d.])[-−]?{value}(?:\s?\\?%)?", text)[-1:]


def extract(response: str) -> str | None:
    r"""The final answer of a response, by the first rule that finds one; None if there is none.

    The rules, for what follows the last </think>: \boxed{x}, "#### x", "the answer is x", the last number.
    The first box counts, not the last: a student that has not learned to stop continues after its answer and
    repeats boxes. The score `last_box` shows what the last box would give.
    """
    response = without_reasoning(response)
    for rule in (boxed, after_hashes, after_phrase, last_number):
        if found := rule(response):
            return found[0]
    return None


def is_correct(response: str, answer: str) -> bool:
    """Whether the final answer of `response` equals that of `answer`; for use from Python.

    `answer` may be a whole solution, such as GSM8K's. Raises ValueError if it has no final answer.
    """
    gold = data.gold_answer(answer)
    # support/ imports none of the five files, so it is given the rules of this one.
    return one_grader(extract, boxed).verdict(response, gold)["correct"]


@torch.no_grad()
def check_sampling(model, rollouts: Rollout, temperature: float, top_p: float) -> None:
    """Raise BadInput unless one pass over each of the last answers gives the sampler's log-probabilities."""
    sampled = []
    scored = []
    # The longest prompts come first, so the last rows were sampled with the most padding; the pass has none.
    for row in reversed(range(len(rollouts.prompts))):
        mask = rollouts.response_mask[row]
        ids, predicts = model_inputs(rollouts, [row], rollouts.response_mask)
        logits = model(input_ids=ids, use_cache=False).logits[predicts]
        logp = sampling_logp(logits, temperature, top_p)
        sampled.append(rollouts.logp[row][mask])
        scored.append(token_logp(logp, rollouts.tokens[row][mask]))
        if sum(map(len, scored)) >= 64:  # a mean over few tokens says little about rounding
            break
    models.check_sampler(model, torch.cat(sampled), torch.cat(scored), temperature=temperature)


class HeldOut(NamedTuple):
    """Problems, with the prompts, the tokenizer and the eos ids of one model."""

    problems: list[data.Problem]
    prompts: list[list[int]]
    tokenizer: object
    eos_ids: set[int]


def evaluate(
    model,
    held_out: HeldOut,
    path: Path,
    max_new_tokens: int,
    batch_size: int | str,  # "auto": as many as fit into memory
    samples: int = 1,  # answers to each problem
    seed: int = 0,
    temperature: float = 0.0,  # 0 is greedy
    top_p: float = 1.0,
    sampler: Callable[..., Rollout] = rollout,
) -> list[dict]:
    """One record per answer, written to the JSONL file `path` batch by batch; batches found there are kept.

    A record has the `index` and the text of its `problem`, the whole `response`, the answer `extracted` from
    it, the `gold` answer, and whether it is `correct`, `correct_strict` (correct and in a box), and
    `correct_last` (if the last box counts).
    """
    problems, prompts, tokenizer, eos_ids = held_out
    # The longest prompts first, so that a batch that does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    keys = [(i, k) for i in order for k in range(samples)]  # (problem, sample) of each answer
    records = run_folder.whole_batches(path, [i for i, _ in keys])
    size = batch_that_fits(model, prompts, max_new_tokens, batch_size)
    # Another batch size rounds differently: a resumed evaluation keeps its own, or takes a smaller one.
    if records:
        size = min(size, records[0]["batch_size"])
    starts = tqdm(range(len(records), len(keys), size), desc=path.stem, unit="batch", leave=False)
    with path.open("a", buffering=1, encoding="utf-8") as file, Grader(extract, boxed) as grader:
        for start in starts:
            batch = keys[start : start + size]
            questions = [problems[i].question for i, _ in batch]
            golds = [problems[i].answer for i, _ in batch]
            began = time.perf_counter()
            # Each answer has its own noise: a resumed evaluation with the same batches has the same scores.
            noise = sampling_noise([("evaluation", seed, i, k) for i, k in batch], max_new_tokens)
            batch_prompts = [prompts[i] for i, _ in batch]
            # Without vocab_size: a model is evaluated with all its ids, as it will be used.
            rollouts = sampler(
                model, batch_prompts, max_new_tokens, eos_ids, noise, temperature=temperature, top_p=top_p
            )
            models.check_finite(model, rollouts.logp, questions)
            if not records:  # the first batch
                check_sampling(model, rollouts, temperature, top_p)
            answers = decode_answers(rollouts, tokenizer)
            seconds = (time.perf_counter() - began) / len(answers)
            verdicts = grader.grade([answer["response"] for answer in answers], golds)
            for (i, _), question, answer, verdict in zip(batch, questions, answers, verdicts):
                about = {"index": i, "problem": question, "seconds": seconds, "batch_size": size}
                records.append(about | answer | verdict)
            file.write("".join(json.dumps(record) + "\n" for record in records[start:]))
    return records


@dataclass(frozen=True)
class Knobs:
    model: tuple[str, ...] = knob((), "hub name or folder; several are compared", group="models and problems")
    benchmark: tuple[str, ...] = knob((), "may be repeated", choices=BENCHMARKS)
    data: tuple[str, ...] = knob((), "file, folder or hub data set; its test split; may be repeated")
    question_column: str = knob("", "default: by name, see support/data.py; a.b is field b of column a")
    answer_column: str = knob("", "default: found by name")
    skip_bad_rows: bool = knob(False, "leave out rows that cannot be read, instead of stopping")
    limit: int = knob(0, "number of problems, a random subset drawn by the seed; 0: all", least=0)
    instruction: str | None = knob(None, "text after each problem; default: the benchmark's own")
    system_prompt: str = knob("", "system message; the chat template's own if empty")
    thinking: bool = knob(False, "turn reasoning on, if the chat template has the switch")
    max_new_tokens: int = knob(1024, "longest answer", least=1, group="sampling")
    samples: int = knob(1, "answers to each problem: avg@K, pass@k, maj@K", least=1, most=10**4)
    temperature: float = knob(0.0, "0 is greedy", least=0)
    top_p: float = knob(1.0, "keep the most likely tokens of this probability", least=0.01, most=1)
    batch_size: int | str = knob("auto", "answers sampled together, at most 64 if auto", least=1, word="auto")
    seed: int = knob(0, "of the subset and the sampling", least=0, most=2**32)
    dtype: str = knob("", "default: the faster one here", choices=("bfloat16", "float32"), group="run")
    device: str = knob("", "cuda, cpu, ...; default: a GPU if there is one")
    out: str = knob("", "run folder; default: the first free runs/eval-N")
    resume: str = knob("", "run folder to continue; its own settings are used")
    regrade: str = knob("", "JSONL file of answers to grade again, without a model")


def read_benchmarks(knobs: Knobs) -> dict[str, tuple[str, list[data.Problem]]]:
    """Instruction and problems of each benchmark and file, by its name. Raises BadInput."""
    chosen = {name: BENCHMARKS[name] for name in knobs.benchmark}
    chosen |= {Path(name).stem: Benchmark(name, "test", INSTRUCTION) for name in knobs.data}
    given = knobs.benchmark + knobs.data
    if len(chosen) < len(given):
        raise BadInput(f"{', '.join(given)}: two have the same name; rename a file, or give each once")
    benchmarks = {}
    for title, (source, split, own_instruction) in chosen.items():
        problems = data.distinct(data.read_problems(source, split, data.layout_of(knobs)), title)
        instruction = own_instruction if knobs.instruction is None else knobs.instruction
        benchmarks[title] = instruction, data.subset(problems, knobs.limit, knobs.seed)
    return benchmarks


def evaluate_model(name: str, label: str, benchmarks: dict, knobs: Knobs, folder: Path) -> dict[str, list]:
    """The records of one model by benchmark, also written to files whose names begin with `label`."""
    tokenizer = models.load_tokenizer(name)
    model = models.load_model(name, getattr(torch, knobs.dtype), models.find_device(knobs.device))
    eos_ids = models.eos_ids(tokenizer, model)
    records = {}
    for title, (instruction, problems) in benchmarks.items():
        prompts = render(tokenizer, problems, instruction, knobs.system_prompt, knobs.thinking, few_shot=True)
        models.check_context([model.config], prompts, knobs.max_new_tokens)
        records[title] = evaluate(
            model,
            HeldOut(problems, prompts, tokenizer, eos_ids),
            folder / f"{label}-{title}.jsonl",
            knobs.max_new_tokens,
            knobs.batch_size,
            samples=knobs.samples,
            seed=knobs.seed,
            temperature=knobs.temperature,
            top_p=knobs.top_p,
        )
    return records


def main() -> int | None:
    given = parse(Knobs, __doc__)
    if "regrade" in given:
        if others := ", ".join(flag_of(name) for name in given if name != "regrade"):
            raise BadInput(f"--regrade grades one file and takes no other flag: drop {others}")
        print(scores.regrade(given["regrade"], extract, boxed))
        return None
    knobs, folder = run_folder.evaluation_settings(Knobs, given)
    benchmarks = read_benchmarks(knobs)
    with run_folder.exclusive(folder, fresh=not knobs.resume):
        contents = {f"problems of {title}": problems for title, (_, problems) in benchmarks.items()}
        inputs = run_folder.input_hashes(contents, knobs.model)
        run_folder.write_config(folder, asdict(knobs), models.find_device(knobs.device), inputs)
        records = {}
        for letter, name in zip(ascii_uppercase, knobs.model):
            label = f"{letter}-{Path(name).name}"  # two models may have the same name
            records[label] = evaluate_model(name, label, benchmarks, knobs, folder)
        summary = scores.summarize(records) | {"knobs": asdict(knobs)}
        run_folder.write_json(folder / "scores.json", summary)
        print(scores.format_scores(summary))
    return 0


if __name__ == "__main__":
    run_main(main)
