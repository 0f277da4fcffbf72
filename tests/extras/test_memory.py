"""The estimate of --dry-run against what torch really keeps."""

import json
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from helpers import pair_of, tiny

import train
from extras import lora, memory
from rollout import hidden_states
from support import data, models
from support.batch_size import Shape
from support.run import Run

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]]
MIDDLE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_key_value_heads": 2}


def bytes_kept(model, tokens: int) -> int:
    """What autograd saves in a forward pass, without the weights: each storage once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # a tensor that lives keeps its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = hidden_states(model, torch.ones(1, tokens, dtype=torch.long))
    assert hidden.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_what_autograd_keeps(dtype, checkpointing):
    model = tiny(max_position_embeddings=512, **MIDDLE).to(dtype)
    shape = Shape.of(model.config, dtype.itemsize)
    if checkpointing:
        models.enable_checkpointing(model)
    estimate = memory.activation_bytes(shape, 256, checkpointing)
    assert bytes_kept(model, 256) == pytest.approx(estimate, rel=0.2 if checkpointing else 0.05)


def test_cache_and_parameters_are_counted_to_the_byte():
    model = tiny(**MIDDLE)
    output = model(input_ids=torch.ones(2, 7, dtype=torch.long), use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    shape = Shape.of(model.config, 4)
    assert held == shape.cache_bytes(14) * shape.layers // (shape.layers + 1)
    assert memory.parameters(model.config, low_memory=False) == (model.num_parameters(),) * 2
    lora.add_adapters(model)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert memory.parameters(tiny(**MIDDLE).config, low_memory=True) == (model.num_parameters(), trained)


def test_estimate_is_what_a_pair_and_adamw_hold():
    pair = pair_of(tiny(**MIDDLE), tiny(seed=1), dtype=torch.bfloat16)
    knobs = train.Knobs(steps=1, batch_size=4, dtype="bfloat16", device="cpu")
    optimizer = train.adamw(pair, knobs)
    train.train(pair, optimizer, PROMPTS, lambda step: 5, knobs, Run(torch.device("cpu")))
    found = memory.estimate(knobs, pair.student.config, pair.teacher.config, 5, 5)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert found["AdamW"] == state
    assert found["student weights"] == sum(weight.nbytes for weight in pair.student.parameters())
    assert found["teacher weights"] == sum(weight.nbytes for weight in pair.teacher.parameters())
    masters = sum(weight.nbytes for weight in pair.masters.values())
    assert found["fp32 masters"] == found["gradients"] == masters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("micro_batch", [40, 2000])  # several in a step, or one
def test_tensors_are_what_a_step_allocates(dtype, micro_batch, tmp_path):
    """At the peak the tied embedding's gradient and its fp32 copy stand beside the sum of the gradients."""
    wide = MIDDLE | {"vocab_size": 4000, "tie_word_embeddings": True}
    student, teacher = tiny(**wide), tiny(seed=1, **wide)
    models.enable_checkpointing(student)
    pair = pair_of(student, teacher, dtype, ends=(4000,))
    prompt, rows, horizon = 5, 4, 8
    knobs = train.Knobs(steps=2, batch_size=rows, dtype=str(dtype)[6:], micro_batch=micro_batch, device="cpu")
    optimizer = train.adamw(pair, knobs)
    held = {weight.data_ptr(): weight.nbytes for model in (student, teacher) for weight in model.parameters()}
    held |= {weight.data_ptr(): weight.nbytes for weight in pair.masters.values()}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        train.train(pair, optimizer, [[5] * prompt] * rows, lambda step: horizon, knobs, Run(CPU))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    measured = sum(held.values()) + max(accumulate(size for _, size in allocations))
    found = memory.estimate(knobs, student.config, teacher.config, prompt, horizon)
    assert 0.88 * found["tensors"] < measured < 1.02 * found["tensors"]


def peak(horizon=900, **changes):
    config = tiny(**MIDDLE | {"vocab_size": 5000}).config
    knobs = train.Knobs(**({"dtype": "bfloat16", "device": "cuda"} | changes))
    return memory.estimate(knobs, config, config, 100, horizon)["peak"]


def test_what_is_meant_to_save_memory_does():
    assert peak() < peak(checkpointing=False)
    assert peak(teacher_device="cpu") < peak(teacher_bits="4") < peak(teacher_bits="8") < peak()
    assert peak(teacher_device="cuda:0") == peak()
    assert peak(device="cpu") < peak() - memory.CONTEXT
    assert peak(horizon=90) < peak()
    assert peak(low_memory=True) < peak()
    assert peak(micro_batch=1000) < peak()


@pytest.mark.parametrize(
    "free, verdict", [(1 << 40, ": fits"), (1 << 10, "does not fit: lower --micro-batch")]
)
def test_dry_run_estimates_and_writes_nothing(world, tmp_path, monkeypatch, capsys, free, verdict):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    command = f"train.py --preset toy --dry-run --horizon auto --schedule esr --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", command.split())
    train.main()
    assert verdict in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("free, verdict", [(1 << 40, "fits"), (1 << 10, "does not fit: name another")])
def test_dry_run_looks_at_the_memory_of_the_teachers_device(world, monkeypatch, free, verdict):
    of_device = {"cpu": 1 << 40, "meta": free}
    monkeypatch.setattr(memory, "free_memory", lambda device: of_device[device.type])
    pair = {name: str(world / name) for name in ("student", "teacher")}
    knobs = train.Knobs(**pair, dtype="float32", teacher_device="meta", max_new_tokens=8)
    problems = [data.Problem("x=2", None)]
    text = memory.dry_run(knobs, problems, [], lambda step: 8, device=torch.device("cpu"))
    assert f"the teacher's weights on meta, 0.00 GB of {free / 1e9:.1f} GB free: {verdict}" in text
    assert "free: fits" in text.splitlines()[-2]
    here = memory.dry_run(
        replace(knobs, teacher_device=""), problems, problems, lambda step: 8, device=torch.device("cpu")
    )
    assert "the teacher's weights on" not in here
