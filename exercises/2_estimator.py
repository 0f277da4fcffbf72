"""Exercise 2: the reverse KL from one sampled token.

Exercise 1 needs the probabilities of all tokens. One token y, sampled from the student p, is enough to
estimate the *gradient* of the reverse KL to the teacher q, which is

    sum_v (log p(v) - log q(v)) grad p(v) = average over y from p of (log p(y) - log q(y)) grad log p(y)

because grad p = p grad log p (the other terms of the derivative sum to zero). The loss -A log p(y) has this
gradient on average, with the advantage A = log q(y) - log p(y) detached: a number, positive if the teacher
likes y more than the student does; y then becomes more likely. The loss's value means nothing.
The real one is `opd.sampled_reverse_kl`; in reinforcement learning it is called a policy gradient.
"""

import torch
from torch import Tensor

import opd


def sampled_loss(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """-A log p(y) at each of N places: log-probabilities (N, V), (N, V), sampled tokens (N,) -> (N,)."""
    raise NotImplementedError(
        "Take log p(y) and log q(y) with gather(-1, tokens[:, None]). Detach A. It is tempting to return "
        "log p(y) - log q(y), whose average is the reverse KL. But log q(y) has no gradient, and that of "
        "log p(y) averages to sum_v p(v) grad log p(v) = sum_v grad p(v) = grad 1 = 0: it teaches nothing."
    )


def expected_gradient(logits: Tensor, teacher_logp: Tensor) -> Tensor:
    """The average of the loss's gradient over all 5 tokens that could be sampled: no sampling noise."""
    leaf = logits.clone().requires_grad_()
    student_logp = leaf.log_softmax(-1)
    tokens = torch.arange(len(logits))
    losses = sampled_loss(student_logp.expand(5, 5), teacher_logp.expand(5, 5), tokens)
    chances = student_logp.detach().exp()
    (chances * losses).sum().backward()
    return leaf.grad


def test_the_expected_gradient_is_that_of_the_exact_reverse_kl():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 5, dtype=torch.float64)
    teacher_logp = teacher_logits.log_softmax(-1)
    found = expected_gradient(logits, teacher_logp)
    leaf = logits.clone().requires_grad_()
    opd.reverse_kl(leaf.log_softmax(-1), teacher_logp, None).backward()
    assert found.abs().max() > 1e-9, (
        "The expected gradient is zero: the loss teaches nothing. The average of grad log p(y) over y "
        "sampled from p is the gradient of sum_v p(v), which is always 1. log p(y) needs its advantage as a "
        "factor."
    )
    assert not torch.allclose(found, -leaf.grad), (
        "The sign is wrong: this loss drives the student away from the teacher."
    )
    assert torch.allclose(found, leaf.grad), (
        "Not the gradient of the reverse KL. The advantage is log q(y) - log p(y), and it must be detached."
    )


def test_one_token_by_hand():
    """p = (0.5, 0.5), q = (0.75, 0.25), y = 0: A = log 1.5 = 0.4055, and grad log p(0) = (0.5, -0.5)."""
    leaf = torch.zeros(1, 2, requires_grad=True)
    loss = sampled_loss(leaf.log_softmax(-1), torch.tensor([[0.75, 0.25]]).log(), torch.tensor([0]))
    assert loss.shape == (1,), (
        f"One place gives one number, not {tuple(loss.shape)}: squeeze what gather returns."
    )
    loss.sum().backward()
    gradient = round(leaf.grad[0, 0].item(), 4)
    mistakes = {
        0.5: "log p(y) needs its advantage as a factor",
        -0.5493: "the advantage is not detached",
        0.2027: "the sign is wrong; the teacher likes token 0 more than the student does, so it must gain",
    }
    hint = mistakes.get(gradient, "compare with -A grad log p(0)")
    assert gradient == -0.2027, f"The gradient of token 0's logit is {gradient}, expected -0.2027: {hint}."


def test_the_advantage_is_a_constant():
    student_logp = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    teacher_logp = torch.tensor([[0.75, 0.25]]).log().requires_grad_()
    sampled_loss(student_logp, teacher_logp, torch.tensor([1])).sum().backward()
    assert teacher_logp.grad is None, "A gradient flows into the teacher through A: detach the advantage."
