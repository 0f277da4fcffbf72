"""What goes in: problems, and the prompts that they become."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cli import BadInput

QUESTION_COLUMNS, ANSWER_COLUMNS = ("question", "problem"), ("answer", "final_answer")
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
        raise BadInput(f"data {path if path.exists() else source} is empty: it needs a problem a row")
    return [to_problem(row, f"{path.name} row {i}") for i, row in enumerate(rows, 1)]


def read_jsonl(path: Path) -> list[dict]:
    """By hand for the line number: a library's error names neither line nor text."""
    rows = []
    with path.open(encoding="utf-8-sig") as file:  # not str.splitlines: it also breaks lines at U+2028
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(
                    f"{path} line {number} is not JSON ({error.msg}): {line[:40]!r}; mend or drop it"
                )
            if not isinstance(row, dict):
                raise BadInput(f"{path} line {number} is not a JSON object: {line[:40]!r}; mend or drop it")
            rows.append(row)
    return rows


def whole_batches(path: Path, total: int) -> list[dict]:
    """What a stopped evaluation left of `total` answers: records of the batches that it finished.

    A line that was cut, and the batch that it belongs to, leave the file: that batch is sampled again.
    """
    content = path.read_bytes() if path.exists() else b""
    if b"\n" not in content:
        return []
    whole = path.with_suffix(".part")
    whole.write_bytes(content[: content.rindex(b"\n") + 1])
    records = read_jsonl(whole)
    size = records[0]["batch_size"]
    if len(records) < total:
        records = records[: len(records) // size * size]
    whole.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    whole.replace(path)
    return records


def read_with_datasets(source: str, path: Path | None, split: str) -> list[dict]:
    import datasets  # here and not above: a JSONL file needs no such library

    try:
        if path is not None:
            if path.suffix not in SUFFIXES:
                raise BadInput(f"data {source} is no {', '.join(SUFFIXES)} file: convert it to one of them")
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
    # GSM8K keeps its rationale in the answer, and the number itself after ####
    return Problem(str(question), str(answer).rpartition("####")[2].strip())


def subset(problems: list[Problem], limit: int, seed: int) -> list[Problem]:
    """`limit` problems chosen at random by `seed`, all if 0: the head of a file may be its easy part."""
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
    """The one prompt of each problem, as the ids that student and teacher both see.

    Without a chat template it is plain text after the examples of `few_shot`. Raises BadInput if it has none.
    """
    if tokenizer.chat_template is None:
        if not few_shot:
            name = tokenizer.name_or_path
            raise BadInput(f"the tokenizer of {name} has no chat template: give an instruction-tuned model")
        return [tokenizer(f"{few_shot}Question: {p.question}\nAnswer:")["input_ids"] for p in problems]
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    # enable_thinking is a switch of Qwen3's template; other templates do not read it
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "enable_thinking": thinking}
    users = [{"role": "user", "content": problem.question + instruction} for problem in problems]
    return [list(tokenizer.apply_chat_template([*system, user], **how)) for user in users]


def batches(prompts: list[list[int]], size: int, seed: int) -> Iterator[list[list[int]]]:
    """Prompts in a new random order every epoch, for ever; a batch may span two epochs."""
    order: list[int] = []
    for epoch in itertools.count():
        order += random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts))
        while len(order) >= size:
            yield [prompts[i] for i in order[:size]]
            order = order[size:]


def train_and_test(source: str, held_out: str, limit: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and at most `limit` others to evaluate on. Raises BadInput.

    The others come from `held_out`, else from the test split of `source`; a single file gives up some of
    its own.
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
    test = set(random.Random(seed).sample(range(len(problems)), limit))
    return [p for i, p in enumerate(problems) if i not in test], [problems[i] for i in sorted(test)]
