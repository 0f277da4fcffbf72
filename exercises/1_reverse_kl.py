"""Exercise 1: the reverse KL, and which way round it is.

A language model gives a distribution over the next token: p is the student's, q the teacher's. Their KL
divergence says in nats how far they are apart. It is not symmetric: in

    KL(a || b) = sum over all tokens v of a(v) (log a(v) - log b(v))

the first distribution is the weight. KL(student || teacher) is called reverse KL. It is about what the
student writes, and becomes huge if the teacher would never write that. KL(teacher || student), forward KL,
becomes huge if the student would never write what the teacher writes. On-policy distillation trains on text
that the student wrote, and minimises the reverse KL. The real one is `opd.reverse_kl`.
"""

import math

import pytest
import torch
from torch import Tensor

import opd


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) at each of N places, from log-probabilities: (N, V), (N, V) -> (N,) nats."""
    raise NotImplementedError(
        "Both arguments are logarithms: .exp() gives the probabilities. Whose probabilities are the weight? "
        "The sum goes over the vocabulary, the last dimension, and leaves one number per place."
    )


def test_two_tokens_by_hand():
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    found = reverse_kl(student, teacher)
    assert found.shape == (2,), (
        f"2 places give 2 numbers, not {tuple(found.shape)}: sum over the last dim only."
    )
    assert found[0].item() != pytest.approx(0.1308, abs=1e-3), (
        "0.1308 is KL(teacher || student): the wrong direction. Reverse KL is weighted by the student."
    )
    assert found[0].item() != pytest.approx(0.1438 / 2, abs=1e-3), (
        "Half of the right value, because V is 2: a KL is a sum over the vocabulary, not a mean."
    )
    expected = [0.1438, 0.0]  # 0.5 log(0.5 / 0.75) + 0.5 log(0.5 / 0.25), and two equal distributions
    assert found.tolist() == pytest.approx(expected, abs=1e-3), "Compare with the sum written out above."


def test_it_explodes_where_the_teacher_excludes_what_the_student_writes():
    never = -1e4  # a log-probability; exp(-1e4) is 0 in floating point
    undecided = torch.tensor([[math.log(0.5), math.log(0.5)]])
    certain = torch.tensor([[0.0, never]])
    assert reverse_kl(undecided, certain).item() == pytest.approx(5000, rel=1e-3), (
        "Half of the time this student writes a token that the teacher never writes: half of 10,000 nats. "
        "If yours is log 2, the teacher's probabilities are the weight: that is the wrong direction. "
        "If yours is infinite, it takes the logarithm of a probability that is 0 in floating point."
    )
    assert reverse_kl(certain, undecided).item() == pytest.approx(math.log(2)), (
        "This student writes one of the teacher's two tokens, which costs log 2: reverse KL lets a student "
        "leave out what the teacher can also write."
    )


def test_value_and_gradient_are_those_of_the_project():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 4, 6, dtype=torch.float64)
    teacher = teacher_logits.log_softmax(-1)
    results = []
    for function in (reverse_kl, lambda student, teacher: opd.reverse_kl(student, teacher, None)):
        leaf = logits.clone().requires_grad_()
        values = function(leaf.log_softmax(-1), teacher)
        values.sum().backward()
        results.append((values.detach(), leaf.grad))
    (values, gradient), (expected_values, expected_gradient) = results
    assert torch.allclose(values, expected_values), "The values differ from those of opd.reverse_kl."
    assert torch.allclose(gradient, expected_gradient), (
        "The values are right, the gradient is not: the student's probabilities depend on its weights too, "
        "so nothing of the student may be detached."
    )
