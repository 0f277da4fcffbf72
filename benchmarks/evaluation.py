"""What evaluation costs: grading, and sampling against the model's own `generate` on the same batches.

    python benchmarks/evaluation.py --model PATH --data FILE

Both sides run in this process, in turn, greedy, in the same batches; the answers must be the same. Rows are
added to results/bench_evaluation.csv.
"""

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import fast
import models
import report
from cli import BadInput, knob, parse, run
from eval_math import INSTRUCTION
from grading import Grader


@dataclass(frozen=True)
class Knobs:
    model: str = knob("", "hub name or folder; none: grading alone")
    data: str = knob("openai/gsm8k:main", "problems to sample answers to, and whose gold answers are graded")
    problems: int = knob(32, "problems to sample answers to", 1)
    batch_size: int = knob(16, "answers sampled together", 1)
    max_new_tokens: int = knob(256, "longest answer", 1)
    answers: int = knob(10_000, "answers to grade: half right, half another problem's", 1)
    instruction: str = knob(INSTRUCTION, "text after each problem")
    seed: int = knob(0, "of the subset", 0)
    out: str = knob(str(ROOT / "results" / "bench_evaluation.csv"), "CSV file to which rows are added")


def time_grading(problems: list, n: int, seed: int) -> dict:
    rng = random.Random(seed)
    golds = [rng.choice(problems).answer for _ in range(n)]
    said = [gold if i % 2 else rng.choice(problems).answer for i, gold in enumerate(golds)]
    with Grader() as grader:
        started = time.perf_counter()
        verdicts = grader.grade([rf"So it is \boxed{{{answer}}}." for answer in said], golds)
        seconds = time.perf_counter() - started
    right = sum(v["correct"] for v in verdicts)
    return {"what": "grading", "n": n, "ours_s": seconds, "right": right}


def time_sampling(knobs: Knobs, problems: list) -> dict:
    """Seconds of this project's sampler and of `generate` for the same answers."""
    device = models.find_device("")
    tokenizer = models.load_tokenizer(knobs.model)
    model = models.load_model(knobs.model, getattr(torch, models.dtype_name("", device)), device)
    prompts = sorted(data.render(tokenizer, problems, knobs.instruction), key=len, reverse=True)
    ends, seconds, written = sorted(models.end_ids(tokenizer, model)), {"ours": 0.0, "generate": 0.0}, {}

    sampler = fast.sampler("", model)

    def ours(batch):
        ro = sampler(model, batch, knobs.max_new_tokens, set(ends), temperature=0)
        return [t[m].tolist() for t, m in zip(ro.tokens, ro.response_mask)]

    def generate(batch):
        width = max(map(len, batch))
        ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in batch], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
        how = {"do_sample": False, "max_new_tokens": knobs.max_new_tokens, "eos_token_id": ends}
        greedy = {"repetition_penalty": 1.0, "temperature": None, "top_p": None, "top_k": None}
        out = model.generate(ids, attention_mask=mask, pad_token_id=ends[0], **how, **greedy)[:, width:]
        rows = []
        for row in out.tolist():
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            rows.append(row[:stop])
        return rows

    batches = [prompts[i : i + knobs.batch_size] for i in range(0, len(prompts), knobs.batch_size)]
    ours(batches[0][:2]), generate(batches[0][:2])  # warm up
    for batch in batches:
        for name, side in (("ours", ours), ("generate", generate)):
            started = time.perf_counter()
            written[name] = written.get(name, []) + side(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - started
    lengths = torch.tensor([len(row) for row in written["ours"]], dtype=torch.float)
    same = sum(a == b for a, b in zip(written["ours"], written["generate"]))
    row = {"what": f"sampling, {Path(knobs.model).name}", "n": len(prompts), "ours_s": seconds["ours"]}
    row |= {"generate_s": seconds["generate"], "ratio": seconds["ours"] / seconds["generate"], "same": same}
    return row | {"mean_length": lengths.mean().item(), "length_sd": lengths.std().item()}


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__, None))
    problems = data.read_problems(knobs.data, "test")
    if len(problems) < 2:
        raise BadInput(f"{knobs.data} has one problem: needs two or more")
    rows = [time_grading(problems, knobs.answers, knobs.seed)]
    if knobs.model:
        rows.append(time_sampling(knobs, data.subset(problems, knobs.problems, knobs.seed)))
    columns = (
        "what",
        "data",
        "n",
        "ours_s",
        "generate_s",
        "ratio",
        "same",
        "right",
        "mean_length",
        "length_sd",
    )
    hardware = report.environment(models.find_device(""))["hardware"]
    for row in rows:
        row |= {"data": Path(knobs.data).name, "hardware": hardware}
        print({name: value for name, value in row.items()})
        report.append_csv(Path(knobs.out), [{name: row.get(name, "") for name in (*columns, "hardware")}])


if __name__ == "__main__":
    run(main)
