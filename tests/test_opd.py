"""The objective against oracles: enumeration, torch's own kl_div, autograd on unchunked logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE

import opd
from support import models

torch.manual_seed(0)
P, Q = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)  # student and teacher on 5 tokens
NO_BIAS = {"bias": None, "scale": 1.0, "softcap": None, "vocab_size": 40}


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def normal(*shape, seed):
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def head(seed=0, v=40, d=8, **changes):
    weight = normal(v, d, seed=seed).requires_grad_()
    changes = {name: on_device(value) for name, value in changes.items()}
    return models.OutputHead(**(NO_BIAS | {"weight": weight} | changes))


def states(n=10, d=8, seed=0, grad=True):
    return normal(n, d, seed=seed).requires_grad_(grad)


def run(student, hidden, teacher, teacher_hidden, tokens=None, normalizer=7, **options):
    tokens = torch.arange(len(hidden), device=DEVICE) % 33 if tokens is None else tokens
    return opd.opd_backward(student, hidden, teacher, teacher_hidden, tokens, normalizer, **options)


def gradient_of(loss_of_logp):
    logits = P.clone().requires_grad_()
    loss_of_logp(logits.log_softmax(-1)).backward()
    return logits.grad


def test_reverse_kl_by_hand():
    """Public code had it the wrong way round: student (.5, .5), teacher (.75, .25), by hand."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert opd.reverse_kl(student, teacher, None).item() == pytest.approx(by_hand)
    backwards = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert opd.forward_kl(student, teacher, None).item() == pytest.approx(backwards)


def test_kls_and_jsd_equal_torchs_kl_div():
    def kl(p, q):
        return F.kl_div(q, p, log_target=True, reduction="sum")

    assert torch.allclose(opd.reverse_kl(P, Q, None), kl(P, Q))
    assert torch.allclose(opd.forward_kl(P, Q, None), kl(Q, P))
    for beta in (0.5, 0.2):
        mixture = (beta * Q.exp() + (1 - beta) * P.exp()).log()
        expected = beta * kl(Q, mixture) + (1 - beta) * kl(P, mixture)
        assert torch.allclose(opd.jsd(P, Q, None, beta), expected)


def test_jsd_gradient_is_that_of_its_definition():
    """The mixture is computed without a gradient; its derivatives cancel."""

    def by_definition(logp):
        mixture = ((Q.exp() + logp.exp()) / 2).log()
        return ((Q.exp() * (Q - mixture) + logp.exp() * (logp - mixture)) / 2).sum()

    exact = gradient_of(by_definition)
    assert (gradient_of(lambda logp: opd.jsd(logp, Q, None)) - exact).abs().max() < 1e-15
    assert exact.abs().max() > 0.01


def test_sampled_estimator_has_the_exact_gradient_by_enumeration():
    """Summed over all 5 tokens with their probabilities, the estimator's gradient is that of reverse KL."""

    def expected(logp):
        values = opd.sampled_reverse_kl(logp.expand(5, 5), Q.expand(5, 5), torch.arange(5))
        return (P.exp() * values).sum()

    exact = gradient_of(lambda logp: opd.reverse_kl(logp, Q, None))
    assert (gradient_of(expected) - exact).abs().max() < 1e-15


def test_plausible_but_wrong_estimators():
    """k1 as a loss has expected gradient 0; k3 has forward KL's. Both were published as reverse KL."""
    k1 = gradient_of(lambda logp: (P.exp() * (logp - Q)).sum())
    assert k1.abs().max() < 1e-15
    k3 = gradient_of(lambda logp: (P.exp() * ((Q - logp).exp() - 1 - (Q - logp))).sum())
    forward = gradient_of(lambda logp: opd.forward_kl(logp, Q, None))
    assert (k3 - forward).abs().max() < 1e-15


def test_nll_is_cross_entropy():
    logits, tokens = torch.randn(7, 40), torch.arange(7)
    values = opd.nll(opd.log_probs(logits), None, tokens)
    assert torch.allclose(values, F.cross_entropy(logits, tokens, reduction="none"))


def test_divergences_are_zero_between_equals_and_never_negative():
    assert opd.reverse_kl(P, P, None).item() == opd.forward_kl(P, P, None).item() == 0
    p, q = torch.randn(2, 1000, 50).log_softmax(-1)
    for divergence in (opd.reverse_kl, opd.forward_kl, opd.jsd):
        assert divergence(p, q, None).min() >= -1e-6


