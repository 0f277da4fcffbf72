"""The probes, on models whose text, distribution and reverse KL are known."""

import sys

import probe
import pytest
import torch
import torch.nn.functional as F
from helpers import END, V, pair_of, tiny

from eval_math import boxed, extract
from extras.profile_horizon import in_batches
from support import data
from support.cli import BadInput, run_main
from support.run_folder import read_csv
from support.workers import Grader

START = 5
RIGHT, WRONG = [10, 11, 12, 13, 14], [20, 21, 22, 23, 24]  # two ways to answer, of five words and an end
WORDS = {RIGHT[-1]: r"\boxed{7}", WRONG[-1]: r"\boxed{8}"}
PROMPTS = [[8, 9, START], [9, START], [START]]


class Words:
    """A tokenizer with what grading needs."""

    chat_template = "any"

    def decode(self, ids, skip_special_tokens):
        return " ".join(WORDS.get(i, f"w{i}") for i in ids)


def chain(first):
    """A real model whose next token follows from the last one: after START comes `first`, then that way."""
    model = tiny(hidden_size=V + 2, num_attention_heads=2, num_key_value_heads=2)
    follows = dict.fromkeys(range(V), END) | {START: first}
    follows |= {a: b for way in (RIGHT, WRONG) for a, b in zip(way, way[1:])}
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V, V + 2))
        model.lm_head.weight.zero_()
        for token, then in follows.items():
            model.lm_head.weight[then, token] = 10.0  # times the norm's sqrt(52): as good as certain
    return model


def knobs_of(**changes):
    sizes = {"problems": 3, "samples": 2, "max_new_tokens": 9, "sample_batch": 4, "micro_batch": 40}
    return probe.Knobs(**(sizes | {"dtype": "float32"} | changes))


def repeated(prompts, knobs):
    """Problems and prompts, each once for every answer."""
    numbers = [i for i in range(len(prompts)) for _ in range(knobs.samples)]
    return [data.Problem(f"q{i}", "7") for i in numbers], [prompts[i] for i in numbers]


@pytest.fixture
def wrong_student_right_teacher():
    """The student takes the wrong way, the teacher and the trained student the right one.

    Called with knobs, it gives the setup of a probe.
    """
    pairs = [pair_of(chain(way[0]), chain(RIGHT[0])) for way in (WRONG, RIGHT)]
    for pair in pairs:
        object.__setattr__(pair, "tokenizer", Words())
    with Grader(extract, boxed, workers=1) as grader:
        yield lambda knobs: probe.Setup(*pairs, *repeated(PROMPTS, knobs), grader, knobs)


def values(rows):
    return {(row["curve"], row["at"]): row["value"] for row in rows}


def test_prefixes_that_no_answer_reaches(wrong_student_right_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "load", lambda name, knobs, grader: wrong_student_right_teacher(knobs))
    argv = [f"--out={tmp_path}/decay.csv", "--prefixes=8", "--max-new-tokens=9", "--samples=2"]
    with pytest.raises(BadInput, match="lower --prefixes"):
        probe.run_probe("decay", argv)


def test_decay_where_the_teacher_follows_any_beginning(wrong_student_right_teacher):
    """Right on its own and from the start, wrong after one wrong token; ended answers do not count."""
    knobs = knobs_of(prefixes="0 1 3 6")  # at 6 all answers have ended
    found = values(probe.decay(wrong_student_right_teacher(knobs)))
    assert {at for _, at in found} == {0, 1, 3}
    for k in (0, 1, 3):
        assert found["own prefix", k] == 1
        assert found["student's prefix", k] == (1 if k == 0 else 0)
        assert found["difference", k] == (0 if k == 0 else -1)


def test_swap_where_the_first_token_decides(wrong_student_right_teacher):
    knobs = knobs_of(prefixes="0 2 7", horizon=2)
    found = values(probe.swap(wrong_student_right_teacher(knobs)))
    assert found["base alone", 9] == 0 and found["trained alone", 9] == 1
    for k, first_decides in ((0, 0), (2, 1), (7, 1)):  # at 7 all have ended, and stay as they are
        assert found["trained, then base", k] == first_decides
        assert found["base, then trained", k] == 1 - first_decides
        assert found["difference", k] == (1 if first_decides else -1)
    assert found["at N", 2] == 1 and ("at N", 7) not in found


def test_an_answer_that_is_finished_by_another_model_is_no_longer_than_the_budget(
    wrong_student_right_teacher,
):
    setup = wrong_student_right_teacher(knobs_of(max_new_tokens=4))
    records = probe.finish(setup, setup.after.student, {0: RIGHT[:2], 5: [RIGHT[0], END]}, 2, "")
    found = [(r["index"], r["length"], r["finished"]) for r in records]
    assert found == [(0, 4, False), (2, 2, True)]


@pytest.fixture
def tiny_setup():
    """Random models, base and trained student and one teacher: knobs -> setup."""
    teacher, ends = tiny(seed=1), (END, *range(20, 30))
    pairs = [pair_of(tiny(seed=seed), teacher, ends=ends) for seed in (0, 2)]
    prompts = [[5, 6], [7], [8, 9, 4]]
    return lambda knobs: probe.Setup(*pairs, *repeated(prompts, knobs), None, knobs)


