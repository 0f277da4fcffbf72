"""The traced step: its gradients against each other, and its loss against train.score."""

import re
import sys

import pytest
import torch

from extras import trace


def test_gradients_by_formula_by_autograd_and_by_enumeration():
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 7, dtype=torch.double) * 2).log_softmax(-1)
    found = trace.gradients(student, teacher)
    right = found["reverse KL, formula"]
    assert right.abs().max() > 0.1
    assert torch.allclose(found["reverse KL, autograd"], right)
    assert torch.allclose(found["E[-A log p(y)]"], right)
    assert found["E[k1], wrong"].abs().max() < 1e-12
    assert torch.allclose(found["E[k3], wrong"], found["forward KL"])
    assert torch.allclose(found["forward KL"], student.exp() - teacher.exp())


def test_the_update_that_is_explained_has_the_sign_of_the_gradient():
    student, teacher = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125]]).log()
    for p, q, said in [
        (student, teacher, "negative, so the update raises"),
        (teacher, student, "positive, so the update lowers"),
        (student, student, "zero, so the update keeps"),
    ]:
        assert f"It is {said} this logit" in trace.hand_check(str, p, q, 1)


def test_the_toys_step(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trace", "--tokens", "4", "--lr", "0.0003", "--every"])
    trace.main()
    out = capsys.readouterr().out
    values = [float(x) for x in re.findall(r"reverse KL +([\d.]+)$", out, re.M)]
    assert len(values) == 8
    before, after = (float(re.search(rf"{words} ([\d.]+) nats", out)[1]) for words in ("tokens:", "is now"))
    assert before == pytest.approx(sum(values[:4]) / 4, abs=1e-3) and after < before
    assert "To check by hand" in out and out.count("reverse KL, autograd") == 4
