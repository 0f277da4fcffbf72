"""What a checkpoint costs: of the real 0.5B student against writing its bytes twice, and of a toy run.

    python benchmarks/checkpoints.py

The student has the real shapes and random weights. The toy's steps with and without a checkpoint every 10 are
timed in turn, in one process. Adds rows to results/bench_checkpoint.csv.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models
import prepare
import report
import train
from checkpoint import State
from rollout import rollout


def real_student() -> dict:
    sizes = {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    student = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    for weight in student.parameters():  # as after a step
        optimizer.state[weight] = {"step": torch.tensor(1.0), "exp_avg": weight.detach().clone()}
        optimizer.state[weight]["exp_avg_sq"] = weight.detach().clone()
    pair = models.make_pair(student, student, None, student.config.vocab_size, set(), torch.float32)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        state = State(Path(folder), pair, optimizer, torch.Generator(), 1, step=1)
        started = time.perf_counter()
        state.save()
        saved = time.perf_counter() - started
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        started = time.perf_counter()
        state.load(2)
        loaded = time.perf_counter() - started
        blocks = [weight.detach().numpy() for weight in student.parameters()]
        started = time.perf_counter()
        with open(Path(folder) / "plain", "wb") as file:
            while file.tell() < size:
                for block in blocks:
                    file.write(block)
            os.fsync(file.fileno())
        plain = (time.perf_counter() - started) * size / (Path(folder) / "plain").stat().st_size
    row = {"what": "real 0.5B student", "gb": size / 1e9, "seconds": saved, "plain_seconds": plain}
    return row | {"ratio": saved / plain, "load_seconds": loaded}


def toy_steps(rounds: int = 5) -> dict:
    """10 TOPD steps of the toy with and without the save at their end, in turn."""
    knobs, _ = prepare.settings(train.Knobs, {"preset": "toy", "eval_limit": 0})
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        pair, prompts, _ = prepare.load(knobs, Path(folder))
        optimizer = torch.optim.AdamW(pair.student.parameters(), fused=True)
        state = State(Path(folder), pair, optimizer, torch.Generator().manual_seed(0), 1)
        seconds = {True: [], False: []}
        for k in range(2 * rounds + 2):
            started = time.perf_counter()
            for _ in range(10):
                ro = rollout(pair.student, prompts[:32], 13, pair.ends, 1.0, pair.vocab_size, state.generator)
                pair.student.train()
                train.score(pair, ro, knobs)
                optimizer.step()
                optimizer.zero_grad()
                state.step += 1
            if k % 2:
                state.save()
            seconds[bool(k % 2)].append(time.perf_counter() - started)
    plain, saved = (min(seconds[way][1:]) for way in (False, True))
    return {
        "what": "10 toy steps and a save",
        "seconds": saved,
        "plain_seconds": plain,
        "ratio": saved / plain,
    }


def main() -> None:
    columns = ("what", "gb", "seconds", "plain_seconds", "ratio", "load_seconds", "hardware")
    hardware = report.environment(torch.device("cpu"))["hardware"]
    for row in (toy_steps(), real_student()):
        print(row, flush=True)
        rows = [{name: (row | {"hardware": hardware}).get(name, "") for name in columns}]
        report.append_csv(ROOT / "results" / "bench_checkpoint.csv", rows)


if __name__ == "__main__":
    main()
