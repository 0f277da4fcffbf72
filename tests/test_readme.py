"""What README.md and RESULTS.md say must be so: files, commands, flags, figures."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import claims
import compare
import english
import gpu
import parts
import probe
import pytest
import steps
import torch
import words
from helpers import END, load_pair, pair_of, tiny
from torch.distributed import run as torchrun
from transformers import Qwen2Config

import eval_math
import train
from extras import memory
from rollout import pad_left, rollout, sampling_noise
from support import cli, data, run_folder
from support.prompts import render

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README, "RESULTS.md": RESULTS, "docs/running.md": RUNNING}


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


@pytest.fixture
def method() -> dict:
    """What README's listing of the whole method defines."""
    listing = next(
        code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "opd_loss" in code
    )
    namespace: dict = {}
    exec(listing, namespace)
    return namespace


def test_the_whole_method_has_the_loss_and_gradient_of_the_five_files(method):
    student, teacher = tiny(), tiny(seed=1)
    pair = pair_of(student, teacher)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]]
    rollouts = rollout(student, prompts, 9, {END, 27}, sampling_noise(range(4), 9))
    assert 0 < rollouts.finished.sum() < 4
    ids, mask = pad_left(prompts, torch.device("cpu"))
    ids = torch.cat([ids, rollouts.tokens], dim=1)
    loss = method["opd_loss"](student, teacher, ids, mask, rollouts.response_mask)
    loss.backward()
    theirs = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    ours, _ = train.score(pair, rollouts, micro_batch=20)
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in student.named_parameters():
        assert torch.allclose(weight.grad, theirs[name], rtol=1e-3, atol=1e-5), name


def test_the_whole_method_samples_what_it_says(method):
    prompts, mask = pad_left([[5, 6, 7], [8]] * 4, torch.device("cpu"))
    torch.manual_seed(0)
    ids, response_mask = method["rollout"](tiny(), prompts, mask, horizon=30, eos_id=END)
    assert ids.shape[1] == 3 + response_mask.shape[1]
    for response, kept in zip(ids[:, 3:].tolist(), response_mask.tolist()):
        length = response.index(END) + 1 if END in response else len(response)
        assert kept == [i < length for i in range(len(kept))]
    assert not response_mask.all()


def test_the_whole_method_learns_on_the_toy(method, world):
    pair = load_pair(world / "student", world / "teacher")
    prompts = render(pair.tokenizer, data.read_problems(str(world), "train"), "")
    batches = [pad_left(prompts[i : i + 16], torch.device("cpu")) for i in range(0, 16 * 12, 16)]
    eos_id = pair.tokenizer.eos_token_id
    torch.manual_seed(0)

    def loss() -> float:
        ids, response_mask = method["rollout"](pair.student, *batches[0], horizon=6, eos_id=eos_id)
        return method["opd_loss"](pair.student, pair.teacher, ids, batches[0][1], response_mask).item()

    before = loss()
    method["train"](pair.student, pair.teacher, batches, horizon=6, eos_id=eos_id, lr=1e-3)
    assert loss() < 0.3 * before


@pytest.mark.parametrize("name", TEXTS)
def test_flags_exist(name):
    classes = [train.Knobs, eval_math.Knobs, compare.Knobs, steps.Knobs, parts.Knobs, gpu.Knobs, words.Knobs]
    classes += [english.Knobs, probe.Knobs]
    flags = {cli.flag_of(f.name) for knobs in classes for f in dataclasses.fields(knobs)}
    flags |= {"--no-checkpointing", "--no-shard", "--help", "--slow"}
    flags |= set(re.findall(r"--[a-z-]+", torchrun.get_args_parser().format_help()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXTS[name])) <= flags


@pytest.mark.parametrize("name", TEXTS)
def test_files_exist(name):
    for link, script in re.findall(r"\]\(([^)]+)\)|python (\S+\.py)", TEXTS[name]):
        folder = (ROOT / name).parent if link else ROOT
        assert (folder / (link or script)).exists(), link or script


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
    assert len(rows) >= 5 and "estimated |" in RESULTS
    for device, flags, horizon, peak in rows:
        knobs = train.Knobs(**{"dtype": "bfloat16"} | cli.parse(train.Knobs, "", flags.split()))
        found = memory.estimate(knobs, *configs, 256, int(horizon))["peak"] / 1e9
        assert f"{found:.1f}" == peak and found < 0.94 * int(device)


