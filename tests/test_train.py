"""The loop: gradients that do not depend on batching, and runs on the toy world from the command line."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, END, V, load_pair, pair_of, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
import rollout as sampling
import train
from rollout import hidden_states, micro_batches, model_inputs, rollout, sampling_noise
from support import cli, data, models
from support.models import enable_checkpointing
from support.prompts import render
from support.run import Run

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]] * 2
KNOBS = train.Knobs(steps=3, batch_size=4, lr=1e-3, show_every=0, eval_limit=0, micro_batch=40)


def small_rollouts(pair, horizon=9):
    noise = sampling_noise(range(len(PROMPTS)), horizon)
    return rollout(pair.student, PROMPTS, horizon, pair.eos_ids, noise)


def gradient(pair, rollouts, micro_batch=40, **options):
    for master in pair.masters.values():
        master.grad = None
    loss, tokens = train.score(pair, rollouts, micro_batch=micro_batch, **options)
    return loss, tokens, torch.cat([p.grad.flatten() for p in pair.masters.values()])


def run_training(pair, knobs=KNOBS, prompts=PROMPTS, horizon=9, **options):
    """`train.train` in memory: the rows of its log."""
    run = Run(pair.student.device)
    train.train(pair, train.adamw(pair, knobs), prompts, lambda step: horizon, knobs, run, **options)
    return run.rows


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(divergence):
    pair = pair_of(tiny(), tiny())
    divergence = opd.DIVERGENCES[divergence]
    loss, tokens, grad = gradient(pair, small_rollouts(pair), micro_batch=999, divergence=divergence)
    assert abs(loss) < 1e-6 and grad.abs().max() == 0
    assert tokens["agreement"].mean() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_equal_to_the_student_does_not_move_it(dtype):
    pair = pair_of(tiny(), tiny(), dtype)
    before = {name: p.detach().clone() for name, p in pair.masters.items()}
    run_training(pair)
    assert all(torch.equal(p, before[name]) for name, p in pair.masters.items())


@pytest.mark.parametrize("divergence", opd.DIVERGENCES)
def test_micro_batches_do_not_change_the_gradient(divergence):
    """A mean per micro-batch is not the mean over the step's tokens when lengths differ."""
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    rollouts = small_rollouts(pair)
    assert len(set(rollouts.response_mask.sum(1).tolist())) > 1 and len(micro_batches(rollouts, 28)) >= 3
    divergence = opd.DIVERGENCES[divergence]
    whole, _, one = gradient(pair, rollouts, 999, divergence=divergence)
    parts, _, several = gradient(pair, rollouts, 28, divergence=divergence)
    assert whole == pytest.approx(parts, abs=1e-5)
    assert (one - several).norm() < 1e-5 * one.norm()


def test_the_loss_is_the_token_weighted_mean_of_rows_scored_alone():
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    rollouts = small_rollouts(pair)
    total = 0.0
    for prompt, tokens, mask in zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask):
        ids = torch.tensor([prompt + tokens[mask].tolist()], device=DEVICE)
        logits = [m(input_ids=ids).logits[0, len(prompt) - 1 : -1] for m in (pair.student, pair.teacher)]
        p, q = (x.log_softmax(-1) for x in logits)
        total += F.kl_div(q, p, log_target=True, reduction="sum").item()
    loss, tokens, _ = gradient(pair, rollouts)
    assert loss == pytest.approx(total / rollouts.response_mask.sum().item(), rel=1e-4)
    assert tokens["reverse_kl"].mean().item() == pytest.approx(loss, rel=1e-5)
    _, tokens, _ = gradient(
        pair, rollouts, divergence=opd.sampled_reverse_kl
    )  # the exact KL is logged as well
    assert tokens["reverse_kl"].mean().item() == pytest.approx(loss, rel=1e-5)


