"""The pictures that explain the method."""

import sys

import pytest
import torch

import train
from extras import pictures
from opd import forward_kl, reverse_kl


def test_reverse_kl_finds_a_mode_and_forward_kl_the_mean():
    grid = torch.linspace(-6, 6, 121)
    q = 0.6 * torch.exp(-((grid + 2) ** 2) / 0.5) + 0.4 * torch.exp(-((grid - 2.5) ** 2) / 0.5)
    teacher_logp = (q + 1e-12).log().log_softmax(-1)[None]
    means = [
        (pictures.fitted(divergence, teacher_logp, grid, start=-1.0).exp() * grid).sum().item()
        for divergence in (reverse_kl, forward_kl)
    ]
    assert abs(means[0] + 2) < 0.1  # the larger mode
    assert abs(means[1] - (0.6 * -2 + 0.4 * 2.5)) < 0.1  # the teacher's mean


def test_tokens_of_dollar_signs_are_no_formulas(tmp_path, monkeypatch):
    texts = ["$$", r"$\frac", "$"]
    monkeypatch.setattr(pictures, "scored_answer", lambda *run: (texts, torch.ones(3), torch.ones(3)))
    monkeypatch.setattr(pictures.run_folder, "resumed", lambda *run: pictures.train.Knobs())
    monkeypatch.setattr(pictures.run_folder, "read_csv", lambda path: [])
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    assert pictures.draw_step(tmp_path).stat().st_size > 5000


@pytest.mark.slow
def test_a_run_is_drawn(world, tmp_path, monkeypatch):
    flags = ["--steps", "2", "--eval-limit", "0", "--show-every", "0", "--preset", "toy"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--out", str(tmp_path / "run")])
    train.main()
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pictures", str(tmp_path / "run")])
    pictures.main()
    for name in ("one_step.png", "reverse_kl.png", "schedules.png"):
        assert (tmp_path / name).stat().st_size > 5000
