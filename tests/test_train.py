"""The loop: gradients that do not depend on the batching, and runs on the toy world from the command line."""

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import END, pair_of, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli
import data
import models
import report
import toy
import train
from rollout import rollout

ROOT = Path(train.__file__).parent
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]] * 2


def small_rollout(pair, horizon=9):
    return rollout(pair.student, PROMPTS, horizon, pair.ends, generator=torch.Generator().manual_seed(0))


def gradient(pair, ro, micro_batch, **knobs):
    for master in pair.masters.values():
        master.grad = None
    loss, stats, _ = train.score(pair, ro, train.Knobs(micro_batch=micro_batch, **knobs))
    return loss, stats, torch.cat([p.grad.flatten() for p in pair.masters.values()])


def test_teacher_equal_to_student_gives_no_loss_and_no_gradient():
    pair = pair_of(tiny(), tiny())
    loss, stats, grad = gradient(pair, small_rollout(pair), 999)
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-5
    assert stats["agreement"].mean() == 1


@pytest.mark.parametrize("divergence", train.DIVERGENCES)
def test_micro_batches_do_not_change_the_gradient(divergence):
    """A mean per micro-batch is not the mean over the step's tokens when lengths differ."""
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    ro = small_rollout(pair)
    assert len(set(ro.response_mask.sum(1).tolist())) > 1
    (whole, _, one), (parts, _, four) = (
        gradient(pair, ro, size, divergence=divergence) for size in (999, 28)
    )
    assert len(models.micro_batches(ro, 28)) >= 3
    assert whole == pytest.approx(parts, abs=1e-5)
    assert (one - four).norm() < 1e-5 * one.norm()


def test_loss_is_the_token_weighted_mean_of_rows_scored_alone():
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    ro = small_rollout(pair)
    total = 0.0
    for prompt, tokens, mask in zip(ro.prompts, ro.tokens, ro.response_mask):
        ids = torch.tensor([prompt + tokens[mask].tolist()])
        laws = [
            m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for m in (pair.student, pair.teacher)
        ]
        total += F.kl_div(laws[1], laws[0], log_target=True, reduction="sum").item()
    loss, stats, _ = gradient(pair, ro, 40)
    assert loss == pytest.approx(total / ro.response_mask.sum().item(), rel=1e-4)
    assert stats["reverse_kl"].mean().item() == pytest.approx(loss, rel=1e-5)
    sampled = gradient(pair, ro, 40, divergence="sampled")
    assert sampled[1]["reverse_kl"].mean().item() == pytest.approx(
        loss, rel=1e-5
    )  # logged: always the exact KL


def test_prompt_tokens_are_not_in_the_loss():
    """The loss stays when every hidden state that predicts no response token is replaced by noise."""
    pair = pair_of(tiny(), tiny(seed=1))
    ro = small_rollout(pair)
    before, _, _ = gradient(pair, ro, 999)
    _, predicts = models.sequences(ro, models.micro_batches(ro, 999)[0], ro.response_mask)

    def spoil(module, args, kwargs, out):
        noise = torch.randn_like(out.last_hidden_state)
        out.last_hidden_state = torch.where(predicts[..., None], out.last_hidden_state, noise)
        return out

    hook = pair.student.get_decoder().register_forward_hook(spoil, with_kwargs=True)
    after, _, grad = gradient(pair, ro, 999)
    hook.remove()
    assert after == before and grad.isfinite().all()


def test_the_teacher_runs_once_per_micro_batch():
    pair = pair_of(tiny(), tiny(seed=1))
    ro, calls = small_rollout(pair), []
    pair.teacher.get_decoder().register_forward_hook(lambda *args: calls.append(1))
    gradient(pair, ro, 28)
    assert len(calls) == len(models.micro_batches(ro, 28)) >= 3


def test_bf16_compute_keeps_fp32_masters_that_a_tiny_step_moves():
    """Pure bf16 weights with AdamW at 1e-6 hardly move. And a cast cached while sampling has no gradient."""
    pair = pair_of(tiny(), tiny(seed=1).bfloat16(), dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in pair.masters.items()}
    ro = small_rollout(pair)
    pair.student.train()
    _, _, grad = gradient(pair, ro, 40)
    assert grad.dtype == torch.float32 and grad.isfinite().all()
    assert all(p.grad.abs().max() > 0 for n, p in pair.masters.items() if "k_proj.bias" not in n)
    torch.optim.AdamW(pair.masters.values(), lr=1e-6, weight_decay=0.0).step()
    for name, p in pair.masters.items():
        moved = (p != before[name])[p.grad.abs() > 1e-6]
        assert moved.float().mean() > 0.9, name
    pair.publish()
    weights = dict(pair.student.named_parameters())
    assert all(
        torch.equal(weights[n], p.bfloat16()) and weights[n].grad is None for n, p in pair.masters.items()
    )