ESTIMATORS = ("sampled",)  # their expected gradient is that of a divergence, their value is not


@pytest.mark.parametrize("divergence", [name for name in opd.DIVERGENCES if name not in ESTIMATORS])
def test_the_gradient_is_that_of_the_value(divergence):
    """A part that is computed without gradient, or a term that is added, must not change the gradient."""

    def value(logits):
        return opd.DIVERGENCES[divergence](logits.log_softmax(-1), Q.expand(5, 5), torch.arange(5))

    assert torch.autograd.gradcheck(value, P.expand(5, 5).clone().requires_grad_())


@pytest.mark.parametrize("divergence", [name for name in opd.DIVERGENCES if name != "nll"])  # without teacher
def test_the_gradient_between_equals_is_exactly_zero(divergence):
    """AdamW divides by the gradient's size: rounding errors of 1e-7 would move weights by a full step.

    A KL(p || m) with the mixture m = w q + (1 - w) p passes if it is `reverse_kl` with the logarithm of m as
    log p + log1p(w expm1(log q - log p)) where q <= p, and log q + log1p((1 - w) expm1(log p - log q)) where
    q > p: exactly log p where p = q. Clamp both exponents at 0, as `torch.where` evaluates both formulas.
    """
    hidden, student = states(64), head()
    run(student, hidden, student, hidden.detach(), divergence=opd.DIVERGENCES[divergence])
    assert hidden.grad.abs().max() == 0 and student.weight.grad.abs().max() == 0


@pytest.mark.parametrize("divergence", opd.DIVERGENCES)
@pytest.mark.parametrize("gap", [-100.0, 100.0])  # nats; e^89 overflows in fp32
def test_a_large_gap_overflows_nothing(divergence, gap):
    logits = torch.tensor([[0.0, gap, 1.0]], requires_grad=True)
    teacher_logp = torch.tensor([[gap, 0.0, 1.0]]).log_softmax(-1)
    value = opd.DIVERGENCES[divergence](logits.log_softmax(-1), teacher_logp, torch.tensor([2]))
    value.sum().backward()
    exact = logits.detach().double().requires_grad_()
    expected = opd.DIVERGENCES[divergence](exact.log_softmax(-1), teacher_logp.double(), torch.tensor([2]))
    expected.sum().backward()
    assert torch.allclose(value.double(), expected, rtol=1e-4)
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-4)


def test_forbidden_ids_give_no_nan():
    """0 * -inf is NaN: an id that both models forbid must add nothing, to value and gradient."""
    bias = torch.cat([torch.zeros(37), torch.full((3,), -torch.inf)])
    hidden = states()
    loss, _ = run(head(bias=bias), hidden, head(seed=1, bias=bias), states(seed=1, grad=False))
    assert loss.isfinite() and hidden.grad.isfinite().all()


CHANGES = [
    {},
    {"softcap": 3.0},
    {"scale": 0.3},
    {"bias": torch.linspace(-1, 1, 40)},
    {"vocab_size": 33},
    {"bias": torch.linspace(-1, 1, 40), "scale": 2.0, "softcap": 3.0, "vocab_size": 33},
]


@pytest.mark.parametrize("n", [0, 1, 4, 10, 37])
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("divergence", opd.DIVERGENCES)
def test_chunks_equal_plain_autograd_on_all_logits(divergence, changes, n):
    """Value, statistics and gradients of hidden states and head; also for no token at all."""
    student, teacher = head(**changes), head(seed=1, **changes)
    hidden, teacher_hidden, tokens = (
        states(n),
        states(n, seed=1, grad=False),
        torch.arange(n, device=DEVICE) % 33,
    )

    def logp(h, x):
        logits = F.linear(x, h.weight, h.bias) * h.scale
        logits = logits if h.softcap is None else h.softcap * torch.tanh(logits / h.softcap)
        return logits[:, : h.vocab_size]

    student_logp = (logp(student, hidden) / 0.8).log_softmax(-1)
    teacher_logp = (logp(teacher, teacher_hidden) / 1.3).log_softmax(-1).detach()
    values = opd.DIVERGENCES[divergence](student_logp, teacher_logp, tokens)
    whole = values.sum() / 7
    expected = torch.autograd.grad(whole, (hidden, student.weight), retain_graph=True)
    options = {"divergence": opd.DIVERGENCES[divergence], "temperature": 0.8, "teacher_temperature": 1.3}
    loss, statistics = run(student, hidden, teacher, teacher_hidden, tokens, chunk=4, **options)
    assert torch.allclose(loss, whole, rtol=1e-5)
    assert torch.allclose(hidden.grad, expected[0], atol=1e-5)
    assert torch.allclose(student.weight.grad, expected[1], atol=2e-5)
    exact = F.kl_div(teacher_logp, student_logp, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(statistics["reverse_kl"], exact, atol=1e-5)
    assert all(len(values) == n for values in statistics.values())


def test_tied_weights_get_both_gradients():
    """The embedding is also the head: its gradient is the sum of both uses, as plain autograd has it."""
    gradients = []
    for chunked in (True, False):
        weight = normal(40, 8, seed=0).requires_grad_()
        tied, tokens = models.OutputHead(**(NO_BIAS | {"weight": weight})), torch.arange(10, device=DEVICE)
        hidden = torch.tanh(weight[tokens])
        if chunked:
            run(tied, hidden, head(seed=1), states(seed=1, grad=False), tokens, chunk=3)
        else:
            teacher_logp = head(seed=1)(states(seed=1, grad=False)).log_softmax(-1).detach()
            (opd.reverse_kl(tied(hidden).log_softmax(-1), teacher_logp, tokens).sum() / 7).backward()
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, atol=1e-5)


