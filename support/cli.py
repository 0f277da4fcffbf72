"""Command-line flags from a dataclass of settings, and one-line errors for wrong input."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_origin, get_type_hints


class BadInput(ValueError):
    """The input is wrong. The message is one line with the value, the reason and the remedy; exit code 2."""


class Stopped(Exception):
    """The run ends early, and not because of a bug: an exit code, and one line that says how to continue."""

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
    group: str = "",
) -> Any:
    """A dataclass field with the help text and the limits of its flag.

    A numeric flag also accepts the text `word`. `group` starts a new section of `--help`.
    """
    choices = None if choices is None else tuple(choices)
    limits = {"least": least, "choices": choices, "most": most, "word": word}
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **limits})


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
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for field in dataclasses.fields(knobs_class):
        check_limits(field, given.get(field.name))
    return given


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def flag_options(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    limits = field.metadata
    help_text = limits["help"] if field.default in ("", (), None) else f"{limits['help']} ({field.default})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(hint) is tuple:
        options["action"] = "append"
        options["metavar"] = "STR"
    else:
        kind = next(t for t in (get_args(hint) or (hint,)) if t is not type(None))
        options["type"] = number_or(limits["word"], kind)
        options["metavar"] = "|".join(filter(None, [kind.__name__.upper(), limits["word"]]))
    if limits["choices"]:
        options["choices"] = limits["choices"]
        options["metavar"] = "|".join(limits["choices"])
    return options


def check_limits(field: dataclasses.Field, value: Any) -> None:
    """Raises BadInput if a number is outside the limits of its field."""
    least, most = field.metadata["least"], field.metadata["most"]
    if least is None or value is None or value == field.metadata["word"]:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{flag_of(field.name)} {value} is not a finite number: give one")
    if value < least:
        raise BadInput(f"{flag_of(field.name)} {value} is below {least}: raise it")
    if value > most:
        raise BadInput(f"{flag_of(field.name)} {value} is above {most}: lower it")


def number_or(word: str, kind: type) -> Callable[[str], Any]:
    """A converter to `kind` that leaves the text `word` as it is."""

    def convert(text: str) -> Any:
        return text if word and text == word else kind(text)

    convert.__name__ = kind.__name__ + (f" or {word}" if word else "")  # argparse names it in its error
    return convert


def run_main(main: Callable[[], int | None]) -> None:
    """Call `main` and exit: code 2 and one line for wrong input, 130 after Ctrl-C. Bugs keep tracebacks."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
        stream.reconfigure(errors="replace")  # a terminal without a character shows "?" instead of failing
    try:
        sys.exit(main())
    except (BadInput, Stopped) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.code if isinstance(error, Stopped) else 2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