def test_bf16_micro_batches_add_up_in_fp32():
    """32 micro-batches summed in bf16 would lose the small ones; each is rounded once, the sum is not."""
    pair = pair_of(tiny(), tiny(seed=1), dtype=torch.bfloat16)
    ro = small_rollout(pair)
    whole, rows = gradient(pair, ro, 999)[2], gradient(pair, ro, 1)[2]
    assert (whole - rows).norm() < 0.02 * whole.norm()


def test_bf16_sampler_and_trainer_agree():
    pair = pair_of(tiny(initializer_range=0.1), tiny(seed=1), dtype=torch.bfloat16)
    ro = small_rollout(pair)
    _, stats, _ = gradient(pair, ro, 40)
    gap = stats["student_logp"] - ro.logp[stats["row"], stats["position"]]
    assert gap.abs().mean() < 0.05


def test_gradient_checkpointing_does_not_change_the_gradient():
    pair = pair_of(tiny(), tiny(seed=1))
    ro = small_rollout(pair)
    plain = gradient(pair, ro, 40)[2]
    pair.student.gradient_checkpointing_enable({"use_reentrant": False})
    pair.student.train()
    assert torch.allclose(gradient(pair, ro, 40)[2], plain, atol=1e-6)


def test_learning_rate():
    rates = [train.learning_rate(k, train.Knobs(steps=100, lr=1.0)) for k in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] and 0 < rates[-1] < 0.001
    assert train.learning_rate(99, train.Knobs(steps=100, lr=1.0, decay="constant")) == 1.0


def test_batches_repeat_by_seed_and_show_every_prompt_once_an_epoch():
    seen = [data.batch(10, 4, step, 7) for step in range(5)]
    assert (
        seen
        == [data.batch(10, 4, step, 7) for step in range(5)]
        != [data.batch(10, 4, k, 8) for k in range(5)]
    )
    flat = sum(seen, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert sorted(data.batch(3, 7, 0, 0)[:6]) == [0, 0, 1, 1, 2, 2]  # more than two epochs in one batch


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.main()


@pytest.mark.parametrize("flags", ["full", "popd", "topd", "esr --horizon 20"])
def test_the_toy_student_learns_with_every_schedule(world, tmp_path, monkeypatch, capsys, flags):
    out = tmp_path / "run"
    steps = 24 if flags in ("full", "popd") else 40  # the long rollouts learn in fewer
    flags = f"--schedule {flags} --steps {steps} --preset toy --eval-every 0 --eval-limit 60 --out".split()
    main(monkeypatch, *flags, out)
    summary = json.loads((out / "summary.json").read_text())
    assert 0.15 <= summary["before"]["accuracy"] <= 0.40
    assert summary["teacher"]["accuracy"] >= 0.95
    assert summary["after"]["accuracy"] > 0.90
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = "step,horizon,reverse_kl,loss,response_tokens,response_length,truncated,grad_norm,lr"
    assert {*named.split(","), "rollout_s", "score_s", "update_s", "seconds", "accuracy"} <= set(rows[0])
    assert [int(row["step"]) for row in rows] == list(range(steps))
    assert summary["response_tokens"] == sum(int(row["response_tokens"]) for row in rows)
    config = json.loads((out / "config.json").read_text())
    assert config["schedule"] == flags[1]
    assert {"torch", "transformers", "git_commit", "hardware"} <= set(config["environment"])
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "student after" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out / "student").config.vocab_size


def test_two_runs_with_one_seed_are_the_same(world, tmp_path, monkeypatch):
    weights = []
    for name in "ab":
        main(monkeypatch, "--preset", "toy", "--steps", 3, "--eval-limit", 0, "--out", tmp_path / name)
        weights.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_lines_break_at_newlines_alone(tmp_path):
    """U+2028 inside a JSON string ends no line: GSM8K has one, and str.splitlines breaks there."""
    path = tmp_path / "u.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "x #### 7"}\r\n\n', encoding="utf-8-sig")
    assert data.read_problems(str(path), "train") == [data.Problem("a\u2028b", "7")]


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_other_formats_read_alike(tmp_path, suffix):
    from datasets import Dataset

    table = Dataset.from_dict({"problem": ["a", "b"], "answer": ["1", "2"]})
    getattr(table, f"to_{suffix}")(tmp_path / f"p.{suffix}")
    assert data.read_problems(str(tmp_path / f"p.{suffix}"), "train") == [("a", "1"), ("b", "2")]


