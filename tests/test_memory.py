"""The estimate of --dry-run against what torch really keeps, and LoRA as the way to need less."""

import sys

import pytest
import torch
from conftest import pair_of, tiny
from transformers import AutoModelForCausalLM

import cli
import lora
import memory
import models
import train
from rollout import rollout

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]]
MIDDLE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_key_value_heads": 2}


def bytes_kept(model, tokens: int) -> int:
    """What autograd saves in a forward, weights aside: each storage once."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor keeps its place from reuse
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.get_decoder()(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_what_autograd_keeps(dtype, checkpointing):
    model = tiny(max_position_embeddings=512, **MIDDLE).to(dtype).train()
    shape = memory.Shape.of(model.config, dtype.itemsize)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    about = pytest.approx(shape.kept(256, checkpointing), rel=0.2 if checkpointing else 0.05)
    assert bytes_kept(model, 256) == about


def test_cache_and_parameters_are_counted_to_the_byte():
    model = tiny(**MIDDLE)
    out = model(input_ids=torch.ones(2, 7, dtype=torch.long), use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    shape = memory.Shape.of(model.config, 4)
    assert held == shape.cache(14) * shape.layers // (shape.layers + 1)
    assert memory.parameters(model.config, low_memory=False) == (model.num_parameters(),) * 2
    lora.add(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.parameters(tiny(**MIDDLE).config, low_memory=True) == (model.num_parameters(), learning)


def test_what_is_held_is_what_a_pair_and_adamw_hold():
    pair = pair_of(tiny(**MIDDLE), tiny(seed=1), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(pair.masters.values(), fused=True)
    ro = rollout(pair.student, PROMPTS, 5, pair.ends)
    train.update(pair, optimizer, ro, train.Knobs(), 0)
    knobs = train.Knobs(dtype="bfloat16", device="cpu")
    found = memory.estimate(knobs, pair.student.config, pair.teacher.config, 5, 5)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())
    assert found["AdamW"] == state
    assert found["student weights"] == sum(p.nbytes for p in pair.student.parameters())
    assert found["teacher weights"] == sum(p.nbytes for p in pair.teacher.parameters())
    assert found["fp32 masters"] == found["gradients"] == sum(p.nbytes for p in pair.masters.values())


def test_knobs_that_save_memory_do():
    def peak(horizon=900, **knobs):
        config = tiny(**MIDDLE | {"vocab_size": 5000}).config
        knobs = train.Knobs(**({"dtype": "bfloat16", "device": "cuda"} | knobs))
        return memory.estimate(knobs, config, config, 100, horizon)["peak"]

    assert peak() < peak(checkpointing=False) and peak(horizon=90) < peak()
    assert peak(low_memory=True) < peak() and peak(micro_batch=1000) < peak()


def test_dry_run_estimates_and_writes_nothing(world, tmp_path, monkeypatch, capsys):
    for free, said in ((1 << 40, ": fits"), (1 << 10, "does not fit: lower --micro-batch")):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(
            sys, "argv", ["train.py", "--preset", "toy", "--dry-run", "--out", f"{tmp_path}/run"]
        )
        train.main()
        assert said in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def lora_pair(dtype):
    student = tiny()
    lora.add(student)
    return pair_of(student, tiny(seed=1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_moves_the_adapters_alone_and_is_merged_when_saved(dtype, tmp_path):
    pair, plain = lora_pair(dtype), tiny()
    assert all(".lora_" in name and m.dtype == torch.float32 for name, m in pair.masters.items())
    assert len(pair.masters) == 2 * 7 * 2  # A and B of seven linear layers in two layers
    optimizer = torch.optim.AdamW(pair.masters.values(), weight_decay=0, fused=True)
    ro = rollout(pair.student, PROMPTS, 8, pair.ends)
    for step in range(3):
        train.update(pair, optimizer, ro, train.Knobs(lr=0.05, steps=3), step)
    for name, weight in pair.student.named_parameters():
        if ".lora_" not in name:
            original = plain.get_parameter(name.replace(".base_layer", ""))
            assert torch.equal(weight, original.to(dtype)), name
    pair.student.generation_config.eos_token_id = 3
    pair.student.save_pretrained(tmp_path, state_dict=lora.merged(pair.student))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs, ours = (m.eval()(input_ids=ids).logits.float() for m in (loaded, pair.student))
    assert torch.allclose(theirs, ours, atol=1e-4 if dtype == torch.float32 else 0.2)
    assert not torch.allclose(theirs, plain(input_ids=ids).logits, atol=0.5)  # and it has moved


def test_lora_learns_the_toy(world, tmp_path, monkeypatch):
    """40 steps of adapters alone: reverse KL falls to less than half."""
    monkeypatch.setattr(
        sys,
        "argv",
        f"train.py --preset toy --low-memory --schedule esr --horizon 8 --steps 15 --lr 1e-2 --eval-limit 0 "
        f"--save-every 15 --show-every 0 --out {tmp_path}/run".split(),
    )
    train.main()
    rows = train.report.read_csv(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["reverse_kl"]) < 0.5 * float(rows[0]["reverse_kl"])
    checkpoint = (tmp_path / "run" / "checkpoint-000015.safetensors").stat().st_size
    student = models.load_model(str(tmp_path / "run" / "student"), torch.float32, torch.device("cpu"))
    assert checkpoint < 40 * student.num_parameters() and not any("lora" in n for n in student.state_dict())


def test_low_memory_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(cli.BadInput, match="pip install peft"):
        lora.add(tiny())


def test_a_low_memory_run_has_its_own_learning_rate():
    import prepare

    chosen = [
        prepare.settings(train.Knobs, given)[0].lr
        for given in (
            {"preset": "qwen", "device": "cpu"},
            {"preset": "qwen", "device": "cpu", "low_memory": True},
            {"preset": "qwen", "device": "cpu", "low_memory": True, "lr": 1e-4},
        )
    ]
    assert chosen == [train.Knobs.lr, prepare.LOW_MEMORY["lr"], 1e-4]


def test_adapters_do_not_hang_on_what_was_drawn_before():
    """A run that is killed before its first checkpoint starts anew, with the same ones."""
    drawn = []
    for seed in (1, 2):
        student = tiny()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        lora.add(student)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append({n: w.clone() for n, w in student.named_parameters() if ".lora_" in n})
    assert all(torch.equal(drawn[1][name], w) for name, w in drawn[0].items())


def test_a_low_memory_run_resumes_to_the_bit(world, tmp_path, monkeypatch):
    def run(flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
        train.main()

    how = "--preset toy --low-memory --schedule esr --horizon 8 --lr 1e-2 --decay constant --warmup 0"
    how += " --eval-limit 0 --show-every 0 --batch-size 4 --save-every 2"
    run(f"{how} --steps 4 --out {tmp_path}/whole")
    run(f"{how} --steps 2 --out {tmp_path}/parts")
    run(f"--resume {tmp_path}/parts --steps 4")
    whole, parts = (
        models.load_model(str(tmp_path / name / "student"), torch.float32, torch.device("cpu")).state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
