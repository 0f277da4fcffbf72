"""What README.md and RESULTS.md say must be so: files, commands, flags, figures."""

import dataclasses
import re
from pathlib import Path

import claims
import compare
import figures
import parts
import probe
import pytest
import steps
from transformers import Qwen2Config

import eval_math
import train
from extras import memory
from support import cli, run_folder

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README, "RESULTS.md": RESULTS}


def rows_of(name):
    return run_folder.read_csv(ROOT / "results" / f"{name}.csv")


def test_length():
    """README is one sitting; evidence lives in RESULTS.md. The counts have room for changes."""
    without_code = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    prose = [line for line in without_code.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) <= 1400 and len(README.splitlines()) <= 300
    for name, about in re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+)(?: lines)? \|$", README, re.MULTILINE):
        count = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(count - int(about)) <= 30, name


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    classes = [train.Knobs, eval_math.Knobs, compare.Knobs, steps.Knobs, parts.Knobs]
    classes += [knobs for _, knobs in probe.PROBES.values()]
    flags = {cli.flag_of(f.name) for knobs in classes for f in dataclasses.fields(knobs)}
    flags |= {"--no-checkpointing", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name])) <= flags


@pytest.mark.parametrize("name", TEXTS)
def test_files_exist(name):
    for link, script in re.findall(r"\]\(([^)]+)\)|python (\S+\.py)", TEXTS[name]):
        assert (ROOT / (link or script)).exists(), link or script


def test_toy_table():
    for row in rows_of("toy"):
        cells = [
            f"{float(row[k]):.0%} +- {float(row[k + '_se']):.1%}" for k in ("before", "after", "teacher")
        ]
        cells += [f"{int(row['response_tokens']):,}", f"{float(row['seconds']):.1f}"]
        assert f"| `{row['flags']}` | " + " | ".join(cells) + " |" in README


def test_memory_table_is_the_estimate():
    shape = {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
    half = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    big = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    configs = [Qwen2Config(**shape, **sizes) for sizes in (half, big)]
    rows = re.findall(r"^\| (\d+) GB \| `(.*)` \| (\d+) \| ([\d.]+) \|$", RESULTS, re.MULTILINE)
    assert len(rows) >= 5
    for device, flags, horizon, peak in rows:
        knobs = train.Knobs(**{"dtype": "bfloat16"} | cli.parse(train.Knobs, "", flags.split()))
        found = memory.estimate(knobs, *configs, 256, int(horizon))["peak"] / 1e9
        assert f"{found:.1f}" == peak and found < 0.94 * int(device)


def test_evaluation_tables():
    for row in rows_of("real_eval"):
        interval = f"{float(row['low']):.1%} to {float(row['high']):.1%}"
        cells = [row["n"], f"{float(row['accuracy']):.1%}", interval, f"{float(row['truncated']):.1%}"]
        assert f"| {row['model']} | {row['benchmark']} | " + " | ".join(cells) + " |" in RESULTS
    for row in rows_of("real_learning_rates"):
        assert f"{float(row['reverse_kl']):.3f} +- {float(row['se']):.3f}" in RESULTS


def test_benchmark_tables():
    for row in rows_of("bench_loss") + rows_of("bench_loss_earlier"):
        cells = [f"{float(row['seconds']):.1f}", f"{float(row['peak_gb']):.1f}", f"{float(row['loss']):.6f}"]
        assert f"| {row['dtype']} | {row['side']} | " + " | ".join(cells) + " |" in RESULTS
    for row in rows_of("bench_steps") + rows_of("bench_steps_earlier"):
        sampling = f"{float(row['rollout_s']):.1f}" if row["rollout_s"] else "-"
        cells = [f"{row['student']}, {row['dtype']}", row["side"], f"{float(row['seconds']):.1f}", sampling]
        assert "| " + " | ".join([*cells, f"{float(row['peak_gb']):.1f}"]) + " |" in RESULTS
    for row in rows_of("bench_logits"):
        cells = [f"{float(row['reverse_kl']):.4f}", f"{float(row['bf16_error']):.1%}"]
        assert "| " + " | ".join(cells) + " |" in RESULTS


def test_comparisons_are_what_compare_prints():
    """The tables and the claims, from the committed rows."""
    pair = ("full", "popd", "topd-0.1", "esr")
    shown = (("compare", compare.GROUPS["all"], 5), ("compare_closing", compare.GROUPS["closing"], 5))
    for name, arms, seeds in (*shown, ("compare_coder", pair, 1)):
        path = ROOT / "results" / f"{name}.csv"
        closing = name == "compare_closing"
        report = claims.format_results(claims.read(path), claims.read_curves(path), arms, seeds, closing)
        for line in report.splitlines():
            assert line.rstrip() in RESULTS, line


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("probe_*.csv")), ids=lambda path: path.stem)
def test_readings_are_what_the_probes_print(path):
    rows = figures.read_probe(path)
    assert not figures.missing_points(rows)
    assert figures.reading(rows) in RESULTS
