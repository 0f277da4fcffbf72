"""All that a run needs before its first step, looked at in an order in which bad input costs nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import data
import memory
import models
import report
import toy
from cli import BadInput
from eval_math import evaluate
from schedules import make_schedule
from scores import score

LOW_MEMORY = {"lr": 5e-5}  # ESR's, for LoRA
# What may be given with --resume. A run that grows has its learning rate and POPD's growth laid out anew.
SAFE = ("steps", "save_every", "eval_every", "show_every", "micro_batch", "checkpointing", "eval_batch")
SAFE += ("sampler", "dry_run")


def settings(knobs_class: type, given: dict) -> tuple[Any, Path]:
    """The knobs, those given over the preset's over the defaults, or a stopped run's; and the run folder."""
    if "resume" in given:
        knobs, folder = knobs_class(**report.resumed(knobs_class, given, SAFE)), Path(given["resume"])
    else:
        preset = given.get("preset") or ("qwen" if torch.cuda.is_available() else "toy")
        other = "toy" if preset == "qwen" else "qwen"
        print(f"preset {preset}; for the other one: --preset {other}", flush=True)
        of_preset = toy.preset(given.get("world", knobs_class.world)) if preset == "toy" else {}
        low = LOW_MEMORY if given.get("low_memory") else {}
        knobs = knobs_class(**(low | of_preset | given | {"preset": preset}))
        folder = report.new_folder(knobs.out, f"{preset}-{knobs.schedule}")
    dtype = models.dtype_name(knobs.dtype, models.find_device(knobs.device))
    return replace(knobs, dtype=dtype, eval_every=knobs.eval_every if knobs.eval_limit else 0), folder


def schedule(knobs) -> Callable[[int], int]:
    """The function step -> horizon; with --horizon auto, until it is known, that of the default one."""
    horizon = knobs.horizon
    if horizon == "auto":
        if knobs.schedule == "full":
            raise BadInput("--horizon auto chooses where to stop, and full does not stop: use esr or topd")
        horizon = None
    lengths = knobs.max_new_tokens, knobs.steps, horizon, knobs.popd_growth, knobs.popd_interval
    return make_schedule(knobs.schedule, *lengths)


def memory_of(knobs, horizon: int) -> str:
    """The estimate of `--dry-run`, from the configs, the tokenizer and the prompts alone. Raises BadInput.

    With --horizon auto that of its profile, which are full rollouts.
    """
    horizon = knobs.max_new_tokens if knobs.horizon == "auto" else horizon
    if knobs.preset == "toy":
        toy.build(knobs.world)
    problems, _ = data.train_and_test(knobs.data, knobs.eval_data, knobs.eval_limit, knobs.seed)
    tokenizer = models.load_tokenizer(knobs.student)
    prompts = data.render(tokenizer, problems, knobs.instruction, knobs.system_prompt)
    device = models.find_device(knobs.device)
    configs = [models.load(AutoConfig, name) for name in (knobs.student, knobs.teacher)]
    found = memory.estimate(replace(knobs, device=device.type), *configs, max(map(len, prompts)), horizon)
    return memory.tell(found, memory.free_memory(device))


def load(knobs, folder: Path) -> tuple[models.Pair, list[list[int]], Callable]:
    """The pair, the rendered prompts, and `grade(model, name)`, which gives a model's held-out score.

    Builds the toy world where it is asked for. Raises BadInput.
    """
    if knobs.preset == "toy":
        toy.build(knobs.world)
    device = models.find_device(knobs.device)
    problems, test = data.train_and_test(knobs.data, knobs.eval_data, knobs.eval_limit, knobs.seed)
    pair = models.load_pair(
        knobs.student, knobs.teacher, knobs.dtype, device, knobs.checkpointing, knobs.low_memory
    )
    prompts = data.render(pair.tokenizer, problems, knobs.instruction, knobs.system_prompt)
    asked = data.render(pair.tokenizer, test, knobs.instruction, knobs.system_prompt)
    models.check_context([pair.student, pair.teacher], prompts + asked, knobs.max_new_tokens)

    def grade(model, name: str) -> dict | None:
        size = memory.batch_that_fits(model, asked, knobs.max_new_tokens, knobs.eval_batch)
        how = folder / f"eval_{name}.jsonl", knobs.max_new_tokens, size, 1, knobs.seed
        law = {"temperature": knobs.eval_temperature}
        return score(evaluate(model, pair.tokenizer, asked, test, pair.ends, *how, **law))

    return pair, prompts, grade