def test_never_more_than_one_chunk_of_logits():
    """[batch, T, 151936] logits of both models at once ran out of memory: watch what is allocated."""
    wide = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 40:
                wide.append(len(out))
            return out

    with Watch():
        run(head(d=3), states(100, 3), head(1, d=3), states(100, 3, seed=1, grad=False), chunk=4)
    assert len(wide) >= 2 * 25 and max(wide) == 4


def test_a_frozen_head_gets_no_gradient_and_no_grad_gets_none_at_all():
    student, hidden = head(), states()
    student.weight.requires_grad_(False)
    run(student, hidden, head(seed=1), states(seed=1))
    assert hidden.grad.abs().sum() > 0 and student.weight.grad is None
    student, hidden = head(), states(grad=False)
    with torch.no_grad():
        loss, _ = run(student, hidden, head(seed=1), states(seed=1))
    assert loss > 0 and student.weight.grad is None


def test_lengths_that_differ_are_refused():
    """zip stops at the shortest: tokens would lose their gradient silently."""
    with pytest.raises(ValueError, match="10, 10, 4"):
        run(head(), states(), head(seed=1), states(seed=1), torch.arange(4, device=DEVICE))


def test_a_divergence_that_is_not_per_token_is_refused():
    """Its mean would be summed over chunks and micro-batches."""
    for divergence in (lambda s, t, y: (s - t).mean(), lambda s, t, y: s - t):
        with pytest.raises(ValueError, match="not one value per token"):
            run(head(), states(), head(seed=1), states(seed=1), divergence=divergence)


def test_nothing_is_written_in_place():
    """A normaliser was once corrupted by an in-place write: all inputs are bit-identical afterwards."""
    inputs = [states(), states(seed=1, grad=False), torch.arange(10, device=DEVICE)]
    before = [x.detach().clone() for x in inputs]
    run(head(), inputs[0], head(seed=1), inputs[1], inputs[2])
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, before))


def test_bf16_models_get_an_fp32_divergence():
    """A bf16 divergence loses up to a third of its gradient."""
    weight = head().weight.detach().bfloat16()
    logp = opd.log_probs(head(weight=weight)(states().detach().bfloat16()), 0.7)
    assert logp.dtype == torch.float32
    assert logp.exp().sum(-1).sub(1).abs().max() < 1e-6


def test_fp32_logits_of_bf16_tensors_have_the_gradient_of_the_matmul(monkeypatch):
    """`torch.mm(out_dtype=)` exists on CUDA alone: elsewhere an fp32 matmul replaces it."""
    mm = torch.mm
    if DEVICE.type != "cuda":
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype)))
    hidden = states().detach().bfloat16().requires_grad_()
    weight = head().weight.detach().bfloat16().requires_grad_()
    logits = models.LinearFP32.apply(hidden, weight)
    assert logits.dtype == torch.float32
    exact_hidden, exact_weight = hidden.detach().float(), weight.detach().float()
    assert torch.allclose(logits, exact_hidden @ exact_weight.T, atol=1e-5)  # a GPU sums in another order
    upstream = normal(10, 40, seed=2)
    logits.backward(upstream)
    for ours, exact in ((hidden.grad, upstream @ exact_weight), (weight.grad, upstream.T @ exact_hidden)):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() < 0.01 * exact.norm()