def test_not_finite_loss_stops_with_step_and_batch(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(cli.Stopped, match="step [1-9]"):
        main(
            monkeypatch, "--preset", "toy", "--lr", "1e30", "--clip", "1e30", "--eval-limit", 0, "--out", out
        )
    saved = json.loads((out / "not_finite.json").read_text())
    assert int(saved["step"]) >= 1 and len(saved["batch"]) == 32


def test_toy_answers(world):
    """The sound answer is right, the wrong one wrong, and Hugging Face reads the tokenizer as it was made."""
    recipe = toy.Recipe()
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    for problem in toy.all_problems(recipe)[:50]:
        for name in toy.WORLDS:
            (text, right), (_, wrong) = (toy.answer(*problem, name, sound) for sound in (True, False))
            start, add, times = problem
            assert right == (start + add * times) % 10 != wrong
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert 100 < len(tokenizer.encode(text)) < toy.PRESET["max_new_tokens"]


def test_student_and_teacher_see_one_rendering(world):
    """One prompt, rendered once: both models score the same ids."""
    pair = models.load_pair(
        str(world / "student"), str(world / "teacher"), "float32", torch.device("cpu"), checkpointing=False
    )
    seen = {}
    for name in ("student", "teacher"):
        getattr(pair, name).get_decoder().register_forward_pre_hook(
            lambda m, a, kw, name=name: seen.__setitem__(name, kw["input_ids"]), with_kwargs=True
        )
    prompts = data.render(pair.tokenizer, [data.Problem("x=1, then +2 fiftyone times", "3")], "", "")
    train.score(pair, rollout(pair.student, prompts, 5, pair.ends), train.Knobs())
    assert torch.equal(seen["student"], seen["teacher"])
    assert seen["student"][0, : len(prompts[0])].tolist() == prompts[0]


def test_shared_vocabulary_of_unequal_models(tmp_path, world, capsys):
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    model.resize_token_embeddings(model.config.vocab_size + 6)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path)
    device = torch.device("cpu")
    pair = models.load_pair(str(world / "student"), str(tmp_path), "float32", device, checkpointing=False)
    assert pair.vocab_size == pair.student.config.vocab_size
    assert capsys.readouterr().out.count("using the first") == 1


def test_gap_text_shows_a_character_of_two_tokens_once():
    class Tokenizer:
        def decode(self, tokens):
            return bytes(tokens.tolist()).decode(errors="replace")

    tokens = torch.tensor(list("aé!".encode()) + [0, 0])  # and padding
    text = report.gap_text(Tokenizer(), tokens, torch.tensor([0.0, -1.0, -2.0, 0.0]), colour=False)
    assert text == "a[-1.0]é[-2.0]!"


def test_horizon_auto_is_measured_said_and_kept(world, tmp_path, monkeypatch, capsys):
    """The toy's models part in the first words; the run folder holds the number, so a resumed run has it."""
    command = f"train.py --preset toy --horizon auto --eval-limit 0 --steps 2 --out {tmp_path}/run"
    monkeypatch.setattr(sys, "argv", command.split())
    train.main()
    said = re.search(
        r"horizon (\d+): the first \1 tokens hold 45 % of the reverse KL", capsys.readouterr().out
    )
    horizons = {int(row["horizon"]) for row in report.read_csv(tmp_path / "run" / "metrics.csv")}
    assert horizons == {int(said[1])} and 1 <= int(said[1]) < 12
    assert json.loads((tmp_path / "run" / "config.json").read_text())["horizon"] == int(said[1])
    monkeypatch.setattr(sys, "argv", f"train.py --resume {tmp_path}/run --steps 3".split())
    train.main()
    assert "a profile" not in capsys.readouterr().out


def test_a_horizon_of_one_token_is_not_all_of_them(monkeypatch):
    """--horizon 1 means the whole budget; where the whole gap is in the first token, one token is meant."""
    pair, knobs = pair_of(tiny(), tiny(seed=1)), train.Knobs(schedule="esr", horizon="auto", max_new_tokens=9)
    kl = {"reverse_kl": torch.tensor([1.0, 0.0, 1.0, 0.0]), "position": torch.tensor([0, 1, 0, 1])}
    stats = kl | {"row": torch.tensor([0, 0, 1, 1])}
    monkeypatch.setattr(train.profile_horizon, "measure", lambda *args, **kwargs: stats)
    horizon = train.profile_horizon.choose(train.score, pair, PROMPTS, knobs)
    assert train.prepare.schedule(replace(knobs, horizon=horizon))(0) == 1


def test_full_has_no_horizon_to_choose(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--preset", "toy", "--schedule", "full", "--horizon", "auto"]
    )
    with pytest.raises(cli.BadInput, match="full does not stop"):
        train.main()
