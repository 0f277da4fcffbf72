"""One whole step, sampling, scoring and update: this project, the naive loop, and TRL's DistillationTrainer.

    pip install trl==1.16.0        # that side alone needs it
    python benchmarks/steps.py --student PATH --teacher PATH --data FILE --tokens 128

Each side is a process of its own with the same prompts; a first step warms up, the others' median counts.
Memory is the peak of the whole process: resident on a CPU, allocated on a GPU. For results/bench_steps.csv.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sides import (
    ROOT,
    flags_of,
    measure_apart,
    peak_memory,
    peak_reserved,
    reset_peak,
)  # puts the project on the path
from transformers import AutoConfig

import data
import fast
import memory
import models
import opd
import report
import train
from cli import BadInput, knob, parse, run
from eval_math import INSTRUCTION

OURS = {  # what differs from train.py's defaults
    "ours": {"checkpointing": False, "micro_batch": 8192},
    "ours-checkpointing": {"micro_batch": 8192},
    "ours-low-memory": {"low_memory": True, "micro_batch": 8192},
}
SIDES = (*OURS, "naive", "trl")


@dataclass(frozen=True)
class Knobs:
    student: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder")
    teacher: str = knob("Qwen/Qwen2.5-1.5B-Instruct", "hub name or folder")
    data: str = knob("openai/gsm8k:main", "problems; its train split")
    sides: tuple[str, ...] = knob((), "may be given several times; default: all", choices=SIDES)
    sampler: str = knob("", "of our sides, as train.py's", choices=("plain", "fast"))
    dtype: str = knob("bfloat16", "of matmuls", choices=("float32", "bfloat16"))
    prompts: int = knob(8, "a step", 1)
    tokens: int = knob(128, "the horizon", 1)
    steps: int = knob(3, "timed, after one that is not", 1)
    endless: bool = knob(False, "nothing ends an answer before the horizon")
    device: str = knob("cpu", "cpu or cuda")
    side: str = knob("", "measure this side in this process and print it as JSON", choices=SIDES)
    out: str = knob(str(ROOT / "results" / "bench_steps.csv"), "CSV file to which rows are added")


def ours(knobs: Knobs, prompts: list[list[int]]) -> list[dict]:
    device = models.find_device(knobs.device)
    how = train.Knobs(
        **OURS[knobs.side],
        lr=1e-6,
        sampler=knobs.sampler,
        batch_size=knobs.prompts,
        dtype=knobs.dtype,
        device=device.type,
    )
    configs = [AutoConfig.from_pretrained(name) for name in (knobs.student, knobs.teacher)]
    estimate = memory.estimate(how, *configs, max(map(len, prompts)), knobs.tokens)["peak"]
    memory_of = {"baseline_gb": reset_peak(device) / 1e9, "estimate_gb": estimate / 1e9}
    how_loaded = {"checkpointing": how.checkpointing, "low_memory": how.low_memory}
    pair = models.load_pair(knobs.student, knobs.teacher, knobs.dtype, device, **how_loaded)
    ends = {pair.vocab_size} if knobs.endless else pair.ends
    optimizer = torch.optim.AdamW(pair.masters.values(), lr=1e-6, weight_decay=0, fused=True)
    rng, rows, rollout = torch.Generator(device).manual_seed(0), [], fast.sampler(how.sampler, pair.student)
    reset_peak(device)  # loading has a peak of its own
    for _ in range(knobs.steps + 1):
        started = time.perf_counter()
        ro = rollout(pair.student, prompts, knobs.tokens, ends, 1.0, pair.vocab_size, rng)
        row = {"rollout_s": pair.seconds_since(started), "response_tokens": int(ro.response_mask.sum())}
        row |= train.update(pair, optimizer, ro, how, 0)[0] | memory_of
        rows.append(row | {"seconds": pair.seconds_since(started)})
    return rows


def naive(knobs: Knobs, prompts: list[list[int]]) -> list[dict]:
    """What one writes first: `generate`, full logits of both models, weights in the dtype of the matmuls."""
    dtype, device = getattr(torch, knobs.dtype), models.find_device(knobs.device)
    student = models.load_model(knobs.student, dtype, device)
    teacher = models.load_model(knobs.teacher, dtype, device).requires_grad_(False)
    ends = sorted(models.end_ids(models.load_tokenizer(knobs.student), student, teacher))
    if knobs.endless:
        ends = [student.config.get_text_config().vocab_size]
    optimizer, width = torch.optim.AdamW(student.parameters(), lr=1e-6), max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    law = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    law |= {"eos_token_id": ends, "pad_token_id": 0, "max_new_tokens": knobs.tokens}
    rows = []
    for _ in range(knobs.steps + 1):
        began = time.perf_counter()
        texts = student.generate(ids, attention_mask=mask, **law)
        sampled = time.perf_counter() - began
        tokens = texts[:, width:]
        ended = torch.isin(tokens, torch.tensor(ends, device=device)).long()
        keep = (ended.cumsum(1) - ended) == 0
        whole = torch.cat([mask, keep.long()], dim=1)
        student_logp = student(texts, attention_mask=whole).logits[:, width - 1 : -1].float().log_softmax(-1)
        with torch.no_grad():
            teacher_logp = (
                teacher(texts, attention_mask=whole).logits[:, width - 1 : -1].float().log_softmax(-1)
            )
        loss = (opd.reverse_kl(student_logp, teacher_logp, tokens) * keep).sum() / keep.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        row = {"rollout_s": sampled, "response_tokens": int(keep.sum())}
        rows.append(row | {"seconds": time.perf_counter() - began})
    return rows


def trl(knobs: Knobs, problems: list) -> list[dict]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    ends, rows = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            rows.append({"seconds": time.perf_counter() - ends[-1]})

    asked = [[{"role": "user", "content": p.question + INSTRUCTION}] for p in problems]
    with tempfile.TemporaryDirectory() as folder:
        bf16 = knobs.dtype == "bfloat16"
        config = DistillationConfig(
            output_dir=folder,
            use_cpu=knobs.device == "cpu",
            bf16=bf16,
            per_device_train_batch_size=len(asked),
            max_steps=knobs.steps + 1,
            max_completion_length=knobs.tokens,
            learning_rate=1e-6,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            teacher_model_init_kwargs={"dtype": knobs.dtype},
        )
        trainer = DistillationTrainer(
            model=knobs.student,
            teacher_model=knobs.teacher,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": asked}),
            callbacks=[Clock()],
        )
        trainer.train()
    return rows


def measure(knobs: Knobs) -> dict:
    problems = data.subset(data.read_problems(knobs.data, "train"), knobs.prompts, 0)
    prompts = data.render(models.load_tokenizer(knobs.student), problems, INSTRUCTION)
    if knobs.side == "trl":
        rows = trl(knobs, problems)
    elif knobs.side == "naive":
        rows = naive(knobs, prompts)
    else:
        rows = ours(knobs, prompts)
    found = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
    device = models.find_device(knobs.device)
    return found | {"peak_gb": peak_memory(device) / 1e9, "reserved_gb": peak_reserved(device)}


def main() -> None:
    given = parse(Knobs, __doc__, None)
    knobs = Knobs(**given)
    if knobs.side:
        print(json.dumps(measure(knobs)))
        return
    if knobs.endless and "trl" in (knobs.sides or SIDES):
        raise BadInput("--endless: side trl knows no such thing; name the others with --sides")
    columns = ("seconds", "rollout_s", "score_s", "update_s", "response_tokens", "peak_gb")
    columns += ("baseline_gb", "estimate_gb", "reserved_gb")
    flags = flags_of(given)
    for side in knobs.sides or SIDES:
        row = measure_apart(__file__, side, flags)
        print(side, row, flush=True)
        what = {
            "student": Path(knobs.student).name,
            "teacher": Path(knobs.teacher).name,
            "dtype": knobs.dtype,
        }
        what |= {"prompts": knobs.prompts, "tokens": knobs.tokens, "side": side}
        hardware = {"hardware": report.environment(torch.device(knobs.device))["hardware"]}
        report.append_csv(Path(knobs.out), [what | {c: row.get(c, "") for c in columns} | hardware])


if __name__ == "__main__":
    run(main)
