"""The loss against oracles: enumeration, torch's own kl_div, autograd on unchunked logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import V, pair_of, tiny
from transformers import Gemma2Config, Gemma2ForCausalLM

import data
import models
import opd
import report

torch.manual_seed(0)
S, T = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)  # laws of student and teacher, 5 tokens


def head(v=40, d=8, seed=0, **changes):
    weight = torch.randn(v, d, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return opd.Head(**({"weight": weight, "bias": None, "softcap": None, "vocab_size": v} | changes))


def states(n=10, d=8, seed=0, grad=True):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), requires_grad=grad)


def test_reverse_kl_by_hand():
    """Public code had it the wrong way round: student (.5, .5), teacher (.75, .25), by hand."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert opd.reverse_kl(student, teacher, None).item() == pytest.approx(by_hand)
    backwards = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert opd.forward_kl(student, teacher, None).item() == pytest.approx(backwards)


def test_both_kls_are_torchs():
    assert torch.allclose(opd.reverse_kl(S, T, None), F.kl_div(T, S, log_target=True, reduction="sum"))
    assert torch.allclose(opd.forward_kl(S, T, None), F.kl_div(S, T, log_target=True, reduction="sum"))


def gradient_of(loss_of_logp) -> torch.Tensor:
    logits = S.clone().requires_grad_()
    loss_of_logp(logits.log_softmax(-1)).backward()
    return logits.grad


def test_sampled_estimator_has_the_exact_gradient_by_enumeration():
    """Summed over all 5 tokens with their probabilities, the estimator's gradient is reverse KL's."""

    def expected(logp):
        rows = opd.sampled_reverse_kl(logp.expand(5, 5), T.expand(5, 5), torch.arange(5))
        return (S.exp() * rows).sum()

    exact = gradient_of(lambda logp: opd.reverse_kl(logp, T, None))
    assert (gradient_of(expected) - exact).abs().max() < 1e-15


def test_tempting_estimators_are_wrong():
    """k1 as a loss has gradient 0 on average; k3 has forward KL's. Both were shipped as reverse KL."""
    k1 = gradient_of(lambda logp: (S.exp() * (logp - T)).sum())
    assert k1.abs().max() < 1e-15
    k3 = gradient_of(lambda logp: (S.exp() * ((T - logp).exp() - 1 - (T - logp))).sum())
    forward = gradient_of(lambda logp: opd.forward_kl(logp, T, None))
    assert (k3 - forward).abs().max() < 1e-15


def test_kl_of_a_law_to_itself_is_zero_and_never_negative():
    assert opd.reverse_kl(S, S, None).item() == 0
    laws = torch.randn(2, 1000, 50).log_softmax(-1)
    assert opd.reverse_kl(*laws, None).min() >= -1e-6