def test_prompt_tokens_are_not_in_the_loss():
    """The loss stays when every hidden state that predicts no response token is replaced by noise."""
    pair = pair_of(tiny(), tiny(seed=1))
    rollouts = small_rollouts(pair)
    before, _, _ = gradient(pair, rollouts, 999)
    _, predicts = model_inputs(rollouts, micro_batches(rollouts, 999)[0], rollouts.response_mask)

    def replace_other_states(module, args, inputs, output):
        noise = torch.randn_like(output.last_hidden_state)
        output.last_hidden_state = torch.where(predicts[..., None], output.last_hidden_state, noise)
        return output

    hook = pair.student.get_decoder().register_forward_hook(replace_other_states, with_kwargs=True)
    after, _, grad = gradient(pair, rollouts, 999)
    hook.remove()
    assert after == before and grad.isfinite().all()


def test_the_teacher_runs_once_per_micro_batch():
    pair = pair_of(tiny(), tiny(seed=1))
    rollouts, calls = small_rollouts(pair), []
    pair.teacher.get_decoder().register_forward_hook(lambda *args: calls.append(1))
    gradient(pair, rollouts, 28)
    assert len(calls) == len(micro_batches(rollouts, 28)) >= 3


def test_a_mask_a_divergence_and_a_teacher_temperature():
    """What controls need: the loss of chosen tokens, of any function, against a sharpened teacher."""
    pair = pair_of(tiny(), tiny(seed=1))
    rollouts = small_rollouts(pair)
    mask = rollouts.response_mask & (torch.arange(rollouts.tokens.shape[1], device=DEVICE) < 2)

    def half(student_logp, teacher_logp, tokens):
        return 0.5 * opd.reverse_kl(student_logp, teacher_logp, tokens)

    loss, tokens, _ = gradient(pair, rollouts, loss_mask=mask, divergence=half, teacher_temperature=0.5)
    assert len(tokens["row"]) == mask.sum() and tokens["position"].max() == 1
    total = 0.0
    for prompt, ids, selected in zip(rollouts.prompts, rollouts.tokens, mask):
        text = torch.tensor([prompt + ids[selected].tolist()], device=DEVICE)
        logits = [m(input_ids=text).logits[0, len(prompt) - 1 : -1] for m in (pair.student, pair.teacher)]
        p, q = logits[0].log_softmax(-1), (logits[1] / 0.5).log_softmax(-1)
        total += 0.5 * F.kl_div(q, p, log_target=True, reduction="sum").item()
    assert loss == pytest.approx(total / mask.sum().item(), rel=1e-4)


def test_an_empty_mask_gives_a_finite_loss():
    pair = pair_of(tiny(), tiny(seed=1))
    rollouts = small_rollouts(pair)
    loss, tokens = train.score(pair, rollouts, torch.zeros_like(rollouts.response_mask))
    assert loss == 0 and len(tokens["row"]) == 0


def test_bf16_weights_keep_fp32_masters_that_a_tiny_step_moves():
    """Pure bf16 weights with AdamW at 1e-6 hardly move."""
    pair = pair_of(tiny(), tiny(seed=1), dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in pair.masters.items()}
    _, _, grad = gradient(pair, small_rollouts(pair))
    assert grad.dtype == torch.float32 and grad.isfinite().all()
    assert all(p.grad.abs().max() > 0 for n, p in pair.masters.items() if "k_proj.bias" not in n)
    torch.optim.AdamW(pair.masters.values(), lr=1e-6, weight_decay=0.0).step()
    for name, p in pair.masters.items():
        moved = (p != before[name])[p.grad.abs() > 1e-6]
        assert moved.float().mean() > 0.9, name
    pair.copy_masters_to_weights()
    weights = dict(pair.student.named_parameters())
    assert all(torch.equal(weights[n], p.bfloat16()) for n, p in pair.masters.items())
    assert all(weight.grad is None for weight in weights.values())


def test_bf16_gradients_are_summed_in_fp32():
    """32 micro-batches summed in bf16 would lose the small ones; each is rounded once, the sum is not."""
    pair = pair_of(tiny(), tiny(seed=1), dtype=torch.bfloat16)
    rollouts = small_rollouts(pair)
    whole, rows = gradient(pair, rollouts, 999)[2], gradient(pair, rollouts, 1)[2]
    assert (whole - rows).norm() < 0.02 * whole.norm()


