"""Output that ends early: a run finishes, a program that only prints has exit code 1, and no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import in_process

import schedules
import train
from support import cli

ROOT = Path(schedules.__file__).parent
ENDS = ["| true", "> /dev/full", ">&-"]  # how a shell ends the output early
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/nonexistent"}


def shell(command):
    command = ["bash", "-c", f"set -o pipefail; {sys.executable} {command}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | ASCII)


@pytest.mark.parametrize("flags", ["", "--help"])
@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_only_prints_ends_with_one_line(flags, end):
    done = shell(f"schedules.py {flags} {end}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write the output (") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("end", ["2>&-", "2> /dev/full"])
def test_an_error_that_nobody_can_read_keeps_its_exit_code(end):
    done = shell(f"schedules.py --bogus {end}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


RUN = "--preset toy --steps 2 --eval-limit 2 --eval-every 0 --max-new-tokens 20"


@pytest.mark.slow
def test_a_run_finishes_if_its_reader_leaves(world, tmp_path):
    done = shell(f"train.py {RUN} --out {tmp_path}/run | head -1")
    assert done.returncode == 0, done.stderr
    for noise in ("Traceback", "Exception ignored", "arning"):  # of a library either
        assert noise not in done.stderr
    for name in ("summary.json", "curve.png", "student/config.json"):
        assert (tmp_path / "run" / name).exists(), name


@pytest.mark.slow
def test_a_run_finishes_if_neither_output_can_be_written(world, tmp_path):
    process = in_process(train.main, [*RUN.split(), "--out", tmp_path / "run"], Path("/dev/full"))
    process.join()
    assert process.exitcode == 0 and (tmp_path / "run" / "summary.json").exists()


def test_control_characters_are_escaped():
    text = "\x1b[2J\x1b]0;title\x07 a\tb\nc\r\x9b1m é \x7f"
    assert cli.printable(text) == r"\x1b[2J\x1b]0;title\x07 a" + "\tb\nc" + r"\x0d\x9b1m é \x7f"


def test_a_full_disk_is_one_line(capsys):
    def fill():
        Path("/dev/full").write_text("a row", encoding="utf-8")

    with pytest.raises(SystemExit) as stop:
        cli.run_main(fill)
    printed = capsys.readouterr()
    assert stop.value.code == 1 and not printed.out
    assert printed.err.count("\n") == 1 and "free some space" in printed.err


def test_a_file_that_may_not_be_written_is_one_line(capsys):
    def write():
        raise PermissionError(errno.EACCES, "Permission denied", "rows.csv")

    with pytest.raises(SystemExit) as stop:
        cli.run_main(write)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and "'rows.csv': make it readable and writable" in printed.err
