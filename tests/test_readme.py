"""What README says must be so: line counts, commands, flags, figures."""

import dataclasses
import re
from pathlib import Path

import eval_math
import report
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CORE = ("opd.py", "rollout.py", "schedules.py", "train.py")


def lines(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def test_line_counts():
    assert sum(map(lines, CORE)) <= 450 and lines("eval_math.py") <= 200
    assert f"in {sum(map(lines, CORE))} readable lines" in README
    for name, count in re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE):
        assert lines(name) == int(count), name


def test_flags_exist():
    flags = {
        "--" + f.name.replace("_", "-") for k in (train.Knobs, eval_math.Knobs) for f in dataclasses.fields(k)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - flags <= {"--help"}


def test_files_exist():
    for name in re.findall(r"\]\(([^)]+)\)|python (\S+\.py)", README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_table_is_the_csv():
    for row in report.read_csv(ROOT / "results" / "toy.csv"):
        cells = [
            f"{float(row[k]):.0%} +- {float(row[k + '_se']):.1%}" for k in ("before", "after", "teacher")
        ]
        cells += [f"{int(row['response_tokens']):,}", f"{float(row['seconds']):.1f}"]
        assert f"| `{row['flags']}` | " + " | ".join(cells) + " |" in README


def test_other_tables_are_their_csvs():
    for row in report.read_csv(ROOT / "results" / "real_eval.csv"):
        interval = f"{float(row['low']):.1%} to {float(row['high']):.1%}"
        cells = [row["n"], f"{float(row['accuracy']):.1%}", interval, f"{float(row['truncated']):.1%}"]
        assert f"| {row['model']} | {row['benchmark']} | " + " | ".join(cells) + " |" in README
    for row in report.read_csv(ROOT / "results" / "bench_loss.csv"):
        cells = [f"{float(row['seconds']):.1f}", f"{float(row['peak_gb']):.1f}", f"{float(row['loss']):.6f}"]
        assert f"| {row['dtype']} | {row['side']} | " + " | ".join(cells) + " |" in README
    for row in report.read_csv(ROOT / "results" / "real_learning_rates.csv"):
        assert f"{float(row['reverse_kl']):.3f} +- {float(row['se']):.3f}" in README
    for row in report.read_csv(ROOT / "results" / "bench_evaluation.csv"):
        shown = f"{float(row['ratio']):.2f} times" if row["ratio"] else f"{float(row['ours_s']):.1f} s ("
        assert shown in README
    for row in report.read_csv(ROOT / "results" / "bench_steps.csv"):
        sampling = f"{float(row['rollout_s']):.1f}" if row["rollout_s"] else "-"
        cells = [row["side"], f"{float(row['seconds']):.1f}", sampling, f"{float(row['peak_gb']):.1f}"]
        assert "| " + " | ".join(cells) + " |" in README
