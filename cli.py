"""Flags out of a dataclass of knobs, and wrong input answered in one line instead of a traceback."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_origin, get_type_hints


class BadInput(ValueError):
    """The person's input is at fault: the message is one line with the value, the reason and the remedy."""


class Stopped(Exception):
    """The run ends early, and not by a bug: its exit code, and one line that says how to go on."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def knob(
    default: Any,
    help: str,
    least: float | None = None,
    choices: Iterable[str] | None = None,
    most: float = math.inf,
    word: str = "",
) -> Any:
    """A dataclass field whose flag has this text under `--help`, and these limits.

    A number's flag takes `word` as well.
    """
    choices = None if choices is None else tuple(choices)
    limits = {"least": least, "choices": choices, "most": most, "word": word}
    return dataclasses.field(default=default, metadata={"help": help} | limits)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message} (see {self.prog} --help)")


def parse(knobs_class: type, description: str, argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, by knob name, converted to the knob's type. Raises BadInput.

    `--max-new-tokens 512` sets `max_new_tokens`; a bool is a switch, `--eval` or `--no-eval`;
    a tuple's flag may be given several times.
    No abbreviations: a flag added later must not change what an old command means.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=formatter)
    hints = get_type_hints(knobs_class)
    for field in dataclasses.fields(knobs_class):
        hint = hints[field.name]
        how: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": f"{field.metadata['help']} ({field.default})",
        }
        if hint is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is tuple:
            how |= {"action": "append", "metavar": "STR"}
        else:
            kind = next(t for t in (get_args(hint) or (hint,)) if t is not type(None))
            how["type"] = number_or(field.metadata["word"], kind)
            how["metavar"] = "|".join(filter(None, [kind.__name__.upper(), field.metadata["word"]]))
        if field.metadata["choices"]:
            how |= {"choices": field.metadata["choices"], "metavar": "|".join(field.metadata["choices"])}
        how["help"] = how["help"].replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for field in dataclasses.fields(knobs_class):
        least, value = field.metadata["least"], given.get(field.name)
        if value == field.metadata["word"]:
            continue
        if least is not None and value is not None and not value >= least:  # `not >=` catches NaN too
            raise BadInput(f"--{field.name.replace('_', '-')} {value} is below {least}: raise it")
        if least is not None and value is not None and value > (most := field.metadata["most"]):
            raise BadInput(f"--{field.name.replace('_', '-')} {value} is above {most}: lower it")
    return given


def number_or(word: str, kind: type) -> Callable[[str], Any]:
    """`kind`, but for a text that is `word`, which stays as it is."""

    def convert(text: str) -> Any:
        return text if word and text == word else kind(text)

    convert.__name__ = kind.__name__ + (f" or {word}" if word else "")  # named in argparse's error
    return convert


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit: 2 and one line on bad input, 130 after Ctrl-C. A bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that lacks a character gets "?", not an exception
    try:
        sys.exit(main())
    except (BadInput, Stopped) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.code if isinstance(error, Stopped) else 2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