def test_the_change_is_that_of_the_tokens_beyond_n(tiny_setup):
    """Against loops over single answers, on fixed and own rollouts: ragged, in several batches."""
    knobs = knobs_of(horizon=3)
    setup = tiny_setup(knobs)
    found = {row["curve"]: row for row in probe.cascade(setup)}
    pairs = {"before": setup.before, "after": setup.after}
    own = {who: probe.sampled(setup, p.student, setup.prompts, 9, who) for who, p in pairs.items()}
    means = {}
    for kind, who in (("fixed", "before"), ("fixed", "after"), ("own", "after")):
        beyond = []
        for ro in own["before" if kind == "fixed" else who]:
            for prompt, tokens, mask in zip(ro.prompts, ro.tokens, ro.response_mask):
                text = torch.tensor([prompt + tokens[mask].tolist()])
                logp = [
                    m(input_ids=text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    for m in (pairs[who].student, pairs[who].teacher)
                ]
                beyond += F.kl_div(logp[1], logp[0], log_target=True, reduction="none").sum(-1).tolist()[3:]
        means[kind, who] = sum(beyond) / len(beyond)
    for kind in ("fixed", "own"):
        row = found[f"{kind}, change"]
        ratio = means[kind, "after"] / means["fixed", "before"]
        assert row["value"] == pytest.approx(ratio - 1, rel=1e-3) and row["at"] == 3 and row["n"] == 3
        assert row["low"] <= row["value"] <= row["high"]


def test_no_token_beyond_the_trained_ones(tiny_setup):
    with pytest.raises(BadInput, match="no answer is longer than the 9 trained tokens"):
        list(probe.cascade(tiny_setup(knobs_of(horizon=9))))


def test_where_a_text_starts_to_loop():
    text = list(range(30))
    assert probe.loop_start(text) == 30 and probe.loop_start([]) == 0
    assert probe.loop_start(text + [40, 41, 42] * 20) == 30 + 9  # after three turns
    assert probe.loop_start(text * 3) == 90  # said three times is no loop yet
    assert probe.loop_start(text * 5) == 90
    assert probe.loop_start([7] * 50) == 3


def test_loops_are_left_out(tiny_setup):
    knobs = knobs_of(max_new_tokens=30, horizon=1, samples=1)
    pair = tiny_setup(knobs).before
    ro = next(in_batches(pair.student, pair, [[5, 6]], 30, 1.0, 0, 4))
    ro.tokens, ro.response_mask = torch.tensor([[7] * 30]), torch.ones(1, 30, dtype=torch.bool)
    _, tokens = probe.kl_beyond(pair, [ro], knobs)
    assert tokens.tolist() == [2]  # of the positions 0 to 2, without the trained one


def test_the_bootstrap_finds_the_error_of_a_mean():
    """Of 400 numbers of variance 1: the interval's half width is 1.96 / 20, within a tenth."""
    numbers = torch.randn(400, generator=torch.Generator().manual_seed(1))
    low, high = probe.bootstrap(lambda drawn: numbers[drawn].mean(), 400)
    assert (high - low).item() / 2 == pytest.approx(1.96 * numbers.std().item() / 20, rel=0.1)
    assert low < numbers.mean() < high


def call(monkeypatch, capsys, *argv):
    """Exit code, stdout and stderr of `python experiments/probe.py ARGV`."""
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        run_main(probe.main)
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("name", ["decay", pytest.param("cascade", marks=pytest.mark.slow), "swap"])
def test_a_probe_on_the_toy(name, world, tmp_path, monkeypatch, capsys):
    """From the command line: a reading, a file of one setting; a second call changes nothing."""
    out = tmp_path / "new" / f"{name}.csv"
    flags = ["--problems", 4, "--samples", 2, "--max-new-tokens", 40, "--prefixes", "0 6", "--out", out]
    flags += [] if name == "decay" else ["--trained", world / "teacher", "--horizon", 20]
    code, said, error = call(monkeypatch, capsys, name, *flags)
    assert code == 0, error
    assert said.startswith(f"{name}: ") and "[" in said
    rows = read_csv(out)
    assert len({row["curve"] for row in rows}) == {"decay": 3, "cascade": 2, "swap": 6}[name]
    assert {(row["probe"], row["problems"], row["max_new_tokens"]) for row in rows} == {(name, "4", "40")}
    first = out.read_bytes()
    code, _, error = call(monkeypatch, capsys, name, *flags, "--seed", 1)
    assert code == 2 and "exists already" in error and error.count("\n") == 1
    assert out.read_bytes() == first


def test_the_reading_of_known_answers(wrong_student_right_teacher):
    knobs = knobs_of(prefixes="0 1 3")
    rows = [row | {"probe": "decay"} for row in probe.decay(wrong_student_right_teacher(knobs))]
    said = probe.reading(rows)
    assert "continues 3 tokens by the student" in said and "difference -100.0% [-100.0% to -100.0%]" in said


def test_the_knobs_of_real_models_are_not_the_toys(world):
    names = {"student": str(world / "student"), "teacher": str(world / "teacher"), "data": str(world)}
    given = names | {"trained": str(world / "teacher"), "horizon": 12, "problems": 2, "dtype": "float32"}
    knobs = probe.complete("swap", given | {"max_new_tokens": 120, "prefixes": "0 0.5 7"})
    assert probe.prefix_lengths(knobs) == [0, 7, 60] and knobs.instruction
    setup = probe.load("swap", knobs, None)
    assert setup.after.student.num_parameters() == setup.after.teacher.num_parameters()
    assert setup.after.teacher is setup.before.teacher and not setup.after.masters
