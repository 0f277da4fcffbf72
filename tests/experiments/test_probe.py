"""The probes, on models whose text, distribution and reverse KL are known."""

import sys
from dataclasses import replace
from pathlib import Path

import figures
import probe
import pytest
import torch
import torch.nn.functional as F
from helpers import END, V, pair_of, tiny

import train
from eval_math import boxed, extract
from extras.profile_horizon import in_batches
from support import data, toy
from support.cli import BadInput, run_main
from support.run_folder import append_csv, read_csv
from support.workers import Grader

ROOT = Path(train.__file__).parent
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


def knobs_of(knobs_class, **changes):
    sizes = {"problems": 3, "samples": 2, "max_new_tokens": 9, "sample_batch": 4, "micro_batch": 40}
    return knobs_class(**(sizes | {"dtype": "float32", "world": ""} | changes))


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
    monkeypatch.setattr(probe, "load", lambda knobs, grader: wrong_student_right_teacher(knobs))
    argv = [
        f"--out={tmp_path}/decay.csv",
        "--device=cpu",
        "--prefixes=8",
        "--max-new-tokens=9",
        "--samples=2",
    ]
    with pytest.raises(BadInput, match="lower --prefixes"):
        probe.run_probe("decay", argv)


def test_decay_where_the_teacher_follows_any_beginning(wrong_student_right_teacher):
    """Right on its own and from the start, wrong after one wrong token; ended answers do not count."""
    knobs = knobs_of(probe.PrefixKnobs, prefixes="0 1 3 6")  # at 6 all answers have ended
    found = values(probe.decay(wrong_student_right_teacher(knobs)))
    assert {at for _, at in found} == {0, 1, 3}
    for k in (0, 1, 3):
        assert found["own prefix", k] == 1
        assert found["student's prefix", k] == (1 if k == 0 else 0)
        assert found["difference", k] == (0 if k == 0 else -1)


def test_a_stopped_probe_leaves_the_results_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "load", lambda knobs, grader: None)
    monkeypatch.setattr(probe, "draw_probe", lambda path: path.read_text())
    out = tmp_path / "results" / "decay.csv"

    def finished(setup):
        yield probe.point("mean", 1, 0.5, (0.4, 0.6), 3)

    def stopped(setup):
        yield probe.point("mean", 1, 0.7, (0.4, 0.6), 3)
        raise KeyboardInterrupt

    argv = [f"--out={out}", "--device=cpu", "--dtype=float32"]
    monkeypatch.setitem(probe.PROBES, "decay", (finished, probe.PrefixKnobs))
    before = probe.run_probe("decay", argv)
    monkeypatch.setitem(probe.PROBES, "decay", (stopped, probe.PrefixKnobs))
    with pytest.raises(KeyboardInterrupt):
        probe.run_probe("decay", argv)
    assert out.read_text() == before
    monkeypatch.setitem(probe.PROBES, "decay", (finished, probe.PrefixKnobs))
    assert probe.run_probe("decay", argv) == before
    assert [path.name for path in out.parent.iterdir()] == ["decay.csv"]


def test_swap_where_the_first_token_decides(wrong_student_right_teacher):
    knobs = knobs_of(probe.SwapKnobs, prefixes="0 2 7", horizon=2)
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
    setup = wrong_student_right_teacher(knobs_of(probe.PrefixKnobs, max_new_tokens=4))
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


def test_the_kl_by_position_is_the_trainers(tiny_setup):
    """Of ragged rows in several batches and micro-batches; 0 where there is no token."""
    knobs = knobs_of(probe.TrainedKnobs, temperature=0.7)
    setup = tiny_setup(knobs)
    pair = setup.after
    found = list(in_batches(pair.student, pair, setup.prompts, 9, 0.7, 0, 4))
    kl, present = probe.kl_by_position(pair, found, knobs)
    done = 0
    for ro in found:
        with torch.no_grad():
            stats = train.score(pair, ro, temperature=0.7, micro_batch=40)[1]
        for row, position, nats in zip(*(stats[n].tolist() for n in ("row", "position", "reverse_kl"))):
            assert kl[row + done, position] == pytest.approx(nats, abs=1e-5)
        done += len(ro.prompts)
    assert present.sum() == sum(int(ro.response_mask.sum()) for ro in found) and (kl[~present] == 0).all()


