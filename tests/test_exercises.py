"""The exercises: unsolved they fail with their hint, solved they pass, and each famous mistake is named."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = Path(__file__).parent.parent / "exercises"
NAMES = [path.stem for path in sorted(FOLDER.glob("[0-9]_*.py"))]

# (exercise, function): pairs of a wrong body of the function and what a failing test must say about it
MISTAKES = {
    ("1_reverse_kl", "reverse_kl"): [
        ("return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)", "wrong direction"),
        ("return (student_logp.exp() * (student_logp - teacher_logp)).mean(-1)", "not a mean"),
        ("return (student_logp.exp() * (student_logp - teacher_logp)).sum()", "last dim"),
        ("return (student_logp.exp().detach() * (student_logp - teacher_logp)).sum(-1)", "detached"),
    ],
    ("2_estimator", "sampled_loss"): [
        ("return (student_logp - teacher_logp).gather(-1, tokens[:, None])[:, 0]", "teaches nothing"),
        (
            """\
p, q = (logp.gather(-1, tokens[:, None])[:, 0] for logp in (student_logp, teacher_logp))
return -(q - p) * p""",
            "detach the advantage",
        ),
        (
            """\
p, q = (logp.gather(-1, tokens[:, None])[:, 0] for logp in (student_logp, teacher_logp))
return (q - p).detach() * p""",
            "sign is wrong",
        ),
    ],
    ("3_response_mask", "response_mask"): [
        ("return tokens != eos_id", "first eos token was sampled"),
        ("return (tokens == eos_id).cumsum(-1) == 0", "first eos token was sampled"),
        ("return (tokens == eos_id).cumsum(-1) <= 1", "whatever its id"),
    ],
    ("4_shift", "predicting_places"): [
        (
            """\
places = torch.arange(int((prompt_lengths + response_lengths).max()))
return (places >= prompt_lengths[:, None]) & (places < (prompt_lengths + response_lengths)[:, None])""",
            "Off by one",
        ),
        (
            """\
places = torch.arange(int((prompt_lengths + response_lengths).max()))
return (places >= prompt_lengths.max() - 1) & (places < (prompt_lengths + response_lengths)[:, None] - 1)""",
            "its own prompt",
        ),
    ],
    ("5_token_mean", "backward_of_a_step"): [
        (
            """\
for inputs, mask in micro_batches:
    (token_losses(inputs)[mask].mean() / len(micro_batches)).backward()""",
            "mean of means",
        ),
        (
            """\
for inputs, mask in micro_batches:
    token_losses(inputs)[mask].mean().backward()""",
            "sum of the micro-batches' means",
        ),
        (
            """\
places = sum(mask.numel() for _, mask in micro_batches)
for inputs, mask in micro_batches:
    (token_losses(inputs)[mask].sum() / places).backward()""",
            "padding has no loss",
        ),
        (
            "torch.cat([token_losses(inputs)[mask] for inputs, mask in micro_batches]).mean().backward()",
            "splitting has saved nothing",
        ),
    ],
    ("6_horizon", "horizon_at"): [
        ("return start + growth * (step // interval)", "above the budget"),
        ("return min(budget, start + growth * step // interval)", "Is the division rounded down?"),
    ],
    ("6_horizon", "truncate"): [
        (
            """\
kept = response[:horizon]
return (kept, True) if kept[-1] == eos_id else (kept + [eos_id], False)""",
            "none is appended",
        ),
        ("return response[:horizon], len(response) < horizon", "ended by itself"),
    ],
}
CASES = [(*where, *mistake) for where, mistakes in MISTAKES.items() for mistake in mistakes]


def functions_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def solution(name):
    """The solution's functions: name -> body without its docstring."""
    functions = functions_of(FOLDER / "solutions" / f"{name}.py")
    return {node.name: "\n".join(map(ast.unparse, node.body[1:])) for node in functions}


def filled(name, bodies):
    """The exercise's text with `bodies` in the place of its gaps."""
    path = FOLDER / f"{name}.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    gaps = {node.name: node.body[-1] for node in functions_of(path) if isinstance(node.body[-1], ast.Raise)}
    assert gaps.keys() == bodies.keys()
    for function, gap in reversed(gaps.items()):
        lines[gap.lineno - 1 : gap.end_lineno] = textwrap.indent(bodies[function], "    ").splitlines()
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """(variant, exercise) -> the failure message of each of its tests, "" of one that passed.

    All variants run in one process: unsolved, solved, and mistake0, mistake1, ...
    """
    folder = tmp_path_factory.mktemp("exercises")
    texts = {}
    for name in NAMES:
        texts["unsolved", name] = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        texts["solved", name] = filled(name, solution(name))
    for i, (name, function, body, _) in enumerate(CASES):
        texts[f"mistake{i}", name] = filled(name, solution(name) | {function: body})
    for (variant, name), text in texts.items():
        (folder / variant).mkdir(exist_ok=True)
        (folder / variant / f"{name}.py").write_text(text, encoding="utf-8")
    files = [f"{variant}/{name}.py" for variant, name in texts]
    options = ["--rootdir=.", "--import-mode=importlib", "--junitxml=results.xml", "-p", "no:xdist"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *options, *files]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr  # all tests ran, some failed
    found = {key: [] for key in texts}
    for case in ElementTree.parse(folder / "results.xml").iter("testcase"):
        variant, name = case.get("classname").split(".")
        found[variant, name].append("".join(problem.get("message") for problem in case))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_unsolved_every_test_fails_with_the_hint(name, messages):
    found = messages["unsolved", name]
    assert 2 <= len(found) <= 4
    assert all(re.match(r"NotImplementedError: \w+", message) for message in found), found


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes_and_is_short(name, messages):
    assert messages["solved", name] == [""] * len(messages["unsolved", name])
    assert all(len(body.splitlines()) <= 6 for body in solution(name).values())


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number][0])
def test_a_famous_mistake_is_named(number, messages):
    name, _, _, hint = CASES[number]
    failed = [message for message in messages[f"mistake{number}", name] if message]
    assert any(message.startswith("AssertionError") and hint in message for message in failed), failed


def test_the_readme_lists_the_exercises_in_their_order():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)\.py`", text, re.MULTILINE) == NAMES
    assert len(text.splitlines()) <= 20
