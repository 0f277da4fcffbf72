"""The comparison: masks and causality, resume, and the table and claims for rows with known answers."""

import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import arms
import claims
import compare
import figures
import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import END, pair_of, tiny
from safetensors.torch import load_file

import train
from rollout import Rollout, rollout, sampling_noise
from support.cli import BadInput, Stopped
from support.run_folder import append_csv, read_csv

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]] * 2


def rollouts_of(*lengths: int) -> Rollout:
    """Responses of these lengths."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Rollout([[1]] * len(lengths), mask.long(), mask, mask.float(), mask[:, 0])


def pair_and_rollouts(horizon: int):
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    noise = sampling_noise(range(len(PROMPTS)), horizon)
    return pair, rollout(pair.student, PROMPTS, horizon, pair.eos_ids, noise)


RAGGED = rollouts_of(6, 3, 1)  # with N = 2 every mask has 2 + 2 + 1 tokens
KNOBS = compare.Knobs(max_new_tokens=20)  # N = 2


def test_first_and_last():
    first = [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    last = [[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert arms.first(None, RAGGED, KNOBS, 0).int().tolist() == first
    assert arms.last(None, RAGGED, KNOBS, 0).int().tolist() == last


def test_windows_are_whole_and_start_anywhere():
    starts = [set(), set(), set()]
    for step in range(200):
        for row, mask in enumerate(arms.window(None, RAGGED, KNOBS, step)):
            where = mask.nonzero().flatten().tolist()
            assert where == list(range(where[0], where[0] + (1 if row == 2 else 2)))
            assert RAGGED.response_mask[row][where].all()
            starts[row].add(where[0])
    assert starts == [{0, 1, 2, 3, 4}, {0, 1}, {0}]


def test_tokens_by_value_are_the_highest_of_the_step_and_never_padding():
    values = torch.tensor([[9.0, 0, 8, 0, 7, 0], [6, 5, 0, 99, 99, 99], [-1, 99, 99, 99, 99, 99]])
    chosen = arms.highest(lambda *_: values)(None, RAGGED, KNOBS, 0)
    assert chosen.nonzero().tolist() == [[0, 0], [0, 2], [0, 4], [1, 0], [1, 1]]
    negative = arms.top(RAGGED, 10, -values.abs() - 1)  # as many as there are
    assert torch.equal(negative, RAGGED.response_mask)


def test_random_tokens_are_within_the_rows_and_equally_likely():
    masks = torch.stack([arms.ARMS["random"].mask(None, RAGGED, KNOBS, step) for step in range(400)])
    assert (masks.sum((1, 2)) == 5).all()
    assert not masks[:, ~RAGGED.response_mask].any()
    assert (masks.float().mean(0)[RAGGED.response_mask] - 0.5).abs().max() < 0.1  # 5 of 10


@pytest.mark.parametrize("name", ["random", "window"])
def test_random_masks_depend_on_seed_and_step_alone(name):
    long = rollouts_of(60, 60, 60, 60)
    mask_of = partial(arms.ARMS[name].mask, None, long)
    for step in (0, 7):
        assert torch.equal(mask_of(KNOBS, step), mask_of(KNOBS, step))
        assert not torch.equal(mask_of(KNOBS, step), mask_of(replace(KNOBS, seed=1), step))
    assert not torch.equal(mask_of(KNOBS, 0), mask_of(KNOBS, 1))


def test_token_values_are_each_tokens_own():
    """Micro-batches come longest row first: values must be stored at their row and position."""
    pair, rollouts = pair_and_rollouts(9)
    found = arms.statistic("reverse_kl")(pair, rollouts, train.Knobs(micro_batch=28), 0)
    assert all(master.grad is None for master in pair.masters.values())
    for row, (prompt, tokens, mask) in enumerate(
        zip(rollouts.prompts, rollouts.tokens, rollouts.response_mask)
    ):
        ids = torch.tensor([prompt + tokens[mask].tolist()])
        logp = [
            model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (pair.student, pair.teacher)
        ]
        kl = F.kl_div(logp[1], logp[0], log_target=True, reduction="none").sum(-1)
        assert torch.allclose(found[row][mask], kl, atol=1e-4)
        assert (found[row][~mask] == 0).all()


def test_first_tokens_of_full_rollouts_have_the_gradient_of_rollouts_cut_there():
    """Causality: with the same random numbers both gradients are equal, so generation beyond N is cost."""
    gradients = []
    for horizon in (12, 4):
        pair, rollouts = pair_and_rollouts(horizon)
        mask = arms.first(pair, rollouts, replace(KNOBS, max_new_tokens=40), 0)
        train.score(pair, rollouts, mask, micro_batch=40)
        gradients.append(torch.cat([master.grad.flatten() for master in pair.masters.values()]))
    assert rollouts.tokens.shape[1] == 4
    assert mask.sum() < 4 * len(mask)  # some rows end before
    assert gradients[0].abs().max() > 0.01
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()


@pytest.mark.parametrize(
    "history, horizon",
    [
        ([], 10),
        ([(10, 4.0), (10, 3.0), (10, 2.0), (10, 1.0)], 10),  # still falling
        ([(10, 1.0)] * 3, 10),  # too early to decide
        ([(10, 1.0)] * 4, 20),
        ([(10, 1.0)] * 4 + [(20, 1.0)] * 2, 20),  # counted from the start of each horizon
        ([(60, 0.0), (60, 0.1)] * 2, 100),
    ],
)
def test_adaptive_doubles_when_the_kl_at_its_end_has_stopped_falling(history, horizon):
    rows = [{"horizon": h, "late_kl": kl} for h, kl in history]
    assert arms.adaptive(compare.Knobs(max_new_tokens=100), rows)(len(rows)) == horizon


def run_tiny(name: str, **changes) -> tuple[dict, list[float]]:
    """The costs of a run with tiny models, and the parts of the run at which it was scored."""
    settings = {"max_new_tokens": 30, "steps": 4, "batch_size": 6, "esr_tokens": 5, "curve_points": 4}
    knobs = compare.Knobs(**(settings | {"lr": 1e-9} | changes))
    setup = compare.Setup(pair_of(tiny(), tiny(seed=1)), PROMPTS, None, knobs)
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.ArmRun, "look", lambda run, part: parts.append(part))
        run = compare.train_arm(setup, arms.ARMS[name])
    return run.costs(), parts


@pytest.mark.slow
def test_every_arm_runs_and_all_masks_leave_the_same_number_of_tokens():
    costs = {name: run_tiny(name, steps=2)[0] for name in arms.ARMS}
    masked = {name for name, arm in arms.ARMS.items() if arm.mask}
    alike = {*arms.SELECTION, "window"}
    assert alike | {"no-teacher", "no-end"} == masked
    assert len({costs[name]["loss_tokens"] for name in alike}) == 1
    assert len({costs[name]["response_tokens"] for name in (*alike, "full")}) == 1
    for name in arms.ARMS.keys() - masked:
        assert costs[name]["loss_tokens"] == costs[name]["response_tokens"]
    assert costs["topd-0.1"]["response_tokens"] < costs["esr"]["response_tokens"]


@pytest.mark.parametrize("name", ["popd", "first"])
def test_a_run_has_its_curve_points_masked_or_not(name):
    assert run_tiny(name)[1] == [0.25, 0.5, 0.75]


def test_a_run_by_the_clock_takes_increasing_steps_and_ends_on_time(monkeypatch):
    """A step that takes a third of the time leads to a third of the steps; a fast one to the next step."""
    steps = []
    log = compare.ArmRun.log

    def log_with_times(run, rollouts, tokens, **columns):
        steps.append((columns["step"], columns["lr"], columns["horizon"]))
        run.timings = {"rollout_s": 15.0 if len(steps) == 3 else 0.001, "score_s": 5.0, "update_s": 0.0}
        return log(run, rollouts, tokens, **columns)

    monkeypatch.setattr(compare.ArmRun, "log", log_with_times)
    costs, parts = run_tiny("popd", minutes=1.0, steps=24, lr=1.0, warmup=0.0)
    assert [step for step, _, _ in steps] == [0, 2, 4, 12, 14, 16, 18, 20, 22]
    assert costs["steps_done"] == len(steps)
    assert parts == [0.5, 0.75]  # the first quarter was jumped over
    assert steps[-1][1] < 0.05  # the learning rate has come down
    assert steps[-1][2] == 30  # and the horizon up
    monkeypatch.undo()
    fast, _ = run_tiny("topd-0.1", minutes=1000.0)
    assert fast["steps_done"] == 4  # at most --steps


def row(arm, seed, marks, seconds=10.0, tokens=1000, **changes):
    share = marks.count("1") / len(marks)
    found = dict.fromkeys(claims.COLUMNS, 0) | {"arm": arm, "seed": seed, "seconds": seconds}
    found |= {"response_tokens": tokens, "accuracy": share, "correct": marks, "correct_greedy": marks}
    found |= {"n": len(marks)}
    return found | {"lr": "0.001"} | changes


def marks_of(right, total=40, shift=0):
    """`right` of `total` problems, the same ones but for a shift."""
    return "".join("01"[(i + shift) % total < right] for i in range(total))


def write(path, rows):
    append_csv(path, rows)
    return claims.read(path)


def test_standard_error_over_seeds_and_problems():
    """Oracles: a spread over seeds alone, over problems alone, and a simulation of both with noise."""
    seeds, problems = torch.tensor([0.1, 0.4, 0.7, 0.4]).double(), torch.linspace(0, 1, 11).double()
    assert claims.mean_and_se(seeds[:, None].expand(4, 11))[1] == pytest.approx(seeds.std().item() / 2)
    assert claims.mean_and_se(problems.expand(4, 11))[1] == pytest.approx(problems.std().item() / 11**0.5)
    assert (
        claims.mean_and_se(problems[None])[1] == claims.mean_and_se(problems.expand(4, 11))[1]
    )  # problems alone
    generator = torch.Generator().manual_seed(0)
    variances, means = [], []
    for _ in range(2000):
        of_seed, of_problem = (torch.randn(n, 1, generator=generator) for n in (8, 20))
        mean, se = claims.mean_and_se(of_seed + of_problem.T + 2 * torch.randn(8, 20, generator=generator))
        variances.append(se**2)
        means.append(mean)
    assert torch.tensor(variances).mean() == pytest.approx(torch.tensor(means).var().item(), rel=0.15)


def verdicts(text):
    """{claim: (verdict, its numbers)} of a report."""
    lines = [line.split(":", 2) for line in text.splitlines()]
    known = (claims.YES, claims.NO, claims.OPEN)
    return {line[1].strip(): (line[0], line[2]) for line in lines if line[0] in known}


@pytest.mark.parametrize(
    "what, mean, se, expected",
    [
        ("at least as good", -0.040, 0.024, claims.OPEN),  # -10.7 to +2.7 with 5 seeds
        ("at least as good", -0.002, 0.0007, claims.YES),  # below 0, but by far less than the margin
        ("at least as good", -0.20, 0.05, claims.NO),
        ("at least as good", 0.30, 0.05, claims.YES),
        ("at least as good", -0.30, 0.2, claims.OPEN),
        ("equal", 0.01, 0.01, claims.YES),
        ("equal", 0.01, 0.02, claims.OPEN),
        ("equal", 0.20, 0.05, claims.NO),
        ("equal", -0.20, 0.05, claims.NO),
        ("better", 0.03, 0.01, claims.YES),
        ("better", 0.03, 0.02, claims.OPEN),
        ("better", 0.0, 0.0, claims.OPEN),
        ("better", -0.03, 0.01, claims.NO),
    ],
)
def test_verdicts_by_margin(what, mean, se, expected):
    """The limits of each kind, as the claims have them, on the interval of 5 seeds."""
    claim = next(c for c in claims.CLAIMS if what in c.text)
    assert claims.verdict(claims.interval(mean, se, 5), claim.low, claim.high) == expected


def test_t_intervals():
    """Of made-up standard errors, by a table of the t distribution; at most too wide for many seeds."""
    for seeds, quantile in ((3, 4.303), (5, 2.776), (11, 2.228), (50, 2.228)):
        _, _, low, high = claims.interval(1.0, 0.5, seeds)
        assert (low, high) == pytest.approx((1 - quantile / 2, 1 + quantile / 2))


def test_made_up_rows_give_their_verdicts(tmp_path):
    """ESR is 4 points below full by seeds that differ, TOPD 1 point in each seed and on one problem."""
    rows = [row(arm, s, marks_of(n, 100)) for s in range(5) for arm, n in (("full", 90), ("student", 30))]
    rows += [row("esr", s, marks_of(n, 100)) for s, n in enumerate((93, 91, 88, 80, 78))]
    rows += [row("topd-0.1", s, marks_of(89, 100)) for s in range(5)]
    results = write(tmp_path / "c.csv", rows)
    found = verdicts(claims.format_results(results, {}, ("full", "esr", "topd-0.1"), 5, closing=False))
    assert found["esr is at least as good as full"][0] == claims.OPEN
    assert "-4.0 +- 3." in found["esr is at least as good as full"][1]
    assert found["topd-0.1 is at least as good as full"][0] == claims.YES


def test_claims_on_rows_with_known_answers(tmp_path):
    worse = {"last": 10, "random": 20, "top-kl": 25, "top-teacher-entropy": 26, "top-student-entropy": 12}
    accuracy = {"student": 8, "teacher": 39, "full": 36, "topd-0.1": 36, "popd": 36, "first": 36, "esr": 20}
    costs = {"topd-0.1": (1.5, 105), "popd": (7.0, 700)}
    rows = [
        row(arm, seed, marks_of(right, shift=seed), *costs.get(arm, (10.0, 1000)))
        for arm, right in (accuracy | worse).items()
        for seed in range(4)
    ]
    results = write(tmp_path / "c.csv", rows)
    text = claims.format_results(results, {}, tuple(arms.ARMS), 4, closing=False)
    found = {claim: outcome for claim, (outcome, _) in verdicts(text).items()}
    assert found["topd-0.1 is at least as good as full"] == "holds"
    assert found["esr is at least as good as full"] == "does not hold"
    assert found["first is equal to topd-0.1"] == "holds"
    assert all(found[f"first is better than {arm}"] == "holds" for arm in worse)
    assert found["adaptive is at least as good as full"] == claims.OPEN  # no rows
    assert "missing: adaptive (all of it)" in text
    assert claims.RULE in text
    table = next(line for line in text.splitlines() if line.startswith("topd-0.1 "))
    by_hand = "90.0% 3.9% 90.0% 3.9% +0.0% 0.0% 105 0.10 1.5 0.15 4"
    assert table.split() == ["topd-0.1", *by_hand.split()]


def curve(arm, seed, *looks):
    """Rows of looks: (part, right of 40, seconds)."""
    return {(seed, part): row(arm, seed, marks_of(right), seconds) for part, right, seconds in looks}


def test_how_fast_an_arm_is(tmp_path):
    """From 8 of 40 to 36 of 40 the target is at 33.2: interpolated for both arms, to the ends of runs."""
    ends = {"student": (8, 0.0), "full": (36, 10.0), "popd": (36, 7.0), "adaptive": (30, 5.0)}
    rows = [row(arm, s, marks_of(n), seconds) for arm, (n, seconds) in ends.items() for s in range(3)]
    results = write(tmp_path / "c.csv", rows)
    curves = {arm: {} for arm in ("full", "popd", "adaptive")}
    for s in range(3):
        curves["full"] |= curve("full", s, (0.5, 28, 4.0))  # 33.2 at 4 + 5.2 / 8 of 6 seconds: 7.9
        curves["popd"] |= curve("popd", s, (0.25, 34, 1.0), (0.5, 20, 2.0))  # 25.2 / 26 of 1 second
    text = claims.format_results(results, curves, ("full", "popd", "adaptive", "first"), 3, closing=False)
    found = verdicts(text)
    of_popd, numbers = found["popd reaches the target with less than 0.33 of full's seconds"]
    assert of_popd == "holds" and "0.12 [0.12 to 0.12] until 83.0%" in numbers
    assert "popd 1.0 in 3 looks; full 7.9 in 2 looks" in numbers
    outcome, numbers = found["adaptive reaches the target with less than 1.00 of popd's seconds"]
    assert outcome == "does not hold"  # 5 seconds were not enough, and popd took 1
    assert "adaptive never with seed 0, 1, 2" in numbers


@pytest.mark.parametrize("arm, other", [("popd", "full"), ("full", "popd")])
def test_an_arm_that_never_reaches_the_target_is_no_faster_for_having_stopped(tmp_path, arm, other):
    """Its run counts as a whole, which is less than its cost: enough to call it slower, never faster."""
    ends = {"student": (8, 0.0), "full": (36, 10.0), "popd": (20, 1.0)}  # popd ends below the target
    rows = [row(name, s, marks_of(n), seconds) for name, (n, seconds) in ends.items() for s in range(3)]
    results = write(tmp_path / "c.csv", rows)
    curves = {"full": curve("full", 0, (0.5, 30, 5.0)), "popd": curve("popd", 0, (0.5, 20, 0.5))}
    claim = claims.faster(arm, other, "seconds", 1.0)
    outcome, numbers = claim.measure(claim, results, curves)
    assert outcome == claims.OPEN and "popd never with seed 0, 1, 2" in numbers


def test_what_was_not_measured_cannot_be_told(tmp_path):
    names = ("student", "full", *arms.SELECTION, "topd-0.1")
    rows = [row(arm, s, marks_of(8 if arm == "student" else 36)) for arm in names for s in range(3)]
    results = write(tmp_path / "c.csv", rows)
    found = verdicts(claims.format_results(results, {}, tuple(arms.ARMS), 3, closing=False))
    outcome, numbers = found["first reaches the target with less than 1.00 of last's steps done"]
    assert outcome == claims.OPEN and "no curve recorded of first, last" in numbers
    assert found["first is better than last"][0] == claims.OPEN  # both are at the ceiling
    two = {arm: {s: r for s, r in of_arm.items() if s < 2} for arm, of_arm in results.items()}
    text = claims.format_results(two, {}, ("full", "topd-0.1"), 3, closing=False)
    assert "cannot be told from fewer than 3 seeds" in text and not verdicts(text)
    assert "missing: topd-0.1 (seed 2)" in text
    some = results | {"topd-0.1": two["topd-0.1"]}
    text = claims.format_results(some, {}, ("full", "topd-0.1"), 3, closing=False)
    assert {outcome for outcome, _ in verdicts(text).values()} == {claims.OPEN}
    assert "needs 3 seeds of student, full, topd-0.1" in text
    one = {arm: {0: of_arm[0]} for arm, of_arm in results.items()}
    text = claims.format_results(one, {}, ("full",), 1, closing=False)
    assert "a single seed is over the problems alone" in text


@pytest.mark.parametrize("truncated, expected", [(8, "holds"), (36, "does not hold")])
def test_truncation_fails(tmp_path, truncated, expected):
    accuracy = {"student": 8, "full": 38, "popd": 32, "topd-0.1": truncated}
    rows = [row(arm, s, marks_of(right, shift=s)) for arm, right in accuracy.items() for s in range(4)]
    results = write(tmp_path / "c.csv", rows)
    text = claims.format_results(results, {}, ("full", "popd", "topd-0.1"), 4, closing=True)
    assert verdicts(text)["topd-0.1 fails by keeping less than half of full's gain"][0] == expected
    outcome, numbers = verdicts(text)["popd does not fail, keeping more than half of full's gain"]
    assert outcome == "holds" and numbers.strip().startswith("80%, +22.5 +- ")
    flat = results | {"full": results["student"]}  # full has learned nothing: there is no gain to keep
    text = claims.format_results(flat, {}, ("full", "popd", "topd-0.1"), 4, closing=True)
    assert verdicts(text)["topd-0.1 fails by keeping less than half of full's gain"][0] == claims.OPEN


def test_committed_verdicts_recomputed_by_hand():
    """Two verdicts of RESULTS.md from the text of the CSV files alone, by other formulas."""
    folder = Path(claims.__file__).parents[1] / "results"
    rows = read_csv(folder / "compare.csv")
    looks = read_csv(folder / "compare_curves.csv")
    of = {(r["arm"], int(r["seed"])): r for r in rows}
    seeds = range(5)

    # ESR: the spread of the seeds' means, and that of all 500 differences, stay within the margin.
    gaps = [float(of["esr", s]["accuracy"]) - float(of["full", s]["accuracy"]) for s in seeds]
    pairs = [zip(of["esr", s]["correct"], of["full", s]["correct"]) for s in seeds]
    each = [int(esr) - int(full) for marks in pairs for esr, full in marks]
    for values in (gaps, each):
        half = 2.776 * statistics.stdev(values) / len(values) ** 0.5
        assert statistics.fmean(values) - half > -0.05

    # POPD: seconds until 90 % of full's gain, by numpy's interpolation where the curve first crosses it.
    start, end = (
        statistics.fmean(float(of[arm, s]["accuracy"]) for s in seeds) for arm in ("student", "full")
    )
    target = start + 0.9 * (end - start)
    seconds = {}
    for arm in ("popd", "full"):
        for s in seeds:
            path = [(0.0, start)]
            path += [
                (float(r["seconds"]), float(r["accuracy"]))
                for r in looks
                if (r["arm"], r["seed"]) == (arm, str(s))
            ]
            path += [(float(of[arm, s]["seconds"]), float(of[arm, s]["accuracy"]))]
            at = next(i for i, (_, accuracy) in enumerate(path) if accuracy >= target)
            (x0, y0), (x1, y1) = path[at - 1 : at + 1]
            seconds[arm, s] = float(numpy.interp(target, [y0, y1], [x0, x1]))
    ratios = [seconds["popd", s] / seconds["full", s] for s in seeds]
    mean, half = statistics.fmean(ratios), 2.776 * statistics.stdev(ratios) / 5**0.5
    assert mean - half < 1 / 3 < mean + half

    path = folder / "compare.csv"
    found = verdicts(
        claims.format_results(claims.read(path), claims.read_curves(path), tuple(arms.ARMS), 5, closing=False)
    )
    assert found["esr is at least as good as full"][0] == claims.YES
    outcome, numbers = found["popd reaches the target with less than 0.33 of full's seconds"]
    assert outcome == claims.OPEN and f"{mean:.2f} [{mean - half:.2f} to {mean + half:.2f}]" in numbers


@pytest.mark.parametrize(
    "rows, why",
    [
        ([row("full", 0, "01"), row("full", 1, "01") | {"lr": "0.1"}], "would mix lr '0.1' and '0.001'"),
        ([row("full", 0, "01"), row("full", 0, "01")], "line 3 repeats full 0"),
        ([{"arm": "full", "seed": 0}], "line 2 is not a complete row"),
        ([row("full", "x", "01")], "damaged row .*'x'"),
        ([row("full", 0, "01") | {"accuracy": ""}], "damaged row .*''"),
        ([row("full", 0, "01") | {"correct": "1.11E+62"}], "damaged row .*'1.11E.62' is not 2 digits"),
        ([row("full", 0, "01") | {"correct_greedy": "1"}], "damaged row .*'1' is not 2 digits"),
    ],
)
def test_files_that_are_not_one_comparison(tmp_path, rows, why):
    with pytest.raises(BadInput, match=why):
        write(tmp_path / "c.csv", rows)


def test_a_row_that_was_cut(tmp_path):
    path = tmp_path / "c.csv"
    write(path, [row("full", s, "01") for s in range(2)])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadInput, match="line 3 is not a complete row"):
        claims.read(path)


def test_figures_say_what_is_missing(tmp_path, monkeypatch):
    path, said = tmp_path / "c.csv", []
    monkeypatch.setattr(figures.textwrap, "fill", lambda text, width: said.append(text) or text)
    names = ("student", "full", "topd-0.1", "first", "last")
    results = write(path, [row(arm, 0, marks_of(30)) for arm in names])
    drawn = figures.draw(path, results, {}, ("full", "topd-0.1", "popd", "random"), 2)
    assert [p.name for p in drawn] == ["c.png", "c_selection.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in drawn)
    ends = "missing: student (seed 1); teacher (all of it); full (seed 1)"
    assert said == [f"{ends}; topd-0.1 (seed 1); popd (all of it)", f"{ends}; random (all of it)"]
    assert figures.draw(path, {"full": results["full"]}, {}, ("full",), 1) == []


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    compare.main()


@pytest.mark.slow
def test_a_stopped_comparison_continues_and_refuses_other_settings(world, tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.csv"
    flags = ["--arms", "topd-0.1", "--arms", "esr", "--steps", 6, "--eval-limit", 6, "--csv", path]
    flags += ["--batch-size", 4, "--max-new-tokens", 40, "--seeds", 1, "--curve-points", 2]
    flags += ["--keep", tmp_path / "kept"]
    main(monkeypatch, *flags)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["esr-0", "topd-0.1-0"]
    before, after = (load_file(f / "model.safetensors") for f in (world / "student", tmp_path / "kept/esr-0"))
    assert before.keys() == after.keys() and any((before[k] != after[k]).any() for k in before)
    whole = path.read_text()
    rows = read_csv(path)
    assert [r["arm"] for r in rows] == ["student", "teacher", "topd-0.1", "esr"]
    assert [r["loss_tokens"] for r in rows] == ["0", "0", str(6 * 4 * 4), str(6 * 4 * 20)]
    assert len(claims.read_curves(path)["esr"]) == 1

    main(monkeypatch, *flags)
    assert path.read_text() == whole and "already" in capsys.readouterr().out
    monkeypatch.setattr(compare, "load", None)  # not even loaded
    main(monkeypatch, *flags, "--report")
    monkeypatch.undo()

    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:4]))  # without the last run, of esr
    with monkeypatch.context() as patch:  # as on a full disk
        patch.setattr(train.Pair, "save_student", lambda *_: load_file(path))
        with pytest.raises(Stopped, match="cannot write .* name another --csv or --keep"):
            main(patch, *flags)
    assert path.read_text() == "".join(lines[:4])  # no row of a run whose student was not saved
    main(monkeypatch, *flags)
    again = {r["arm"]: r for r in read_csv(path)}
    for r in rows:  # the same as after other runs: the weights are restored before each
        assert {k: again[r["arm"]][k] for k in r if k[-2:] != "_s" and k != "seconds"} == {
            k: r[k] for k in r if k[-2:] != "_s" and k != "seconds"
        }
    with pytest.raises(BadInput, match=r"would mix lr '0.001' and '0.002'"):
        main(monkeypatch, *flags, "--lr", 0.002)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},other", *(f"{line},1" for line in lines)]) + "\n")
    with pytest.raises(BadInput, match="would mix other '1' and None"):
        main(monkeypatch, *flags)
    path.unlink()
    with pytest.raises(BadInput, match="remove it, or name another --csv"):
        main(monkeypatch, *flags)


def test_arms_are_scored_with_one_tokenizer(tmp_path, monkeypatch):
    """Their scorer is `train.score`, which would read the student's ids as the teacher's."""
    pair = replace(pair_of(tiny(), tiny(seed=1)), teacher_tokenizer="another")
    monkeypatch.setattr(train, "load_pair", lambda knobs, device: pair)
    monkeypatch.setattr(compare.data, "problems_of", lambda knobs: ([], []))
    knobs = compare.Knobs(student="A", teacher="B", divergence="sampled")
    with pytest.raises(BadInput, match="A and B have different tokenizers, .* name a teacher of the"):
        compare.load(knobs)


def test_which_world_and_which_file():
    assert [
        compare.choose(given)[1].name
        for given in ({}, {"world": "closing"}, {"preset": "words"}, {"student": "A/b-1.5B"})
    ] == ["compare.csv", "compare_closing.csv", "compare_words.csv", "compare_b-1.5B.csv"]
    assert compare.choose({"world": "closing"})[0].arms == arms.GROUPS["closing"]
    assert compare.choose({})[0].esr_tokens == 20 and compare.choose({"data": "x"})[0].esr_tokens == 100
