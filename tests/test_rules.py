"""The rules of the layout: what imports what, what one step executes, and how small a change can be."""

import ast
import os
import shutil
import sys
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from helpers import in_process

import eval_math
import opd
import train

ROOT = Path(train.__file__).parent
FIVE = ("opd", "rollout", "schedules", "train", "eval_math")
OWN = {*FIVE, "support", "extras"}
TESTS_OF_THE_FIVE = ("conftest.py", "helpers.py", *(f"test_{name}.py" for name in FIVE))


def imports_of(path):
    """Pairs of an imported module and its AST ancestors."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []

    def visit(node, ancestors):
        if isinstance(node, ast.Import):
            found.extend((name.name, ancestors) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, ancestors))
        for child in ast.iter_child_nodes(node):
            visit(child, [*ancestors, node])

    visit(tree, [])
    return found


def packages(path):
    """The packages that a file imports, without the standard library."""
    return {name.split(".")[0] for name, _ in imports_of(path)} - set(sys.stdlib_module_names)


def test_opd_rollout_and_schedules_import_almost_nothing():
    assert packages(ROOT / "opd.py") == {"torch"}
    assert packages(ROOT / "rollout.py") == {"torch", "transformers"}
    assert [name for name, _ in imports_of(ROOT / "schedules.py") if name.startswith("support")] == [
        "support.cli"
    ]
    assert packages(ROOT / "schedules.py") == {"support"}


def test_support_imports_none_of_the_five_and_no_extras():
    for path in (ROOT / "support").glob("*.py"):
        assert packages(path) & OWN <= {"support"}, path


def test_exercises_import_the_five_and_torch():
    for path in (ROOT / "exercises").rglob("*.py"):
        assert packages(path) <= {*FIVE, "torch", "pytest"}, path


def test_experiments_put_the_project_on_the_path():
    """pytest does so itself, so that a script without this import would pass its tests and not start."""
    for path in (ROOT / "experiments").glob("*.py"):
        if "__main__" in path.read_text(encoding="utf-8"):
            assert "root" in packages(path), path


def test_text_files_are_utf_8():
    """Said wherever one is opened, as the default depends on the machine; toy.py writes ASCII alone."""
    paths = [*ROOT.glob("*.py")]
    for folder in ("support", "extras", "experiments", "benchmarks"):
        paths += [path for path in (ROOT / folder).glob("*.py") if path.name != "toy.py"]
    for path in paths:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        for call in calls:
            function = ast.unparse(call.func)
            opens = function.endswith(("open", "read_text", "write_text"))
            if opens and function not in ("os.open", "run.open", "safe_open", "subprocess.Popen"):
                text = ast.unparse(call)
                assert "encoding=" in text or "b')" in text, f"{path}: {text}"


@pytest.mark.parametrize("name", FIVE)
def test_extras_are_imported_under_a_condition(name):
    """A flag decides: inside a function and inside an `if`."""
    for module, ancestors in imports_of(ROOT / f"{name}.py"):
        if module.split(".")[0] == "extras":
            kinds = [type(node) for node in ancestors]
            assert ast.FunctionDef in kinds and ast.If in kinds, module


def test_ranks_are_imported_where_there_are_several():
    found = []
    for name in FIVE:
        for module, ancestors in imports_of(ROOT / f"{name}.py"):
            if module == "extras.ranks":
                found.append([ast.unparse(node.test) for node in ancestors if isinstance(node, ast.If)])
    assert found == [["os.environ.get('WORLD_SIZE', '1') != '1'"]]


def test_nothing_stands_between_the_command_line_and_the_formula(world, tmp_path, monkeypatch):
    chains = []

    def reverse_kl(*args):
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        chains.append([(Path(frame.filename).name, frame.name) for frame in frames])
        return opd.reverse_kl(*args)

    monkeypatch.setitem(opd.DIVERGENCES, "reverse_kl", reverse_kl)
    flags = f"--preset toy --steps 1 --eval-limit 0 --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()
    hops = [("train.py", "main"), ("train.py", "train"), ("train.py", "score"), ("opd.py", "opd_backward")]
    start = chains[0].index(hops[0])
    assert chains[0][start:] == [*hops, ("test_rules.py", "reverse_kl")]


def test_without_held_out_problems_no_evaluation_code_runs(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", None)
    monkeypatch.setattr(train, "score_answers", None)
    monkeypatch.setattr(eval_math, "batch_that_fits", None)
    flags = f"--preset toy --steps 2 --eval-every 1 --eval-limit 0 --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()


class LineCounter:
    """The project's lines that run, outside module level: those of the whole run and of `train.train`."""

    def __init__(self):
        self.run = set()
        self.loop = set()
        self.in_loop = False

    def __call__(self, frame, event, argument):
        """As `sys.settrace` wants it."""
        code = frame.f_code
        if (code.co_filename, code.co_name) == (train.__file__, "train"):
            self.in_loop = event != "return"
            return self
        if not code.co_filename.startswith(f"{ROOT}/") or code.co_name == "<module>":
            return None
        if event in ("line", "call"):
            for lines in (self.run, self.loop) if self.in_loop else (self.run,):
                lines.add((code.co_filename.removeprefix(f"{ROOT}/"), frame.f_lineno))
        return self

    @staticmethod
    def by_file(lines):
        """(name, distinct lines) of each file but train.py and this one, the largest first."""
        others = [name for name, _ in lines if name not in ("train.py", "tests/test_rules.py")]
        return Counter(others).most_common()