def test_bf16_sampler_and_trainer_agree():
    pair = pair_of(tiny(initializer_range=0.1), tiny(seed=1), dtype=torch.bfloat16)
    rollouts = small_rollouts(pair)
    _, tokens, _ = gradient(pair, rollouts)
    difference = tokens["student_logp"] - rollouts.logp[tokens["row"], tokens["position"]]
    assert difference.abs().mean() < 0.05


def test_checkpointing_does_not_change_the_gradient():
    pair = pair_of(tiny(attention_dropout=0.5), tiny(seed=1))
    rollouts = small_rollouts(pair)
    plain = gradient(pair, rollouts)[2]
    enable_checkpointing(pair.student)
    assert torch.allclose(gradient(pair, rollouts)[2], plain, atol=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_the_learning_rate_reaches_its_peak_and_never_zero(warmup):
    """Warm-up times a cosine that had already begun never reached --lr."""
    rates = [train.learning_rate(k, 100, 1.0, warmup, "cosine") for k in range(100)]
    first = max(0, round(100 * warmup) - 1)
    assert max(rates) == rates[first] == 1.0 and rates[:first] == sorted(rates[:first]) and min(rates) > 0
    assert warmup == 1 or rates[first:] == sorted(rates[first:], reverse=True) and rates[-1] < 0.01
    if warmup == 0.1:
        assert rates[0] == pytest.approx(0.1)
        assert rates[55] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 0.5))
    assert train.learning_rate(99, 100, 1.0, warmup, "constant") == 1.0


def test_the_row_of_a_step_has_what_it_says():
    """Logged was a surrogate, or the learning rate of another step: recompute them."""
    pair = pair_of(tiny(), tiny(seed=1))
    rows = run_training(pair, train.replace(KNOBS, divergence="sampled", decay="constant", warmup=0.5))
    again = pair_of(tiny(), tiny(seed=1))
    indices = data.batch_indices(len(PROMPTS), 4, 0, 0)
    noise = sampling_noise([(0, 0, row) for row in range(4)], 9)
    rollouts = rollout(again.student, [PROMPTS[i] for i in indices], 9, again.eos_ids, noise)
    loss, tokens, grad = gradient(again, rollouts, divergence=opd.sampled_reverse_kl)
    assert rows[0]["loss"] == pytest.approx(loss) and rows[0]["step"] == 0 and rows[0]["horizon"] == 9
    assert rows[0]["reverse_kl"] == pytest.approx(tokens["reverse_kl"].mean().item())
    assert rows[0]["grad_norm"] == pytest.approx(grad.norm().item(), rel=1e-5)
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3]
    assert rows[0]["response_tokens"] == rollouts.response_mask.sum()
    assert {"rollout_s", "score_s", "update_s", "seconds", "truncated"} <= rows[0].keys()
    assert not {"row", "position"} & rows[0].keys()


def test_training_accepts_rollouts_made_elsewhere_and_a_mask():
    """Supervised training on given answers: their likelihood rises; the mask is that of the step."""
    pair = pair_of(tiny(), tiny(seed=1))
    answers = train.replace(small_rollouts(pair_of(tiny(seed=1), tiny())), logp=None)
    scored = []

    def first_half(pair, rollouts, **settings):
        mask = torch.arange(rollouts.tokens.shape[1], device=DEVICE).expand_as(rollouts.tokens) < 5
        loss, statistics = train.score(pair, rollouts, mask, **settings)
        scored.append(statistics["position"])
        return loss, statistics

    sampled = {"sampler": lambda *args, **options: answers, "scorer": first_half}
    rows = run_training(pair, train.replace(KNOBS, steps=8, lr=1e-2, divergence="nll"), **sampled)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and torch.cat(scored).max() == 4
    assert rows[0]["student_logp"] == pytest.approx(-rows[0]["loss"], rel=1e-4)


def test_a_non_finite_gradient_stops_before_the_update(monkeypatch):
    pair = pair_of(tiny(), tiny(seed=1))
    before = {name: p.detach().clone() for name, p in pair.masters.items()}

    def infinite(student_logp, teacher_logp, tokens):
        return student_logp.sum(-1) * torch.inf

    monkeypatch.setitem(opd.DIVERGENCES, "reverse_kl", infinite)
    with pytest.raises(cli.Stopped, match="step 0 has loss"):
        run_training(pair)
    assert all(torch.equal(p, before[name]) for name, p in pair.masters.items())


