"""--low-memory: adapters alone are trained, merged when the student is saved, and resumed bit for bit."""

import sys

import pytest
import torch
from helpers import pair_of, tiny
from transformers import AutoModelForCausalLM

import train
from extras import lora
from rollout import rollout, sampling_noise
from support import models, run_folder
from support.cli import BadInput
from support.run import Run

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]]
CPU = torch.device("cpu")
ESR = "train.py --preset toy --low-memory --schedule esr --horizon 8 --lr 1e-3 --eval-limit 0 --show-every 0"


def main(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", command.split())
    train.main()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_alone_move_and_are_merged_when_saved(dtype, tmp_path):
    student, plain = tiny(), tiny()
    lora.add_adapters(student)
    pair = pair_of(student, tiny(seed=1), dtype)
    assert all(".lora_" in name and m.dtype == torch.float32 for name, m in pair.masters.items())
    assert len(pair.masters) == 2 * 7 * 2  # A and B of seven linear layers in two layers
    knobs = train.Knobs(lr=0.05, steps=3, decay="constant", warmup=0)
    noise = sampling_noise(range(4), 8)
    rollouts = rollout(pair.student, PROMPTS, 8, pair.eos_ids, noise)
    optimizer, run = train.adamw(pair, knobs), Run(CPU)
    train.train(
        pair, optimizer, PROMPTS, lambda step: 8, knobs, run, sampler=lambda *args, **options: rollouts
    )
    assert run.rows[2]["reverse_kl"] < run.rows[0]["reverse_kl"]
    for name, weight in pair.student.named_parameters():
        if ".lora_" not in name:
            original = plain.get_parameter(name.replace(".base_layer", ""))
            assert torch.equal(weight, original.to(dtype)), name
    pair.student.save_pretrained(tmp_path, state_dict=lora.merged(pair.student))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        trained, saved = (model.eval()(input_ids=ids).logits.float() for model in (pair.student, loaded))
        moved = (trained - plain(input_ids=ids).logits).norm()
        assert moved > 1
        assert (trained - saved).norm() < moved * (1e-5 if dtype == torch.float32 else 0.1)


def test_lora_learns_the_toy(world, tmp_path, monkeypatch):
    """The reverse KL falls to less than half; checkpoint and student hold what they should."""
    main(monkeypatch, f"{ESR} --steps 15 --save-every 15 --out {tmp_path}/run")
    rows = run_folder.read_csv(tmp_path / "run" / "metrics.csv")
    assert float(rows[-1]["reverse_kl"]) < 0.5 * float(rows[0]["reverse_kl"])
    checkpoint = (tmp_path / "run" / "checkpoint-000015.safetensors").stat().st_size
    student = models.load_model(str(tmp_path / "run" / "student"), torch.float32, CPU)
    assert checkpoint < 40 * student.num_parameters()
    assert not any("lora" in name for name in student.state_dict())


def test_a_low_memory_run_resumes_bit_for_bit(world, tmp_path, monkeypatch):
    command = f"{ESR} --decay constant --warmup 0 --batch-size 4 --save-every 2"
    main(monkeypatch, f"{command} --steps 4 --out {tmp_path}/whole")
    main(monkeypatch, f"{command} --steps 2 --out {tmp_path}/parts")
    main(monkeypatch, f"train.py --resume {tmp_path}/parts --steps 4")
    whole, parts = (tmp_path / name / "student" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_low_memory_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match="pip install peft, or drop"):
        lora.add_adapters(tiny())


def test_a_model_that_peft_refuses_is_one_line(monkeypatch):
    def refuse(config, model):
        raise ValueError("no target modules\nwere found")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    with pytest.raises(BadInput, match="adapters to Qwen2ForCausalLM .no target modules.: drop --low-memory"):
        lora.add_adapters(tiny())


def test_adapters_do_not_depend_on_the_global_generator():
    """A run that is killed before its first checkpoint starts again, with the same adapters."""
    drawn = []
    for seed in (1, 2):
        student = tiny()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        lora.add_adapters(student)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append({n: w.clone() for n, w in student.named_parameters() if ".lora_" in n})
    assert all(torch.equal(drawn[1][name], weight) for name, weight in drawn[0].items())