def test_one_step_executes_little(world, tmp_path, monkeypatch):
    """Files besides train.py, and distinct lines in them outside module level, of one default step.

    The run reads and checks its inputs first, and writes its results; the loop is what a reader follows.
    """
    flags = f"--preset toy --schedule topd --horizon 0.1 --steps 1 --eval-limit 0 --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    counter = LineCounter()
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        train.main()
    finally:
        sys.settrace(before)
    run, loop = counter.by_file(counter.run), counter.by_file(counter.loop)
    assert len(run) <= 13 and sum(lines for _, lines in run) <= 820, run
    assert len(loop) <= 9 and sum(lines for _, lines in loop) <= 330, loop
    assert {"rollout.py", "opd.py"} <= {name for name, _ in loop[:5]}, loop


# What a reader adds, as (file, text before which it stands, added lines).
COSINE = [
    (
        "schedules.py",
        "class Schedule(",
        '''def cosine(step: int, steps: int, budget: int, start: int, growth: int, interval: int) -> int:
    """H grows from H0 to T on half a cosine."""
    return round(start + (budget - start) * (1 - math.cos(math.pi * step / steps)) / 2)


''',
    ),
    ("schedules.py", '    "esr": Schedule(', '    "cosine": Schedule(horizon=0.1, formula=cosine),\n'),
]
SQUARED = [
    (
        "opd.py",
        "# A new divergence is",
        '''def squared(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """Squared difference of the log-probabilities, weighted by the student: (C, V) -> (C,)."""
    return (student_logp.exp() * (student_logp - teacher_logp) ** 2).sum(-1)


''',
    ),
    ("opd.py", '    "forward_kl": forward_kl,', '    "squared": squared,\n'),
]
COLUMN = [
    (
        "opd.py",
        '        "student_logp": token_logp(',
        '        "teacher_confidence": teacher_logp.max(-1).values.exp(),\n',
    )
]


RUN_WITH_ADDITIONS = """
import csv
import sys

import train


def test_a_run_with_the_additions(tmp_path, monkeypatch):
    flags = "--preset toy --schedule cosine --divergence squared --steps 2 --eval-limit 4 --out"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), str(tmp_path / "run")])
    train.main()
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert len(rows) == 2 and all(float(row["teacher_confidence"]) > 0 for row in rows)
"""


def apply(change, folder):
    assert sum(lines.count("\n") for _, _, lines in change) <= 12
    for name, before, lines in change:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(before) == 1
        (folder / name).write_text(text.replace(before, lines + before), encoding="utf-8")


def run_tests_of(copy):
    """Run the tests of a copy of the project, in a process that has imported the project itself."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT):
            del sys.modules[name]
    sys.path[:] = [str(copy), *(place for place in sys.path if not Path(place).is_relative_to(ROOT))]
    os.chdir(copy)
    return pytest.main(["-q", "-x", "-p", "no:xdist", *sys.argv[1:], "tests"])


@pytest.mark.slow
def test_a_schedule_a_divergence_and_a_column_are_small_changes(world, tmp_path):
    """In a copy without extras: a run with all three, an evaluation, and the copy's tests of the five."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "support", copy / "support")
    (copy / "tests").mkdir()
    for name in (*(f"{name}.py" for name in FIVE), "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    for name in TESTS_OF_THE_FIVE:
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    (copy / ".cache").mkdir()
    (copy / ".cache" / "toy").symlink_to(world.parent)
    for change in (COSINE, SQUARED, COLUMN):
        apply(change, copy)
    (copy / "tests" / "test_addition.py").write_text(RUN_WITH_ADDITIONS, encoding="utf-8")
    # Without the slow ones among those that meet none of the additions.
    left_out = ("toy_student_learns", "stopped_run", "linear_time", "bounded_time", "forked", "two_models")
    selected = " and ".join(f"not {name}" for name in left_out)
    process = in_process(partial(run_tests_of, copy), ["-k", selected], tmp_path / "output")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text(encoding="utf-8")[-3000:]
