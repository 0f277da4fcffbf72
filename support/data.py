r"""Data: problems from files and hub data sets, and the order in which steps use them.

These columns are found by name. A row is refused if none of them has a value, or if two question columns have
different values. `--question-column` and `--answer-column` name others; `a.b` is field b of column a.

| data set | question | answer: the first column with a value |
|---|---|---|
| GSM8K | question | answer, after #### |
| MATH, MATH-500, NuminaMath, OpenR1-Math, Big-Math | problem | answer, else solution: its last \boxed{} |
| DeepMath, OlympiadBench | question | final_answer; a list is joined by ", " |
| DAPO and others for verl | prompt, one user turn of a chat | reward_model.ground_truth |
| MetaMathQA | query | response, after "The answer is:" |
| prompts without answers | any of the above | none: enough to train on, not to be evaluated on |

Only text and numbers are read; 5.0 is read as 5. Null, NaN, an empty list and blank text count as missing.
A CSV file has no types: its cells are text, and only an empty one is missing, not "None" or "nan".
"""

import csv
import json
import math
import random
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from support.cli import BadInput
from support.grading import boxes, without_reasoning

QUESTION_COLUMNS = ("question", "problem", "query", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model.ground_truth", "solution")
LONGEST = 200_000  # characters of a question: longer than any context, and enough to stall a tokenizer

LOST_BACKSLASH = re.compile(  # "\frac" in JSON is a form feed and "rac"
    r"\x0c(?:rac[{\d\\]|orall\b)|\x08(?:oxed|inom|eta|egin|ar|oldsymbol)"
    r"|\t(?:ext|frac)\{|\t(?:imes|heta|au|riangle|op|o)\b|\right[)\]}.|\\]"
    r"|\r(?:ho|ightarrow|angle|ceil|floor|brace)\b|\n(?:abla|eq|leq|geq|mid|otin|ot)\b"
)


class BadRow(ValueError):
    """A row cannot be used. The message continues "line 3" or "row 3"."""


Row = dict | BadRow


class Problem(NamedTuple):
    question: str
    answer: str | None  # the final answer alone; None if it is not used, or cannot be read and is optional
    fault: str = ""  # why there is no answer


class Layout(NamedTuple):
    """The columns of questions and answers, found by name if empty, and whether bad rows are skipped."""

    question_column: str = ""
    answer_column: str = ""
    skip_bad_rows: bool = False


BY_NAME = Layout()


def read_problems(
    source: str, split: str, layout: Layout = BY_NAME, answers: str = "needed"
) -> list[Problem]:
    """Problems of a file (JSONL, JSON, CSV, parquet), a folder holding `split`.*, or a hub data set.

    A hub data set may name its configuration: `openai/gsm8k:main`. Answers are "needed", "optional" (None if
    they cannot be read) or "unused" (None). If the layout says so, rows that cannot be read are skipped, and
    the first three are printed. Raises BadInput.
    """
    name, rows = read_rows(source, split)
    problems, bad = [], []
    for place, row in rows:
        try:
            problems.append(to_problem(row, place, layout, answers))
        except BadRow as error:
            bad.append(f"{place} {error}")
    if not rows:
        raise BadInput(f"data {name} is empty: it needs one problem per row")
    what = f"{len(bad)} of {len(rows)} rows of {name} cannot be used"
    if bad and not (layout.skip_bad_rows and problems):
        remedy = "; fix or remove them, or add --skip-bad-rows" if problems else ""
        raise BadInput(f"{what}: {bad[0]}{remedy}")
    if bad:
        print(f"{what} and are skipped: {'; '.join(bad[:3])}{'; ...' if len(bad) > 3 else ''}", flush=True)
    return problems


def read_rows(source: str, split: str) -> tuple[str, list[tuple[str, Row]]]:
    """The name of what is read, and its rows with their places. Raises BadInput."""
    path = Path(source)
    try:
        path = file_of(path, split) if path.is_dir() else path
        if path.is_file():
            if path.suffix not in READERS:
                what = f"data {source} is not a {', '.join(READERS)} file"
                raise BadInput(f"{what}: convert it to one of them")
            return str(path), list(READERS[path.suffix](path))
    except BadInput:
        raise
    except (OSError, ValueError, NotImplementedError, RecursionError, csv.Error) as error:
        what = f"cannot read data {path} ({type(error).__name__}: {str(error)[:120]})"
        raise BadInput(f"{what}: give a readable file, text in UTF-8") from error
    if path.suffix in READERS or source.startswith((".", "/", "~")):
        raise BadInput(f"data {source} does not exist: give a file, a folder, or the name of a hub data set")
    return source, list(hub_rows(source, split))


def file_of(folder: Path, split: str) -> Path:
    """The file of a folder that holds `split`. Raises BadInput."""
    found = sorted(p for p in folder.iterdir() if p.stem == split and p.suffix in READERS and p.is_file())
    if not found:
        raise BadInput(f"folder {folder} has no {split}.jsonl, .json, .csv or .parquet: name a file")
    if len(found) > 1:
        raise BadInput(f"folder {folder} has {' and '.join(p.name for p in found)}: name one of them")
    return found[0]


def jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:  # not str.splitlines: it also breaks lines at U+2028
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text, object_pairs_hook=each_once) if text else {}
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
                text, row = "bad", BadRow(f"cannot be read ({error}): {line[:40]!r}")
            if text:
                yield f"line {number}", row


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file. Raises BadInput with the number and the text of the line that is wrong."""
    rows = []
    for place, row in jsonl_rows(path):
        if isinstance(row, BadRow):
            raise BadInput(f"{path} {place} {row}; fix or remove it")
        rows.append(row)
    return rows


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON array, or of JSON lines, which some libraries write under this name."""
    content = path.read_text(encoding="utf-8-sig")
    if not content.lstrip().startswith("["):
        yield from jsonl_rows(path)
        return
    for number, row in enumerate(json.loads(content, object_pairs_hook=each_once), 1):
        is_object = isinstance(row, dict)
        yield f"row {number}", row if is_object else BadRow(f"is not a JSON object: {str(row)[:40]}")


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it names a field twice, of which Python would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {next(name for name in row if names.count(name) > 1)!r} twice")
    return row


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a CSV file with a header. All cells are text; 5.0 becomes 5."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise BadInput(f"data {path} names a column twice: rename one of {', '.join(header)}")
        for number, cells in enumerate(filter(None, reader), 1):
            cells = [cell[:-2] if re.fullmatch(r"-?\d+\.0", cell) else cell for cell in cells]
            if len(cells) == len(header):
                yield f"row {number}", dict(zip(header, cells))
            else:
                yield f"row {number}", BadRow(f"has {len(cells)} cells, the header {len(header)}")


def parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet  # slow to import, and other files do not need it

    table = pyarrow.parquet.read_table(path)
    for i, column in enumerate(table.schema):
        if column.type == pyarrow.float32():  # by way of text: as a 64-bit number 0.1 is 0.10000000149
            table = table.set_column(i, column.name, table[i].cast("string").cast("float64"))
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row


READERS = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def hub_rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets  # slow to import, and a file does not need it

    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split).to_list()
    except Exception as error:  # pyarrow and the hub client each raise classes of their own
        what = f"cannot read data {source} ({type(error).__name__}: {str(error)[:120]})"
        raise BadInput(f"{what}: give a local file, or check the name and the network") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def to_problem(row: Row, place: str, layout: Layout, answers: str) -> Problem:
    """The problem of a row. Raises BadRow; if an answer cannot be read, only if it is needed."""
    if isinstance(row, BadRow):
        raise row
    question = question_of(row, layout.question_column)
    if answers == "unused":
        return Problem(question, None)
    try:
        return Problem(question, answer_of(row, layout.answer_column))
    except BadRow as error:
        if answers == "needed":
            raise
        return Problem(question, None, f"{place} {error}")


def question_of(row: dict, column: str) -> str:
    """The text of the question column, or of the only turn of a chat. Raises BadRow."""
    found = values_of(row, (column,) if column else QUESTION_COLUMNS, "question")
    column, value = found[0]
    if different := [other for other, its in found[1:] if its != value]:
        raise BadRow(f"has both {column} and {different[0]}, which differ: choose by --question-column")
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        roles = [str(turn.get("role")) for turn in value]
        if roles != ["user"]:
            what = f"has a chat of the roles {', '.join(roles)[:60]} in {column}, not one user turn"
            raise BadRow(f"{what}: name the question by --question-column, and give --system-prompt by hand")
        value = value[0].get("content")
    text = to_text(value, column)
    if not text.strip():
        raise BadRow(f"has an empty question in {column}")
    if len(text) > LONGEST:
        raise BadRow(f"has a question of {len(text):,} characters in {column}")
    return text


