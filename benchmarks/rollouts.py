"""Sampling alone: Hugging Face's `generate`, the plain sampler and the fast one, on the same prompts.

    python benchmarks/rollouts.py --model PATH --data FILE              lengths spread out: rows end early
    python benchmarks/rollouts.py --model PATH --data FILE --every 0    all rows run to the last token

Each side is a process of its own; a first call warms up, the fastest of the others counts. `--random` fills
the model's shape with random weights: enough for speed alone. Rows go to results/bench_rollouts.csv.
Bandwidth is what the side reads of weights in a second, beside what a plain sum reaches on this machine.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sides import ROOT, flags_of, measure_apart, peak_memory, peak_reserved  # puts the project on the path
from transformers import AutoConfig, AutoModelForCausalLM

import data
import fast
import models
import report
from cli import knob, parse, run
from eval_math import INSTRUCTION
from rollout import rollout

SIDES = ("generate", "plain", "fast")


@dataclass(frozen=True)
class Knobs:
    model: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder")
    random: bool = knob(False, "random weights in the model's shape")
    data: str = knob("openai/gsm8k:main", "problems; its train split")
    sides: tuple[str, ...] = knob((), "may be given several times; default: all", choices=SIDES)
    rows: int = knob(16, "prompts sampled together", 1)
    tokens: int = knob(256, "the horizon", 1)
    every: int = knob(
        64, "every so manieth id ends an answer, so that lengths are spread out; 0: none does", 0
    )
    repeats: int = knob(2, "the fastest counts", 1)
    dtype: str = knob("bfloat16", "of weights and matmuls", choices=("float32", "bfloat16"))
    device: str = knob("cpu", "cpu or cuda")
    seed: int = knob(0, "of the prompts and the sampling", 0)
    side: str = knob("", "measure this side in this process and print it as JSON", choices=SIDES)
    out: str = knob(str(ROOT / "results" / "bench_rollouts.csv"), "CSV file to which rows are added")


def by_generate(model, prompts: list[list[int]], horizon: int, ends: set[int]) -> list[int]:
    """Lengths of the responses, end tokens included."""
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    law = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    law |= {"eos_token_id": sorted(ends), "pad_token_id": 0, "max_new_tokens": horizon}
    tokens = model.generate(ids, attention_mask=mask, **law)[:, width:]
    ended = torch.isin(tokens, torch.tensor(sorted(ends), device=device)).long()
    return (ended.cumsum(1) - ended == 0).sum(1).tolist()


def read_bandwidth(device: torch.device) -> float:
    """Bytes read a second by a sum over 1 GB."""
    numbers, best = torch.ones(1 << 28, device=device), 0.0
    for _ in range(4):
        started = time.perf_counter()
        numbers.sum().item()
        best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best


def measure(knobs: Knobs) -> dict:
    """One side, in this process."""
    device, dtype = models.find_device(knobs.device), getattr(torch, knobs.dtype)
    if knobs.random:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(knobs.model), dtype=dtype)
        model = model.to(device).eval()
    else:
        model = models.load_model(knobs.model, dtype, device)
    problems = data.subset(data.read_problems(knobs.data, "train"), knobs.rows, knobs.seed)
    prompts = data.render(models.load_tokenizer(knobs.model), problems, INSTRUCTION)
    vocab = model.config.get_text_config().vocab_size
    ends = set(range(0, vocab, knobs.every)) if knobs.every else {vocab}
    sampler, rows = fast.Sampler() if knobs.side == "fast" else rollout, []
    for _ in range(knobs.repeats + 1):
        torch.manual_seed(knobs.seed)
        generator = torch.Generator(device).manual_seed(knobs.seed)
        started = time.perf_counter()
        if knobs.side == "generate":
            lengths = by_generate(model, prompts, knobs.tokens, ends)
        else:
            ro = sampler(model, prompts, knobs.tokens, ends, generator=generator)
            lengths = ro.response_mask.sum(1).tolist()
        if device.type == "cuda":
            torch.cuda.synchronize()
        row = {"seconds": time.perf_counter() - started, "response_tokens": sum(lengths)}
        row |= {"shortest": min(lengths), "longest": max(lengths)}
        rows.append(row | {"tokens_per_s": sum(lengths) / row["seconds"]})
    best = max(rows[1:], key=lambda row: row["tokens_per_s"])
    weights = sum(p.nbytes for p in model.parameters())
    best |= {
        "peak_gb": peak_memory(device) / 1e9,
        "reserved_gb": peak_reserved(device),
    }  # read_bandwidth takes 1 GB
    best["weights_gb_per_s"] = best["longest"] * weights / best["seconds"] / 1e9
    return best | {"read_gb_per_s": read_bandwidth(device) / 1e9}


def main() -> None:
    given = parse(Knobs, __doc__, None)
    knobs = Knobs(**given)
    if knobs.side:
        print(json.dumps(measure(knobs)))
        return
    flags = flags_of(given)
    for side in knobs.sides or SIDES:
        row = measure_apart(__file__, side, flags)
        print(side, row, flush=True)
        what = {"model": Path(knobs.model).name, "dtype": knobs.dtype, "rows": knobs.rows}
        what |= {"tokens": knobs.tokens, "every": knobs.every, "side": side}
        hardware = {"hardware": report.environment(torch.device(knobs.device))["hardware"]}
        report.append_csv(Path(knobs.out), [what | row | hardware])


if __name__ == "__main__":
    run(main)