def test_cascade_means_are_those_of_the_tokens(tiny_setup):
    """Each position's mean and error, and the change beyond N, against loops over single answers."""
    knobs = knobs_of(probe.TrainedKnobs, horizon=3, temperature=1.0)
    setup = tiny_setup(knobs)
    rows = list(probe.cascade(setup))
    pairs, length, means = {"before": setup.before, "after": setup.after}, 9, {}
    own = {who: probe.sampled(setup, p.student, setup.prompts, length, who) for who, p in pairs.items()}
    for kind, who in (("fixed", "before"), ("fixed", "after"), ("own", "after")):
        at, beyond = {}, []
        for ro in own["before" if kind == "fixed" else who]:
            for prompt, tokens, mask in zip(ro.prompts, ro.tokens, ro.response_mask):
                text = torch.tensor([prompt + tokens[mask].tolist()])
                logp = [
                    m(input_ids=text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    for m in (pairs[who].student, pairs[who].teacher)
                ]
                kl = F.kl_div(logp[1], logp[0], log_target=True, reduction="none").sum(-1).tolist()
                for position, nats in enumerate(kl):
                    at.setdefault(position, []).append(nats)
                    beyond += [nats] if position >= 3 else []
        for row in (row for row in rows if row["curve"] == f"{kind}, {who}"):
            nats = torch.tensor(at[row["at"]])
            assert row["n"] == len(nats) and row["value"] == pytest.approx(nats.mean().item(), rel=1e-3)
            assert row["high"] - row["value"] == pytest.approx(
                (nats.std() / len(nats) ** 0.5).item(), rel=1e-3
            )
        means[kind, who] = sum(beyond) / len(beyond)
    change = next(row for row in rows if row["curve"] == "fixed, change")
    ratio = means["fixed", "after"] / means["fixed", "before"]
    assert change["value"] == pytest.approx(ratio - 1, rel=1e-3) and change["at"] == 3
    assert change["low"] <= change["value"] <= change["high"]


def test_teacher_equal_to_student_has_no_gap():
    """Reverse KL 0 at each position."""
    pair = pair_of(tiny(), tiny())
    knobs = knobs_of(probe.TrainedKnobs, horizon=3)
    setup = probe.Setup(pair, pair, *repeated([[5, 6], [7], [8, 9, 4]], knobs), None, knobs)
    rows = list(probe.cascade(setup))
    assert all(abs(row["value"]) < 1e-5 for row in rows if "change" not in row["curve"])
    with pytest.raises(BadInput, match="none is beyond"):
        list(probe.cascade(setup._replace(knobs=replace(knobs, horizon=9))))


def test_where_a_text_starts_to_loop():
    text = list(range(30))
    assert probe.loop_start(text) == 30 and probe.loop_start([]) == 0
    assert probe.loop_start(text + [40, 41, 42] * 20) == 30 + 9  # after three turns
    assert probe.loop_start(text * 3) == 90  # said three times is no loop yet
    assert probe.loop_start(text * 5) == 90
    assert probe.loop_start([7] * 50) == 3


def test_loops_are_left_out_of_the_gap(tiny_setup):
    knobs = knobs_of(probe.TrainedKnobs, max_new_tokens=30)
    pair = tiny_setup(knobs).before
    ro = next(in_batches(pair.student, pair, [[5, 6]], 30, 1.0, 0, 4))
    ro.tokens, ro.response_mask = torch.tensor([[7] * 30]), torch.ones(1, 30, dtype=torch.bool)
    _, present = probe.kl_by_position(pair, [ro], knobs)
    assert present[0].nonzero()[:, 0].tolist() == [0, 1, 2]


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


SMALL = ["--problems", 4, "--samples", 2, "--max-new-tokens", 40]


@pytest.mark.slow
@pytest.mark.parametrize("name", probe.PROBES)
def test_a_probe_on_the_toy(name, world, tmp_path, monkeypatch, capsys):
    """From the command line: a reading, a file of one setting, no machine's path in it, a figure."""
    out = tmp_path / "new" / f"{name}.csv"
    monkeypatch.setitem(toy.PRESET, "steps", 2)
    code, said, error = call(monkeypatch, capsys, name, *SMALL, "--out", out)
    assert code == 0, error
    assert said.startswith(f"{name}: ") and "[" in said
    assert len({row["curve"] for row in read_csv(out)}) == {"decay": 3, "cascade": 6, "swap": 6}[name]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(world.parent) not in out.read_text() and "toy/opening-" in out.read_text()


def test_results_of_other_settings_are_not_touched(world, tmp_path, monkeypatch, capsys):
    """The same settings write the same file again; others are refused."""
    out, flags = tmp_path / "decay.csv", [*SMALL, "--prefixes", "0 6"]
    assert call(monkeypatch, capsys, "decay", *flags, "--out", out)[0] == 0
    first = out.read_bytes()
    code, _, error = call(monkeypatch, capsys, "decay", *flags, "--seed", 1, "--out", out)
    assert code == 2 and "would mix seed '0' and '1'" in error and error.count("\n") == 1
    code, _, error = call(monkeypatch, capsys, "cascade", *SMALL, "--out", out)
    assert code == 2 and "probe 'decay'" in error
    assert out.read_bytes() == first
    assert call(monkeypatch, capsys, "decay", *flags, "--out", out)[0] == 0
    assert out.read_bytes() == first


def test_the_reading_of_known_answers(wrong_student_right_teacher, tmp_path):
    out, knobs = tmp_path / "decay.csv", knobs_of(probe.PrefixKnobs, prefixes="0 1 3")
    rows = list(probe.decay(wrong_student_right_teacher(knobs)))
    append_csv(out, [row | knobs.settings("decay") for row in rows])
    said = figures.draw_probe(out)
    assert "continues 3 tokens by the student" in said and "difference -100.0% [-100.0% to -100.0%]" in said


def test_the_knobs_of_real_models_are_not_the_toys(world):
    """A trained student is loaded, not trained; nothing of the toy's stands in the settings."""
    names = {"student": str(world / "student"), "teacher": str(world / "teacher"), "data": str(world)}
    given = names | {"trained": str(world / "teacher"), "horizon": 12.0, "problems": 2, "dtype": "float32"}
    knobs = probe.complete(probe.SwapKnobs, given | {"max_new_tokens": 120, "prefixes": "0 0.5"})
    assert knobs.world == "" and knobs.prefixes == "0 12 60"
    assert knobs.instruction and knobs.window() == 12
    setup = probe.load(knobs, None)
    assert setup.after.student.num_parameters() == setup.after.teacher.num_parameters()
    assert setup.after.teacher is setup.before.teacher and not setup.after.masters


@pytest.mark.parametrize("name", probe.PROBES)
def test_a_file_of_which_rows_are_missing_is_one_line(name, tmp_path):
    rows = (ROOT / "results" / f"probe_{name}.csv").read_text().splitlines(keepends=True)
    (tmp_path / "part.csv").write_text("".join(rows[:2]))
    with pytest.raises(BadInput, match="part.csv lacks rows of the probe"):
        figures.draw_probe(tmp_path / "part.csv")


def test_many_positions_are_drawn_in_groups():
    """Weighted by the tokens of each; as many as there is room for are left alone."""
    rows = [
        {"curve": "fixed, before", "at": str(i), "value": float(i % 2), "n": 1 + 2 * (i % 2)}
        for i in range(7)
    ]
    rows = [row | {"low": row["value"] - 1, "high": row["value"] + 1} for row in rows]
    found = figures.pooled(rows, points=4)
    assert [row["at"] for row in found] == [0.5, 2.5, 4.5, 6]
    assert [row["value"] for row in found] == [0.75, 0.75, 0.75, 0]
    assert [row["high"] - row["value"] for row in found] == [1, 1, 1, 1]
    assert [row["value"] for row in figures.pooled(rows, points=7)] == [row["value"] for row in rows]