def answer_of(row: dict, column: str) -> str:
    """The final answer; parts in a list are joined by a comma. Raises BadRow."""
    columns = (column,) if column else ANSWER_COLUMNS
    if not column and "query" in row:
        columns = (*columns, "response")
    column, value = values_of(row, columns, "answer")[0]
    parts = value if isinstance(value, list) else [value]  # OlympiadBench: an answer may have parts
    if any(map(is_missing, parts)):
        raise BadRow(f"has an empty part of the answer in {column}")
    return ", ".join(final_answer(to_text(part, column), column) for part in parts)


def values_of(row: dict, columns: tuple[str, ...], what: str) -> list[tuple[str, Any]]:
    """The columns that have a value, and their values. Raises BadRow if there are none."""
    found = [(column, value) for column in columns if not is_missing(value := field(row, column))]
    if not found and (empty := [column for column in columns if column in row]):
        raise BadRow(f"has an empty {what} in {' and '.join(empty)}")
    if not found:
        has = f"no column {' or '.join(columns)}, only {', '.join(map(str, row))[:200] or 'an empty object'}"
        raise BadRow(f"has {has}: name the column by --{what}-column")
    return found


def field(row: dict, column: str) -> Any:
    """The value of a column, or of `a.b`, field b of column a; None if there is none."""
    if column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    inner = row.get(first)
    return field(inner, rest) if dot and isinstance(inner, dict) else None


def is_missing(value: Any) -> bool:
    return value is None or value == [] or value != value or (isinstance(value, str) and not value.strip())


def to_text(value: Any, column: str) -> str:
    """Text as it is, a number in its shortest form. Raises BadRow for anything else."""
    if isinstance(value, str):
        if re.search("[\ud800-\udfff]", value):
            raise BadRow(f"has half of a surrogate pair in {column}, which is not valid Unicode")
        if lost := LOST_BACKSLASH.search(value):
            what = f"has {lost[0]!r} in {column}, of a LaTeX command whose backslash was taken for an escape"
            raise BadRow(f"{what}: in JSON, write it twice")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise BadRow(f"has a {type(value).__name__} in {column} where text or a number is needed")
    if not isinstance(value, int) and not math.isfinite(value):  # an int may be too large for a float
        raise BadRow(f"has {value} in {column}, which is not a finite number")
    is_exact = abs(value) < 2**53 and value == int(value)
    return str(int(value) if is_exact else value)


def gold_answer(answer: Any) -> str:
    """The final answer in a text or number; for use from Python. Raises ValueError if there is none."""
    if is_missing(answer):
        raise ValueError(f"the answer is empty: {answer!r}")
    return final_answer(to_text(answer, "answer"), "answer")


def final_answer(text: str, column: str) -> str:
    r"""The final answer in a text: after #### or "(The) answer (is):" at its end, or in its last \boxed{}.

    Text without any of these is the answer itself. Raises BadRow if such a text is a whole solution, or if
    two of these answers differ.
    """
    text = without_reasoning(text)
    if not text.strip():
        raise BadRow(f"has no answer after its reasoning in {column}")
    before, last = ["", *filter(str.strip, text.split("\n"))][-2:]
    line, *phrase = re.split(r"(?i)the (?:final )?answer is:|^\W*(?:final )?answer:", last)
    _, *hashes = re.split("####", before if phrase and "####" not in line else line)
    ends = [part[-1].strip("* \t\r").removesuffix(".") for part in (hashes, phrase) if part]
    found = list(filter(None, [*(last_box(end) or end for end in ends), last_box(text)]))
    if len({re.sub(r"[\s$,*.\\]", "", answer) for answer in found}) > 1:
        both = " and ".join(map(repr, found))[:100]
        raise BadRow(f"has the final answers {both} in {column}, which differ")
    if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", text.strip()):
        raise BadRow(f"has a list written as text in {column}: {text[:40]!r}; write a list, or its only part")
    is_marked = re.search(r"(?i)####|\\boxed|answer is", text)
    if is_prose(found[0] if found else text) or (is_marked and not found):
        what = f"has a solution of {len(text)} characters in {column} whose answer is not marked"
        remedy = "name the column of answers by --answer-column"
        raise BadRow(rf"{what} by \boxed{{}}, #### or 'The answer is:': {remedy}")
    return (found[0] if found else text).strip()