def test_forbidden_ids_give_no_nan():
    """0 * -inf is NaN: an id that both models forbid must add nothing, to value and gradient."""
    student, teacher = head(bias=torch.zeros(40)), head(seed=1, bias=torch.zeros(40))
    for h in (student, teacher):
        h.bias[-3:] = -torch.inf
    hidden = states()
    loss, _ = opd.opd_loss(
        (student, hidden), (teacher, states(seed=1, grad=False)), torch.zeros(10).long(), 10
    )
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("divergence", opd.DIVERGENCES)
@pytest.mark.parametrize(
    "changes", [{}, {"softcap": 3.0}, {"bias": torch.linspace(-1, 1, 40)}, {"vocab_size": 33}]
)
def test_chunked_equals_unchunked(divergence, changes):
    """Value, statistics and both gradients, against plain autograd on the whole (N, V) logits."""
    student, teacher = head(**changes), head(seed=1, **changes)
    tokens = torch.arange(10)
    hidden, other = states(), states(seed=1, grad=False)
    loss, stats = opd.opd_loss((student, hidden), (teacher, other), tokens, 7, divergence, 0.8, chunk=40)
    grads = torch.autograd.grad(loss, (hidden, student.weight))

    def logp(h, x):
        logits = x @ h.weight.T + (0 if h.bias is None else h.bias)
        logits = logits if h.softcap is None else h.softcap * torch.tanh(logits / h.softcap)
        return (logits[:, : h.vocab_size] / 0.8).log_softmax(-1)

    student_logp, teacher_logp = logp(student, hidden), logp(teacher, other).detach()
    plain = opd.DIVERGENCES[divergence](student_logp, teacher_logp, tokens).sum() / 7
    assert torch.allclose(loss, plain, rtol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(plain, (hidden, student.weight))):
        assert torch.allclose(ours, theirs, atol=1e-5)
    exact = F.kl_div(teacher_logp, student_logp, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(stats["reverse_kl"], exact, atol=1e-5)


def test_never_more_than_one_chunk_of_logits():
    """[batch, T, 151936] logits of both models at once ran out of memory: watch what is allocated."""
    laws, wide = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 40:
                wide.append(len(out))
                laws.extend([len(out)] if "log_softmax" in str(func) else [])
            return out

    both = (head(), states(100)), (head(seed=1), states(100, seed=1, grad=False))
    with Watch():
        opd.opd_loss(*both, torch.zeros(100).long(), 100, chunk=4 * 40)[0].backward()
    assert len(laws) >= 2 * 25 and max(laws) == 4
    assert max(wide) == 8 * 4  # the gradient of a block of 8 chunks


@pytest.mark.parametrize("n", [0, 1, 3, 24, 25, 49])
def test_blocks_of_any_length_give_the_gradient_of_the_whole(n):
    """The gradient of the head is added up by blocks of 24 tokens, chunks of three; also for no token."""
    grads = []
    for chunk in (3 * 40, 10**6):
        student, hidden = head(bias=torch.zeros(40, requires_grad=True)), states(n)
        tokens = torch.arange(n) % 40
        loss, stats = opd.opd_loss(
            (student, hidden), (head(seed=1), states(n, seed=1)), tokens, n, chunk=chunk
        )
        loss.backward()
        grads.append([hidden.grad, student.weight.grad, student.bias.grad, stats["reverse_kl"]])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)) and len(grads[0][3]) == n


def test_a_frozen_head_gets_no_gradient():
    student = head()
    student.weight.requires_grad_(False)
    hidden = states()
    loss, _ = opd.opd_loss((student, hidden), (head(seed=1), states(seed=1)), torch.zeros(10).long(), 10)
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and student.weight.grad is None


def test_nothing_is_written_in_place():
    """A normaliser was once corrupted by an in-place write: all inputs are bit-identical afterwards."""
    inputs = [states(), states(seed=1, grad=False), torch.arange(10)]
    before = [x.detach().clone() for x in inputs]
    opd.opd_loss((head(), inputs[0]), (head(seed=1), inputs[1]), inputs[2], 10)[0].backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, before))


def test_bf16_models_get_an_fp32_divergence():
    """A bf16 divergence loses up to a third of its gradient."""
    student, hidden = head(), states()
    student = student._replace(weight=student.weight.detach().bfloat16())
    law = student.logp(hidden.detach().bfloat16(), 1.0)
    assert law.dtype == torch.float32
    assert law.exp().sum(-1).sub(1).abs().max() < 1e-6


def test_head_of_soft_capped_gemma_is_honoured():
    small = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5)
    assert models.head_of(Gemma2ForCausalLM(config).eval(), V).softcap == 0.5


def test_head_that_does_more_is_refused_by_name():
    model = tiny()
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = scaled
    with pytest.raises(data.BadInput, match="Qwen2ForCausalLM"):
        models.head_of(model, V)


def test_a_larger_vocabulary_is_cut_to_the_shared_ids():
    """Qwen2.5 0.5B has 151,936 rows, 7B 152,064, one tokenizer: the laws are over the shared ids."""
    pair = pair_of(tiny(), tiny(seed=1, vocab_size=V + 7))
    assert pair.teacher_head.cut().logits(torch.randn(2, 16)).shape == (2, V)


def test_mean_by_position():
    values, positions = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    means = report.mean_by_position(values, positions, 4)
    assert means[0] == 2 and means[2] == 5 and means[1].isnan() and means[3].isnan()
