"""Rows of a JSONL, JSON, CSV or parquet file or of a hub data set, each a dict with its place.

A CSV file has no types: its cells are text, and only an empty one is missing, not "None" or "nan".
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from support.cli import BadInput

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
NOT_TEXT = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
}
NOT_TEXT |= {b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text"}


class BadRow(ValueError):
    """A row cannot be used. The message continues "line 3" or "row 3"."""


Row = dict | BadRow


def read_rows(source: str, split: str) -> tuple[str, list[tuple[str, Row]]]:
    """The name of what is read, and its rows with their places. Raises BadInput."""
    path = Path(source)
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
    try:
        path = file_of(path, split) if path.is_dir() else path
        if path.is_file():
            if path.suffix not in readers:
                raise BadInput(
                    f"data {source} is not a {', '.join(SUFFIXES)} file: convert it to one of them"
                )
            check_is_text(path)
            return str(path), list(readers[path.suffix](path))
    except BadInput:
        raise
    except (OSError, ValueError, NotImplementedError, RecursionError, csv.Error) as error:
        what = f"cannot read data {path} ({type(error).__name__}: {str(error)[:120]})"
        raise BadInput(f"{what}: give a readable file, text in UTF-8") from error
    if path.suffix in readers or source.startswith((".", "/", "~")):
        raise BadInput(f"data {source} does not exist: give a file, a folder, or the name of a hub data set")
    return source, list(hub_rows(source, split))


def file_of(folder: Path, split: str) -> Path:
    """The file of a folder that holds `split`. Raises BadInput."""
    found = sorted(p for p in folder.iterdir() if p.stem == split and p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise BadInput(f"folder {folder} has no {split}.jsonl, .json, .csv or .parquet: name a file")
    if len(found) > 1:
        raise BadInput(f"folder {folder} has {' and '.join(p.name for p in found)}: name one of them")
    return found[0]


def check_is_text(path: Path) -> None:
    """Raises BadInput if a file is compressed or in UTF-16."""
    with path.open("rb") as file:
        start = file.read(4)
    for magic, kind in NOT_TEXT.items():
        if start.startswith(magic):
            raise BadInput(f"data {path} is {kind}: unpack or convert it to text in UTF-8")


def jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:  # not str.splitlines: it also breaks lines at U+2028
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                row = json.loads(text) if text else {}
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets nested too deeply
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
    for number, row in enumerate(json.loads(content), 1):
        yield (
            f"row {number}",
            row if isinstance(row, dict) else BadRow(f"is not a JSON object: {str(row)[:40]}"),
        )


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a CSV file with a header. All cells are text, and 5.0 is 5."""
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

    for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1):
        yield f"row {number}", row


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
