"""The controls of arms.py, each run with tiny models and checked against what it is said to do."""

from copy import deepcopy

import arms
import compare
import pytest
import torch
import torch.nn.functional as F
from helpers import END, pair_of, tiny

from rollout import Rollout, rollout, sampling_noise
from support import data
from support.run import Run

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]]
ENDS = (END, *range(20, 30))
KNOBS = compare.Knobs(
    max_new_tokens=8, steps=3, batch_size=4, lr=0.01, warmup=0.0, esr_tokens=4, show_every=0
)


class Recorder(Run):
    """Keeps what the loop logs: rollouts, token statistics and loss of each step."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.steps_seen = []

    def log(self, rollouts, statistics, **columns):
        self.steps_seen.append((rollouts, statistics, columns["loss"]))
        return super().log(rollouts, statistics, **columns)


def pair_with(teacher_seed: int = 1):
    return pair_of(tiny(), tiny(seed=teacher_seed), ends=ENDS)


def run(name: str, pair=None):
    """Train a pair as the arm says: the recorded steps, the pair, and the student as it was at the start."""
    pair = pair or pair_with()
    start = deepcopy(pair.student)
    recorder = Recorder()
    arms.ARMS[name].train(pair, PROMPTS, KNOBS, recorder)
    return recorder.steps_seen, pair, start


def token_logp(model, rollouts, temperature: float = 1.0) -> list[torch.Tensor]:
    """Log-probability of each row's tokens, by one pass over each text."""
    found = []
    for prompt, tokens, mask in zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask):
        ids = torch.tensor([prompt + tokens[mask].tolist()])
        logp = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        found.append(logp.gather(-1, tokens[mask][:, None]).squeeze(-1).detach())
    return found


@pytest.mark.parametrize("name, horizon", [("seqkd", 8), ("seqkd-0.1", 1)])
def test_seqkd_is_cross_entropy_on_the_teachers_answers(name, horizon):
    steps, pair, start = run(name)
    for step, (rollouts, _, _) in enumerate(steps):
        questions = [PROMPTS[i] for i in data.batch_indices(4, 4, step, 0)]
        noise = sampling_noise([(0, step, row) for row in range(4)], horizon)
        by_teacher = rollout(pair.teacher, questions, horizon, pair.eos_ids, noise)
        assert torch.equal(rollouts.tokens, by_teacher.tokens)
    rollouts, _, loss = steps[0]
    logits, targets = [], []
    for prompt, tokens, mask in zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask):
        ids = torch.tensor([prompt + tokens[mask].tolist()])
        logits.append(start(input_ids=ids).logits[0, len(prompt) - 1 : -1])
        targets.append(tokens[mask])
    assert loss == pytest.approx(F.cross_entropy(torch.cat(logits), torch.cat(targets)).item(), rel=1e-4)


def test_the_end_mask_drops_the_eos_tokens_and_no_others():
    steps, _, _ = run("no-end")
    dropped = 0
    for rollouts, tokens, _ in steps:
        kept = torch.zeros_like(rollouts.response_mask)
        kept[tokens["row"], tokens["position"]] = True
        is_end = torch.isin(rollouts.tokens, torch.tensor(ENDS))
        assert torch.equal(kept, rollouts.response_mask & ~is_end)
        dropped += int((rollouts.response_mask & is_end).sum())
        assert (rollouts.finished == (rollouts.response_mask & is_end).any(1)).all()
    assert dropped > 3


def test_no_teacher_makes_the_least_likely_fifth_less_likely_and_needs_no_teacher():
    steps, pair, start = run("no-teacher")
    _, other, _ = run("no-teacher", pair_with(teacher_seed=2))
    for name, weight in pair.masters.items():
        assert torch.equal(weight, other.masters[name])  # another teacher changes nothing
    rollouts, tokens, loss = steps[0]
    chosen = tokens["student_logp"]
    everything = torch.cat(token_logp(start, rollouts)).sort().values
    assert len(chosen) == round(0.2 * len(everything)) >= 3
    assert torch.allclose(chosen.sort().values, everything[: len(chosen)], atol=1e-5)
    assert loss == pytest.approx(0.5 * chosen.mean().item(), rel=1e-4)  # - A log p with A = -0.5
    after = [
        row[tokens["position"][tokens["row"] == i]]
        for i, row in enumerate(token_logp(pair.student, rollouts))
    ]
    before = [
        row[tokens["position"][tokens["row"] == i]] for i, row in enumerate(token_logp(start, rollouts))
    ]
    assert torch.cat(after).mean() < torch.cat(before).mean() - 0.1


def test_gkd_mixes_by_step_with_the_stated_share_and_reproducibly(monkeypatch):
    def written(model, *more, **settings) -> Rollout:
        return Rollout([], model, None, logp="of the writer", finished=None)

    monkeypatch.setattr(arms, "rollout", written)
    pair = pair_with()

    def writers(seed: int, share: float = 0.5) -> list[bool]:
        sampler = arms.teachers_share(share)(pair, compare.Knobs(seed=seed))
        found = [sampler(pair.student) for _ in range(400)]
        assert all((one.logp is None) == (one.tokens is pair.teacher) for one in found)
        return [one.tokens is pair.teacher for one in found]

    assert writers(0) == writers(0) != writers(1)
    assert sum(writers(0)) / 400 == pytest.approx(0.5, abs=0.08)
    assert sum(writers(0, share=0.2)) / 400 == pytest.approx(0.2, abs=0.06)
    assert all(writers(0, share=1.0)) and not any(writers(0, share=0.0))
    assert arms.ARMS["gkd"].sampler(pair, compare.Knobs())(pair.student).tokens in (
        pair.student,
        pair.teacher,
    )


def test_the_self_teacher_is_the_student_at_the_start_sharpened():
    steps, pair, start = run("self-teacher")
    assert (pair.masters["model.norm.weight"] - start.model.norm.weight).abs().max() > 0.01  # it has moved
    for rollouts, tokens, _ in steps:
        expected = token_logp(start, rollouts, temperature=0.7)
        for row, position, found in zip(tokens["row"], tokens["position"], tokens["teacher_logp"]):
            assert found.item() == pytest.approx(expected[row][position].item(), abs=1e-4)


def test_compare_has_no_arms_with_lora():
    """All of its arms share one pair, so --low-memory is for all of them."""
    assert {name for name, arm in arms.ARMS.items() if arm.low_memory} == arms.ARMS.keys() - set(
        compare.CHOICES
    )


def test_esr_with_a_horizon_of_one_token_is_not_full():
    horizon_at = arms.ARMS["esr"].horizon(compare.Knobs(esr_tokens=1, max_new_tokens=50), [])
    assert horizon_at(0) == 1