GPU_STEPS = {
    "ours-graphs": "`--sampler graphs`",
    "ours-checkpointing": "the plain sampler",
    "ours-low-memory": "`--low-memory`, the plain sampler",
    "naive": "naive loop",
    "autocast": "fp32 weights under autocast, the plain sampler",
}
GPU_FLAGS = {
    "ours-graphs": "`--sampler graphs`",
    "ours-checkpointing": "(none)",
    "ours-low-memory": "`--low-memory`",
}
GPU_SAMPLERS = {"plain": "plain", "graphs": "graphs", "continuous": "transformers' continuous batching"}


def test_gpu_tables():
    speeds = {}
    for row in rows_of("gpu"):
        value = {name: float(text) for name, text in row.items() if re.fullmatch(r"[\d.e-]+", text)}
        side = row["side"]
        if row["part"] == "steps":
            scoring = value.get("score_s", value["seconds"] - value["rollout_s"])
            cells = [value["seconds"], value["rollout_s"], scoring, value["peak_gb"]]
            numbers = " | ".join(f"{cell:.1f}" for cell in cells)
            assert f"\n| {GPU_STEPS[side]} | {row['tokens']} | {numbers} |\n" in RESULTS
        elif row["tokens"] == "512":
            speeds.setdefault(side, []).append(value)
        if "estimate_gb" in value:
            names = ("peak_gb", "estimate_tensors_gb", "reserved_gb", "device_gb", "estimate_gb")
            numbers = " | ".join(f"{value[name]:.2f}" for name in names)
            assert f"\n| {GPU_FLAGS[side]} | {row['tokens']} | {numbers} |\n" in RESULTS
    for side, (few, many) in speeds.items():
        star = "" if "seconds" in many else " *"  # a first call alone
        numbers = f"{few['tokens_per_s']:,.0f} | {many['tokens_per_s']:,.0f}{star} | {many['peak_gb']:.1f}"
        assert f"\n| {GPU_SAMPLERS[side]} | {numbers} |\n" in RESULTS


def test_evaluation_tables():
    for row in rows_of("real_eval"):
        interval = f"{float(row['low']):.1%} to {float(row['high']):.1%}"
        cells = [row["n"], f"{float(row['accuracy']):.1%}", interval, f"{float(row['truncated']):.1%}"]
        assert f"| {row['model']} | {row['benchmark']} | " + " | ".join(cells) + " |" in RESULTS
    for row in rows_of("real_learning_rates"):
        assert f"{float(row['reverse_kl']):.3f} +- {float(row['se']):.3f}" in RESULTS


def test_benchmark_tables():
    for row in rows_of("bench_loss"):
        cells = [f"{float(row['seconds']):.1f}", f"{float(row['peak_gb']):.1f}", f"{float(row['loss']):.6f}"]
        assert f"| {row['dtype']} | {row['side']} | " + " | ".join(cells) + " |" in RESULTS
    for row in rows_of("bench_allocator"):
        cells = [row["part"], row["side"], row["allocator"]]
        cells += [f"{float(row['seconds']):.1f}", f"{float(row['peak_gb']):.1f}"]
        assert "| " + " | ".join(cells) + " |" in RESULTS
    for row in rows_of("bench_steps"):
        tokens = f"{int(row['response_tokens']):,}" if row["response_tokens"] else "-"
        sampling = f"{float(row['rollout_s']):.1f}" if row["rollout_s"] else "-"
        cells = [f"{row['student']}, {row['dtype']}", row["side"], tokens, f"{float(row['seconds']):.1f}"]
        assert "| " + " | ".join([*cells, sampling, f"{float(row['peak_gb']):.1f}"]) + " |" in RESULTS
    earlier = {
        (row["student"], row["dtype"], row["side"]): f" {float(row['seconds']):.1f} s"
        for row in rows_of("bench_steps_earlier")
    }
    for pair in ("SmolLM2-135M", "Qwen2.5-Coder-0.5B"):
        assert f"{earlier[pair, 'bfloat16', 'ours']} (naive{earlier[pair, 'bfloat16', 'naive']}" in RESULTS
    for row in rows_of("bench_logits"):
        cells = [f"{float(row['reverse_kl']):.2g}", f"{float(row['bf16_error']):.1%}"]
        assert "| " + " | ".join(cells) + " |" in RESULTS


def test_families():
    counts = Counter(row["verdict"] for row in rows_of("families"))
    cells = f"{counts['right']} right, {counts['refused']} refused in one line, {counts['wrong']} wrong"
    assert f"| {sum(counts.values())} | {cells}; {counts['not built']} could not be made small |" in RESULTS


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


OF_PROBES = sorted(path for name in probe.PROBES for path in (ROOT / "results").glob(f"probe_{name}*.csv"))


@pytest.mark.parametrize("path", OF_PROBES, ids=lambda path: path.stem)
def test_readings_are_what_the_probes_print(path):
    assert probe.reading(run_folder.read_csv(path)) in RESULTS