def forgets(model, length):
    """Make cached passes see the last token alone, as if the cache was ignored; prompts have `length` ids."""
    forward = model.forward

    def forgetful(*args, attention_mask=None, cache=None, **kwargs):
        if cache is not None and attention_mask.shape[1] > length:
            attention_mask = attention_mask.clone()
            attention_mask[:, :-1] = 0
        return forward(*args, attention_mask=attention_mask, cache=cache, **kwargs)

    model.forward = forgetful


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_of_another_distribution_is_refused_before_the_first_update(dtype):
    pair = pair_of(tiny(), tiny(seed=1), dtype)
    before = {name: p.detach().clone() for name, p in pair.masters.items()}
    forgets(pair.student, length=5)
    with pytest.raises(cli.BadInput, match="Qwen2ForCausalLM samples from another distribution"):
        run_training(pair)
    assert all(torch.equal(p, before[name]) for name, p in pair.masters.items())


def test_a_sampler_that_is_wrong_beyond_a_length_is_refused_once_the_horizon_reaches_it():
    """As one whose window or rotary embedding changes there."""
    pair = pair_of(tiny(), tiny(seed=1), ends=())
    forgets(pair.student, length=max(map(len, PROMPTS)) + 3)
    run = Run(pair.student.device)
    with pytest.raises(cli.BadInput, match="Qwen2ForCausalLM samples from another distribution"):
        train.train(pair, train.adamw(pair, KNOBS), PROMPTS, lambda step: 3 + 6 * step, KNOBS, run)
    assert len(run.rows) == 1


def test_a_step_has_one_pass_per_micro_batch_and_one_per_token():
    """Checking the sampler costs no pass of its own, at step 0 either."""
    pair = pair_of(tiny(), tiny(seed=1))
    calls = []
    pair.student.get_decoder().register_forward_hook(lambda *args: calls.append(1))
    rows = run_training(pair, replace(KNOBS, steps=1, micro_batch=999))
    assert len(calls) == 9 + 1 and rows[0]["truncated"] > 0


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.main()


@pytest.mark.usefixtures("curves")
def test_the_toy_student_learns(world, tmp_path, monkeypatch, capsys):
    """With a short horizon; a test of README's listing learns from full rollouts."""
    out, steps = tmp_path / "run", 36
    flags = f"--schedule topd --steps {steps} --batch-size 16 --preset toy".split()
    main(monkeypatch, *flags, "--eval-limit", 60, "--eval-every", 0, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert 0.15 <= summary["before"]["accuracy"] <= 0.45
    assert summary["teacher"]["accuracy"] >= 0.95
    assert summary["after"]["accuracy"] > 0.87
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    named = "step,horizon,reverse_kl,loss,response_tokens,response_length,truncated,grad_norm,lr"
    assert {*named.split(","), "rollout_s", "score_s", "update_s", "seconds", "accuracy"} <= set(rows[0])
    assert [int(row["step"]) for row in rows] == list(range(steps))
    assert summary["response_tokens"] == sum(int(row["response_tokens"]) for row in rows)
    config = json.loads((out / "config.json").read_text())
    assert config["schedule"] == "topd"
    assert {"torch", "transformers", "git_commit", "hardware"} <= set(config["environment"])
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "student after" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out / "student").config.vocab_size