def is_prose(text: str) -> bool:
    """Whether text is a solution, not a final answer: sentences, calculations, "answer is", or long text."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)
    has_sentences = re.search(r"[\w)$}][.!?]\s+[\w$\\]", text)
    has_steps = bool(re.search(r"\d\s*[-+*/]\s*[\d.]+\s*=.*\n", text.strip()))  # 3 + 2 = 5 and more lines
    many_words = len(words) >= 8 and (len(text) > 200 or bool(has_sentences))
    return len(text) > 500 or has_steps or many_words or "answer is" in text.lower()


def last_box(text: str) -> str:
    r"""The content of the last non-empty \boxed{} to close; empty if there is none."""
    for start, end in reversed(boxes(text)):
        if content := text[start:end].strip():
            return content
    return ""


def words_of(problem: Problem) -> str:
    return " ".join(problem.question.split())


def distinct(problems: list[Problem], source: str) -> list[Problem]:
    """Problems to evaluate on, without repeats of the same words and answer, which would count twice."""
    found: dict[tuple, Problem] = {}
    for problem in problems:
        found.setdefault((words_of(problem), problem.answer), problem)
    if len(found) < len(problems):
        repeats = len(problems) - len(found)
        what = f"{repeats} of {len(problems)} problems of {source} repeat another one"
        print(f"{what}: each is evaluated once", flush=True)
    return list(found.values())


def subset(problems: list[Problem], limit: int, seed: int) -> list[Problem]:
    """`limit` problems (0: all), chosen at random by `seed`, as a file may start with its easy ones."""
    if not limit or limit >= len(problems):
        return problems
    return random.Random(seed).sample(problems, limit)


def batch_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """The prompts of a step, as indices below n, in a new random order every epoch; a step may span two."""
    places = range(step * size, (step + 1) * size)
    return [order(n, place // n, seed)[place % n] for place in places]


@lru_cache(maxsize=2)
def order(n: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def layout_of(knobs) -> Layout:
    return Layout(knobs.question_column, knobs.answer_column, knobs.skip_bad_rows)


def problems_of(knobs) -> tuple[list[Problem], list[Problem]]:
    """`train_and_test` with the settings of a training run."""
    return train_and_test(knobs.data, knobs.eval_data, knobs.eval_limit, knobs.seed, layout_of(knobs))


def train_and_test(
    source: str, held_out: str, limit: int, seed: int, layout: Layout = BY_NAME
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and at most `limit` others, with answers, to evaluate on. Raises BadInput.

    The others come from `held_out`, else from the test split of `source`, else from the file itself.
    """
    is_split = limit > 0 and not held_out and Path(source).is_file()
    problems = read_problems(source, "train", layout, answers="optional" if is_split else "unused")
    if limit == 0:
        return problems, []
    if not is_split:
        test = read_problems(held_out or source, "test", layout)
        test = subset(distinct(test, held_out or source), limit, seed)
        rest = without(test, problems, source)
        if len(rest) < len(problems):
            print(f"{len(problems) - len(rest)} training problems are held out as well: left out", flush=True)
        return rest, test
    if len(problems) <= limit:
        what = f"{source} has {len(problems)} problems, none left if {limit} are held out"
        raise BadInput(f"{what}: lower --eval-limit")
    answered = distinct([problem for problem in problems if problem.answer is not None], source)
    if len(answered) < limit:
        what = f"{source} has only {len(answered)} problems with an answer, and {limit} are to be held out"
        fault = next((p.fault for p in problems if p.answer is None), "each counted once")
        raise BadInput(f"{what} ({fault}): give --eval-data, or --eval-limit 0")
    test = [answered[i] for i in sorted(random.Random(seed).sample(range(len(answered)), limit))]
    return without(test, problems, source), test


def without(test: list[Problem], problems: list[Problem], source: str) -> list[Problem]:
    """The problems whose words are not those of a held-out one. Raises BadInput if none is left."""
    questions = set(map(words_of, test))
    rest = [problem for problem in problems if words_of(problem) not in questions]
    if not rest:
        what = f"{source} repeats the held-out problems, so none is left to train on"
        raise BadInput(f"{what}: give other problems by --eval-data")
    return rest
