"""Command-line flags from a dataclass of settings, and one-line errors for wrong input."""

import argparse
import dataclasses
import errno
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO, get_args, get_origin, get_type_hints


class BadInput(ValueError):
    """The input is wrong. The message is one line with the value, the reason and the remedy; exit code 2."""


class Stopped(Exception):
    """The run ends early, and not because of a bug: an exit code, and one line that says how to continue."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class ProcessEnded(Exception):
    """Another process of the run has ended; the message names it."""


def knob(
    default: Any,
    help: str,
    least: float | None = None,
    choices: Iterable[str] = (),
    most: float = math.inf,
    word: str = "",
    group: str = "",
) -> Any:
    """A dataclass field with the help text and the limits of its flag.

    A numeric flag also accepts the text `word`. `group` starts a new section of `--help`.
    """
    limits = {"least": least, "choices": tuple(choices), "most": most, "word": word}
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **limits})


@dataclasses.dataclass(frozen=True)
class NoKnobs:
    """The settings of a program that has none."""


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(f"{message} (see {self.prog} --help)")


def parse(knobs_class: type, description: str, argv: list[str] | None = None) -> dict[str, Any]:
    """The flags that were given, by field name, converted to the field's type. Raises BadInput.

    `--max-new-tokens 512` sets `max_new_tokens`; a bool is a switch, `--flag` or `--no-flag`; the flag of a
    tuple may be repeated. Abbreviations are not accepted: a flag that is added later must not change an old
    command.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=formatter)
    hints = get_type_hints(knobs_class)
    section = parser
    for field in dataclasses.fields(knobs_class):
        if field.metadata["group"]:
            section = parser.add_argument_group(field.metadata["group"])
        section.add_argument(flag_of(field.name), **flag_options(field, hints[field.name]))
    given = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def flag_options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    limits = field.metadata
    help_text = limits["help"] if field.default in ("", (), None) else f"{limits['help']} ({field.default})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        kind = next(t for t in (get_args(hint) or (hint,)) if t is not type(None))
        if get_origin(hint) is tuple:
            options["action"] = "append"
        options["type"] = converter(kind, limits)
        options["metavar"] = "|".join(filter(None, [kind.__name__.upper(), limits["word"]]))
    if limits["choices"]:
        options["choices"] = limits["choices"]
        options["metavar"] = "|".join(limits["choices"])
    return options


def converter(kind: type, limits: Mapping[str, Any]) -> Callable[[str], Any]:
    """A function from the text of a flag to `kind`, within the limits; it leaves the text `word` as it is."""
    least, most, word = limits["least"], limits["most"], limits["word"]

    def convert(text: str) -> Any:
        if kind is str and text != text.replace("\0", "").encode(errors="ignore").decode():
            what = f"{text!r} has a character that is not text"
            raise ArgumentTypeError(f"{what}: remove it, or use a locale of UTF-8, such as LC_ALL=C.UTF-8")
        if kind is str or (word and text == word):
            return text
        if not text.isascii() or "_" in text:
            raise ValueError("a digit of another script, or 1_000")
        value = kind(text)
        if kind is float and least is not None and not math.isfinite(value):
            raise ArgumentTypeError(f"{text} is not a finite number: give one")
        if least is not None and value < least:
            raise ArgumentTypeError(f"{text} is below {least}: raise it")
        if value > most:
            raise ArgumentTypeError(f"{text} is above {most}: lower it")
        return value

    convert.__name__ = kind.__name__ + (f" or {word}" if word else "")  # argparse names it in its error
    return convert


class Output:
    """A text stream whose failure does not end the program: its reader may be gone, or its disk full.

    `error` is the first failure; what is written after it is dropped. `stream` is None if it is closed.
    """

    def __init__(self, stream: TextIO | None):
        self.error = OSError("it is closed") if stream is None else None
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.stream.reconfigure(errors="replace")  # a terminal without a character shows "?"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable, *args: Any) -> None:
        try:
            action(*args)
        except OSError as error:
            self.error = self.error or error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # discards what the buffer still holds
            os.close(null)


REMEDIES = {  # errors of the operating system that any program can meet: exit code, and what to do
    errno.ENAMETOOLONG: (2, "give a shorter name"),
    errno.EACCES: (2, "make it readable and writable, or name another path"),
    errno.EROFS: (2, "name a path on another disk"),
    errno.ENOSPC: (1, "free some space, then start again"),
    errno.EDQUOT: (1, "free some space, then start again"),
}


def run_main(main: Callable[[], int | None]) -> None:
    """Call `main` and exit: one line and code 2 for wrong input, 1 for a full disk, 130 after Ctrl-C.

    Bugs keep their tracebacks.

    A `main` that returns None has printed its result: the code is 1 if the output could not be written. One
    that returns 0 has its results in files, and ends the same whether its output is read or not.
    """
    before = sys.stdout, sys.stderr
    output, _ = sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        code = exit_code(main)
        output.flush()
        if code is None and output.error:
            print(f"error: cannot write the output ({output.error})", file=sys.stderr)
            code = 1
        sys.exit(code)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def exit_code(main: Callable[[], int | None]) -> int | None:
    """What `main` returns; after wrong input, a stopped run or Ctrl-C, print a line and return its code."""
    try:
        return main()
    except SystemExit as stop:
        return stop.code or None  # argparse has printed the help
    except (BadInput, Stopped) as error:
        print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
        return error.code if isinstance(error, Stopped) else 2
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        code, remedy = REMEDIES[error.errno]
        print(f"error: {printable(str(error))}: {remedy}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def printable(text: str) -> str:
    r"""The text with control characters but newline and tab written as \x1b: a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