@pytest.mark.skipif(DEVICE.type != "cpu", reason="attention's backward on a GPU sums in any order")
def test_two_runs_with_one_seed_are_the_same(world, tmp_path, monkeypatch):
    weights = []
    for name in "ab":
        main(monkeypatch, "--preset", "toy", "--steps", 3, "--eval-limit", 0, "--out", tmp_path / name)
        weights.append((tmp_path / name / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_what_is_read_is_what_runs(world, tmp_path, monkeypatch):
    """A default run samples with rollout.rollout and learns through opd.opd_backward, once a step each."""
    codes = {sampling.rollout.__wrapped__.__code__: 0, opd.opd_backward.__code__: 0}

    def count(frame, event, arg):
        if event == "call" and frame.f_code in codes:
            codes[frame.f_code] += 1

    sys.setprofile(count)
    try:
        main(monkeypatch, "--preset", "toy", "--steps", 2, "--eval-limit", 0, "--out", tmp_path / "run")
    finally:
        sys.setprofile(None)
    assert list(codes.values()) == [2, 2]


def test_student_and_teacher_get_one_rendering(world):
    """One prompt, rendered once: both models score the same ids."""
    pair = load_pair(world / "student", world / "teacher")
    inputs = {}
    for name in ("student", "teacher"):
        getattr(pair, name).get_decoder().register_forward_pre_hook(
            lambda m, a, kw, name=name: inputs.__setitem__(name, kw["input_ids"]), with_kwargs=True
        )
    prompts = render(pair.tokenizer, [data.Problem("x=1, then +2 fiftyone times", "3")], "", "")
    train.score(pair, rollout(pair.student, prompts, 5, pair.eos_ids, sampling_noise([0], 5)))
    assert torch.equal(inputs["student"], inputs["teacher"])
    assert inputs["student"][0, : len(prompts[0])].tolist() == prompts[0]


def test_the_teacher_may_be_on_another_device():
    """Ids go there, its hidden states come back, and its head is where the student's is."""
    seen = []

    class Teacher:
        device = torch.device("meta")

        def get_decoder(self):
            return lambda input_ids, use_cache: seen.append(input_ids.device) or states

    ids = torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    states = SimpleNamespace(last_hidden_state=torch.ones(2, 3, 4))
    assert hidden_states(Teacher(), ids).device == ids.device
    assert seen == [Teacher.device]
    pair = pair_of(tiny(), tiny(seed=1))
    assert pair.teacher_head.weight is pair.teacher.get_output_embeddings().weight  # no copy without need
    head = replace(pair.teacher_head, bias=torch.ones(V))
    moved = models.move_head(head, Teacher.device)
    assert moved.weight.device == moved.bias.device == Teacher.device
    assert replace(moved, weight=head.weight, bias=head.bias) == head


@pytest.mark.parametrize("device, bits", [("", ""), ("cpu", ""), ("", "8")])
def test_the_teachers_flags_are_the_teachers_alone(world, monkeypatch, device, bits):
    loaded = []

    def load_model(name, dtype, device, bits=""):
        loaded.append((Path(name).name, device, bits))
        return AutoModelForCausalLM.from_pretrained(name).eval()

    monkeypatch.setattr(models, "load_model", load_model)
    names = {"student": str(world / "student"), "teacher": str(world / "teacher")}
    knobs = train.Knobs(**names, teacher_device=device, teacher_bits=bits, dtype="float32")
    train.load_pair(knobs, torch.device("meta"))
    place = torch.device(device or "meta")
    assert loaded == [("student", torch.device("meta"), ""), ("teacher", place, bits)]


def test_a_larger_vocabulary_is_cut_to_the_shared_ids(tmp_path, world, capsys):
    """Qwen2.5 0.5B has 151,936 rows, 7B 152,064, one tokenizer: distributions are over the shared ids."""
    pair = pair_of(tiny(), tiny(seed=1, vocab_size=V + 7))
    assert pair.teacher_head(torch.randn(2, 16, device=DEVICE)).shape == (2, V)
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    model.resize_token_embeddings(model.config.vocab_size + 6)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path)
    pair = load_pair(world / "student", tmp_path)
    assert pair.vocab_size == pair.student.config.vocab_size
    assert capsys.readouterr().out.count("using the first") == 1


def test_every_eos_id_of_either_model_ends_a_response(world, tmp_path):
    """The teacher may end its answers with an id that the student's list lacks."""
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    model.generation_config.eos_token_id = [model.config.eos_token_id, 7]
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path)
    pair = load_pair(world / "student", tmp_path)
    assert 7 in pair.eos_ids and pair.student.generation_config.eos_token_id == sorted(pair.eos_ids)
