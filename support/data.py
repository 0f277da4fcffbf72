"""Data: problems, the prompts that are rendered from them, and the order in which steps use them."""

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from support.cli import BadInput

QUESTION_COLUMNS, ANSWER_COLUMNS = ("question", "problem"), ("answer", "final_answer")
LONGEST = 200_000  # characters of a question: longer than any context, and enough to stall a tokenizer
MARK = "\ue000"  # stands for the user's text in a template; a private-use character that no text contains
SUFFIXES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Problem(NamedTuple):
    question: str
    answer: str  # the final answer alone


def read_problems(source: str, split: str) -> list[Problem]:
    """Problems of a file (JSONL, JSON, CSV, parquet), a folder holding `split`.*, or a hub data set.

    A hub data set may name its configuration: `openai/gsm8k:main`. Raises BadInput.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.stem == split and p.suffix in SUFFIXES)
        if not found:
            raise BadInput(f"folder {source} has no {split}.jsonl, .json, .csv or .parquet: name a file")
        path = found[0]
    if path.is_file():
        rows = read_jsonl(path) if path.suffix == ".jsonl" else read_with_datasets(source, path, split)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise BadInput(f"data {source} does not exist: give a file, a folder, or the name of a hub data set")
    else:
        rows = read_with_datasets(source, None, split)
    if not rows:
        raise BadInput(f"data {path if path.exists() else source} is empty: it needs one problem per row")
    return [to_problem(row, f"{path.name} row {i}") for i, row in enumerate(rows, 1)]


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file. Raises BadInput with the number and the text of the line that is wrong."""
    rows = []
    with path.open("rb") as file:  # not str.splitlines: it also breaks lines at U+2028
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else None
            except ValueError as error:  # no UTF-8, or no JSON
                what = f"{path} line {number} cannot be read ({error})"
                raise BadInput(f"{what}: {line[:40]!r}; fix or remove it") from error
            if not isinstance(row, (dict, type(None))):
                raise BadInput(f"{path} line {number} is not a JSON object: {line[:40]!r}; fix or remove it")
            rows += [row] if row else []
    return rows


def read_with_datasets(source: str, path: Path | None, split: str) -> list[dict]:
    import datasets  # slow to import, and a JSONL file does not need it

    try:
        if path is not None:
            if path.suffix not in SUFFIXES:
                raise BadInput(
                    f"data {source} is not a {', '.join(SUFFIXES)} file: convert it to one of them"
                )
            files = {"data_files": str(path)}
            return datasets.load_dataset(SUFFIXES[path.suffix], split="train", **files).to_list()
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split).to_list()
    except BadInput:
        raise
    except Exception as error:  # pyarrow, pandas and the hub client each raise classes of their own
        what = f"cannot read data {source} ({type(error).__name__}: {str(error)[:120]})"
        raise BadInput(f"{what}: give a local file, or check the name and the network") from error


def to_problem(row: dict, where: str) -> Problem:
    question = next((row[c] for c in QUESTION_COLUMNS if row.get(c) is not None), None)
    answer = next((row[c] for c in ANSWER_COLUMNS if row.get(c) is not None), None)
    if question is None or answer is None:
        missing = "question (or problem)" if question is None else "answer"
        raise BadInput(f"{where} has no column {missing}, only {', '.join(map(str, row))}: rename the column")
    if isinstance(answer, list):  # OlympiadBench: an answer may have parts
        answer = ", ".join(map(str, answer))
    if not str(question).strip() or not str(answer).strip():
        raise BadInput(f"{where} has an empty question or answer: fix or remove it")
    if len(str(question)) > LONGEST:
        raise BadInput(f"{where} has a question of {len(question):,} characters: remove it")
    # GSM8K's answer is a rationale, then #### and the number
    return Problem(str(question), str(answer).rpartition("####")[2].strip())


def subset(problems: list[Problem], limit: int, seed: int) -> list[Problem]:
    """`limit` problems, all if 0, chosen at random by `seed`: a file may start with its easy part."""
    if not limit or limit >= len(problems):
        return problems
    return random.Random(seed).sample(problems, limit)


def render(
    tokenizer,
    problems: list[Problem],
    instruction: str,
    system_prompt: str = "",
    thinking: bool = False,
    few_shot: str = "",
) -> list[list[int]]:
    """The prompt of each problem, as the ids that both student and teacher get.

    Without a chat template the prompt is plain text after the examples of `few_shot`. Raises BadInput if
    there are none.
    """
    if tokenizer.chat_template is None:
        if not few_shot:
            name = tokenizer.name_or_path
            raise BadInput(f"the tokenizer of {name} has no chat template: give an instruction-tuned model")
        return [tokenizer(f"{few_shot}Question: {p.question}\nAnswer:")["input_ids"] for p in problems]
    return [chat_ids(tokenizer, p.question + instruction, system_prompt, thinking) for p in problems]


def chat_ids(tokenizer, text: str, system_prompt: str, thinking: bool) -> list[int]:
    """The chat template around a user's text, in which control tokens such as <|im_end|> are plain text."""

    def rendered(content: str) -> str:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        chat = [*system, {"role": "user", "content": content}]
        # enable_thinking is a switch of Qwen3's template; other templates ignore it
        how = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": thinking}
        return tokenizer.apply_chat_template(chat, **how)

    plain = {"add_special_tokens": False}  # the template adds its own
    controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in text for token in controls):
        return tokenizer(rendered(text), **plain)["input_ids"]
    before, after = rendered(MARK).split(MARK)
    middle = tokenizer(text, split_special_tokens=True, **plain)["input_ids"]
    return tokenizer(before, **plain)["input_ids"] + middle + tokenizer(after, **plain)["input_ids"]


def batch(n: int, size: int, step: int, seed: int) -> list[int]:
    """The prompts of a step, as indices below n, in a new random order every epoch; a step may span two."""
    places = range(step * size, (step + 1) * size)
    return [order(n, place // n, seed)[place % n] for place in places]


@lru_cache(maxsize=2)
def order(n: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def train_and_test(source: str, held_out: str, limit: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and at most `limit` others to evaluate on. Raises BadInput.

    The others come from `held_out`, else from the test split of `source`, else from the file itself.
    """
    problems = read_problems(source, "train")
    if limit == 0:
        return problems, []
    if held_out or not Path(source).is_file():
        return problems, subset(read_problems(held_out or source, "test"), limit, seed)
    if len(problems) <= limit:
        raise BadInput(
            f"{source} has {len(problems)} problems, none left after {limit} held out: lower --eval-limit"
        )
    test = [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), limit))]
    held_out_questions = {p.question for p in test}  # by text: a file may contain a problem twice
    rest = [p for p in problems if p.question not in held_out_questions]
    if not rest:
        raise BadInput(f"{source} repeats the held-out problems, none is left to train on: give --eval-data")
    return rest, test
