"""What README says must be so: line counts, commands, flags, figures."""

import dataclasses
import re
from pathlib import Path

import claims
import compare
import loss
import probe
import probe_figures
import rollouts
import steps
from transformers import Qwen2Config

import cli
import eval_math
import memory
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
    classes = (train.Knobs, eval_math.Knobs, rollouts.Knobs, steps.Knobs, loss.Knobs, compare.Knobs)
    classes += tuple(knobs for _, knobs in probe.PROBES.values())
    flags = {"--" + f.name.replace("_", "-") for k in classes for f in dataclasses.fields(k)}
    flags |= {"--no-checkpointing", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags


def test_memory_table_is_the_estimate():
    shape = {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
    half = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    big = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    configs = [Qwen2Config(**shape, **sizes) for sizes in (half, big)]
    rows = re.findall(r"^\| (\d+) GB \| `(.*)` \| (\d+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    for card, flags, horizon, peak in rows:
        given = cli.parse(train.Knobs, "", flags.split())
        knobs = train.Knobs(**{"dtype": "bfloat16", "device": "cuda"} | given)
        found = memory.estimate(knobs, *configs, 256, int(horizon))["peak"] / 1e9
        assert f"{found:.1f}" == peak and found < 0.94 * int(card)


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
        cells = [f"{row['student']}, {row['dtype']}", row["side"], f"{float(row['seconds']):.1f}", sampling]
        assert "| " + " | ".join([*cells, f"{float(row['peak_gb']):.1f}"]) + " |" in README
    for row in report.read_csv(ROOT / "results" / "bench_rollouts.csv"):
        cells = [row["rows"], row["tokens"], f"{row['shortest']} to {row['longest']}", row["side"]]
        assert "| " + " | ".join([*cells, f"{float(row['tokens_per_s']):.0f}"]) + " |" in README


def test_comparison_is_what_compare_prints():
    """The block of the table and the claims, from the committed rows."""
    real = ("full", "popd", "topd-0.1", "esr")
    shown = (("compare", compare.GROUPS["all"], 5), ("compare_closing", compare.GROUPS["closing"], 5))
    for name, arms, seeds in (*shown, ("compare_coder", real, 1)):
        path = ROOT / "results" / f"{name}.csv"
        told = claims.tell(
            claims.read(path), claims.read_curves(path), arms, seeds, name == "compare_closing"
        )
        for line in told.splitlines():
            assert line.rstrip() in README, line


def test_readings_are_what_the_probes_print():
    for name in (*probe_figures.FIGURES, *(f"{n}_coder" for n in ("profile", "decay", "swap", "cascade"))):
        rows = probe_figures.read(ROOT / "results" / f"probe_{name}.csv")
        assert not probe_figures.missing(rows)
        assert probe_figures.reading(rows) in re.sub(r"\s+", " ", README)
