"""The comparison: masks and causality, resume, and what its rows say, on rows with known answers."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import END, pair_of, tiny
from safetensors.torch import load_file
from tqdm import tqdm

import report
import train
from cli import BadInput, Stopped
from rollout import Rollout, rollout

ROOT = Path(train.__file__).parent
sys.path.insert(0, str(ROOT / "experiments"))

import arms  # noqa: E402
import claims  # noqa: E402
import compare  # noqa: E402
import figures  # noqa: E402

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [0, 0, 4]] * 2


def of_lengths(*lengths) -> Rollout:
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Rollout([[1]] * len(lengths), mask.long(), mask, mask.float(), mask[:, 0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pair_and_rollout(horizon):
    pair = pair_of(tiny(), tiny(seed=1), ends=(END, *range(20, 30)))
    return pair, rollout(pair.student, PROMPTS, horizon, pair.ends, generator=seeded())


RO = of_lengths(6, 3, 1)  # with N = 2 every mask has 2 + 2 + 1 tokens


def test_first_and_last():
    assert arms.first(RO, 2, None, None).int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1] + [0] * 5,
    ]
    assert arms.last(RO, 2, None, None).int().tolist() == [
        [0, 0, 0, 0, 1, 1],
        [0, 1, 1, 0, 0, 0],
        [1] + [0] * 5,
    ]


def test_windows_are_whole_and_start_anywhere():
    generator, starts = seeded(), [set(), set(), set()]
    for _ in range(200):
        for row, mask in enumerate(arms.window(RO, 2, generator, None)):
            where = mask.nonzero().flatten().tolist()
            assert where == list(range(where[0], where[0] + (1 if row == 2 else 2)))
            assert RO.response_mask[row][where].all()
            starts[row].add(where[0])
    assert starts == [{0, 1, 2, 3, 4}, {0, 1}, {0}]


def test_tokens_by_value_are_the_highest_of_the_step_and_never_padding():
    values = torch.tensor([[9.0, 0, 8, 0, 7, 0], [6, 5, 0, 99, 99, 99], [-1, 99, 99, 99, 99, 99]])
    chosen = arms.by_statistic("reverse_kl")(RO, 2, None, lambda name: values)
    assert chosen.nonzero().tolist() == [[0, 0], [0, 2], [0, 4], [1, 0], [1, 1]]
    below_zero = arms.highest(-values.abs() - 1, RO, 99)  # as many as there are
    assert torch.equal(below_zero, RO.response_mask)


def test_scattered_tokens_are_within_the_rows_and_equally_likely():
    generator = seeded()
    masks = torch.stack([arms.scattered(RO, 2, generator, None) for _ in range(400)])
    assert (masks.sum((1, 2)) == 5).all() and not masks[:, ~RO.response_mask].any()
    assert (masks.float().mean(0)[RO.response_mask] - 0.5).abs().max() < 0.1  # 5 of 10


def test_token_values_are_each_tokens_own():
    """Micro-batches come longest row first: values must find their way back to row and position."""
    pair, ro = pair_and_rollout(9)
    found = arms.token_values(pair, ro, train.Knobs(micro_batch=28), "reverse_kl")
    for row, (prompt, tokens, mask) in enumerate(zip(ro.prompts, ro.tokens, ro.response_mask)):
        ids = torch.tensor([prompt + tokens[mask].tolist()])
        laws = [
            model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (pair.student, pair.teacher)
        ]
        kl = F.kl_div(laws[1], laws[0], log_target=True, reduction="none").sum(-1)
        assert torch.allclose(found[row][mask], kl, atol=1e-4) and (found[row][~mask] == 0).all()


def test_first_tokens_of_full_rollouts_teach_what_rollouts_cut_there_teach():
    """Causality: of the same random numbers, both gradients are one: generation beyond N adds cost alone."""
    gradients = []
    for horizon in (12, 4):
        pair, ro = pair_and_rollout(horizon)
        mask = arms.first(ro, 4, None, None)
        train.score(pair, ro, train.Knobs(micro_batch=40), mask)
        gradients.append(torch.cat([master.grad.flatten() for master in pair.masters.values()]))
    assert ro.tokens.shape[1] == 4 and mask.sum() < 4 * len(mask)  # some rows end within it
    assert gradients[0].abs().max() > 0.01
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[0].norm()


def test_adaptive_doubles_when_its_boundary_is_learned():
    knobs = compare.Knobs(max_new_tokens=100)
    assert arms.adaptive(0, knobs, []) == 10
    assert arms.adaptive(4, knobs, [(10, 4.0), (10, 3.0), (10, 2.0), (10, 1.0)]) == 10  # still falling
    assert arms.adaptive(3, knobs, [(10, 1.0)] * 3) == 10  # too early to tell
    assert arms.adaptive(4, knobs, [(10, 1.0)] * 4) == 20
    assert arms.adaptive(8, knobs, [(10, 1.0)] * 4 + [(20, 1.0)] * 2) == 20  # each horizon anew
    assert arms.adaptive(8, knobs, [(60, 0.0), (60, 0.1)] * 2) == 100


def run_tiny(name, **changes):
    pair = pair_of(tiny(), tiny(seed=1))
    sizes = {
        "max_new_tokens": 30,
        "steps": 4,
        "batch_size": 6,
        "esr_tokens": 5,
        "curve_points": 4,
        "lr": 1e-9,
    }
    knobs, parts = compare.Knobs(**(sizes | changes)), []
    with tqdm(disable=True) as bar:
        cost = compare.train_arm(pair, PROMPTS, name, knobs, bar, lambda part, cost: parts.append(part))
    return cost, parts


def test_every_arm_runs_and_all_masks_leave_one_number_of_tokens():
    costs = {name: run_tiny(name)[0] for name in arms.ARMS}
    masked = {name for name, arm in arms.ARMS.items() if arm.mask}
    assert {*arms.SELECTION, "window"} == masked
    assert len({costs[name]["loss_tokens"] for name in masked}) == 1
    assert len({costs[name]["response_tokens"] for name in (*masked, "full")}) == 1
    assert all(costs[n]["loss_tokens"] == costs[n]["response_tokens"] for n in arms.ARMS.keys() - masked)
    assert costs["topd-0.1"]["response_tokens"] < costs["esr"]["response_tokens"]


def test_a_run_by_the_clock_ends_on_time_with_its_schedules_done():
    cost, parts = run_tiny("popd", minutes=0.5 / 60, steps=8)
    assert 0.5 <= cost["seconds"] < 5 and cost["steps_done"] > 0
    assert parts == sorted(set(parts)) and set(parts) <= {0.25, 0.5, 0.75}
    assert run_tiny("popd")[1] == [0.25, 0.5, 0.75]


def row(arm, seed, marks, seconds=10.0, tokens=1000, **changes):
    share = marks.count("1") / len(marks)
    found = dict.fromkeys(claims.COLUMNS, 0) | {"arm": arm, "seed": seed, "seconds": seconds}
    found |= {"response_tokens": tokens, "accuracy": share, "correct": marks, "correct_greedy": marks}
    return found | {"lr": "0.001"} | changes


def marks_of(right, total=40, shift=0):
    """`right` of `total` problems, the same ones but for a shift."""
    return "".join("01"[(i + shift) % total < right] for i in range(total))


def write(path, rows):
    report.append_csv(path, rows)
    return claims.read(path)


def test_standard_error_over_seeds_and_problems():
    """Oracles: a spread over seeds alone, over problems alone, and a simulation of both with noise."""
    seeds, problems = torch.tensor([0.1, 0.4, 0.7, 0.4]).double(), torch.linspace(0, 1, 11).double()
    assert claims.two_way(seeds[:, None].expand(4, 11))[1] == pytest.approx(seeds.std().item() / 2)
    assert claims.two_way(problems.expand(4, 11))[1] == pytest.approx(problems.std().item() / 11**0.5)
    assert claims.two_way(problems[None])[1] == claims.two_way(problems.expand(4, 11))[1]  # problems alone
    generator, variances, means = seeded(), [], []
    for _ in range(2000):
        of_seed, of_problem = (torch.randn(n, 1, generator=generator) for n in (8, 20))
        mean, se = claims.two_way(of_seed + of_problem.T + 2 * torch.randn(8, 20, generator=generator))
        variances.append(se**2)
        means.append(mean)
    assert torch.tensor(variances).mean() == pytest.approx(torch.tensor(means).var().item(), rel=0.15)


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
    of_popd = {
        (seed, part): row("popd", seed, marks_of(right, shift=seed), seconds)
        for seed in range(4)
        for part, right, seconds in ((0.25, 36, 1.0), (0.5, 10, 2.0), (0.75, 36, 3.0))
    }
    text = claims.tell(results, {"popd": of_popd}, tuple(arms.ARMS), 4, closing=False).splitlines()
    told = {line.partition(": ")[2].split(" (")[0]: line.partition(": ")[0] for line in text}
    assert told["TOPD 0.1 reaches full's accuracy with a tenth of the tokens, in 1/5 of the time"] == "holds"
    assert told["POPD reaches full's final accuracy in at most 1/3 of its time"] == "holds"
    assert told["ESR is at least as good as full"] == "does not hold"
    assert told["full rollouts masked to the first tenth end where TOPD 0.1 does"] == "holds"
    assert told["of equally many tokens, the first teach more than any others"] == "holds"
    assert told["TOPD 0.1 at weight 1/T still reaches full's accuracy"] == claims.OPEN
    # The lucky quarter does not count: half way it was not there. 3 of full's 10 seconds.
    assert any("after 75% of its steps and 30% of full's time" in line for line in text)
    assert "missing: adaptive (all of it)" in text
    table = next(line for line in text if line.startswith("topd-0.1 "))
    by_hand = "90.0% 3.9% 90.0% 3.9% +0.0% 0.0% 105 0.10 1.5 0.15 4"
    assert table.split() == ["topd-0.1", *by_hand.split()]


def test_claims_that_fail_or_cannot_be_told(tmp_path):
    rows = [row("full", s, marks_of(36), tokens=1000) for s in range(3)]
    rows += [row("topd-0.1", s, marks_of(36), seconds=2.5, tokens=100) for s in range(3)]
    rows += [row("esr", s, marks_of(right)) for s, right in enumerate((24, 36, 40))]
    results = write(tmp_path / "c.csv", rows)
    assert claims.cheap(results, {})[0] == "does not hold"  # a quarter of the time
    assert claims.not_worse("esr")(results, {})[0] == claims.OPEN  # -7 +- 12 points: it may be either
    assert claims.time_to(results, {}, "esr", "full") is None
    two = {arm: {s: r for s, r in of_arm.items() if s < 2} for arm, of_arm in results.items()}
    text = claims.tell(two, {}, ("full", "topd-0.1"), 3, closing=False)
    assert "holds" not in text and "needs 3 seeds of full, topd-0.1" in text
    assert "missing: topd-0.1 (seed 2)" in text


def test_arms_at_the_same_time_and_with_the_same_tokens(tmp_path):
    """TOPD is ahead when the time is up, and behind full when it had sampled as much as full in the end."""
    timed = {"minutes": "15.0"}
    rows = [
        row("full", 0, marks_of(20), 900, 1100, **timed),
        row("topd-0.1", 0, marks_of(24), 900, 2000, **timed),
    ]
    rows += [row("esr", 0, marks_of(19), 900, 500, **timed)]
    results = write(tmp_path / "c.csv", rows)
    points = ((0.25, 8, 300, 600), (0.5, 16, 600, 1150), (0.75, 22, 700, 1300))
    curve = {(0, part): row("topd-0.1", 0, marks_of(n), s, tokens) for part, n, s, tokens in points}
    text = claims.tell(results, {"topd-0.1": curve}, ("full", "topd-0.1", "esr"), 1, closing=False)
    lines = {line.partition("  ")[0]: line.partition("  ")[2].split() for line in text.splitlines()}
    assert lines["topd-0.1, same time"] == ["+10.0%", "4.8%", "2,000", "1,100", "15.0", "15.0"]
    assert lines["topd-0.1, no more tokens"] == ["-10.0%", "4.8%", "1,150", "1,100", "10.0", "15.0"]
    assert lines["esr, same time"][0] == "-2.5%"
    assert lines["esr, no more tokens"] == ["no", "score", "so", "early"]
    assert "a single seed is over the problems alone" in text and "papers' claims are of equal steps" in text
    untimed = {arm: {0: of_arm[0] | {"minutes": "0.0"}} for arm, of_arm in results.items()}
    assert "same time" not in claims.tell(untimed, {}, ("full", "esr"), 1, closing=False)


@pytest.mark.parametrize("cut, told", [(8, "holds"), (36, "does not hold")])
def test_closing(tmp_path, cut, told):
    accuracy = {"student": 8, "full": 38, "popd": 32, "topd-0.1": cut}
    rows = [row(arm, s, marks_of(right, shift=s)) for arm, right in accuracy.items() for s in range(4)]
    found, numbers = claims.closes(write(tmp_path / "c.csv", rows), {})
    assert found == told and "popd has 80% of full's gain" in numbers


@pytest.mark.parametrize(
    "rows, why",
    [
        ([row("full", 0, "01"), row("full", 1, "01") | {"lr": "0.1"}], "would mix lr '0.001' and '0.1'"),
        ([row("full", 0, "01"), row("full", 0, "01")], "arm full with seed 0 twice"),
        ([{"arm": "full", "seed": 0}], "line 2 is not a whole row"),
    ],
)
def test_files_that_are_not_one_comparison(tmp_path, rows, why):
    with pytest.raises(BadInput, match=why):
        write(tmp_path / "c.csv", rows)


def test_a_row_that_was_cut(tmp_path):
    path = tmp_path / "c.csv"
    write(path, [row("full", s, "01") for s in range(2)])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadInput, match="line 3 is not a whole row"):
        claims.read(path)


def test_figures_say_what_is_missing(tmp_path, monkeypatch):
    path, said = tmp_path / "c.csv", []
    monkeypatch.setattr(
        figures, "finish", lambda *args, finish=figures.finish: said.append(args[3]) or finish(*args)
    )
    results = write(
        path, [row(arm, 0, marks_of(30)) for arm in ("student", "full", "topd-0.1", "first", "last")]
    )
    drawn = figures.draw(path, results, {}, ("full", "topd-0.1", "popd"), 2)
    assert [p.name for p in drawn] == ["c.png", "c_selection.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in drawn)
    missing = [
        "student (seed 1)",
        "teacher (all of it)",
        "full (seed 1)",
        "topd-0.1 (seed 1)",
        "popd (all of it)",
    ]
    assert said[0] == missing and "random (all of it)" in said[1]
    with pytest.raises(BadInput, match="no run of an arm that is drawn"):
        figures.draw(path, {"student": results["student"]}, {}, ("full",), 1)


def main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    compare.main()


def test_a_stopped_comparison_goes_on_and_refuses_other_settings(world, tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.csv"
    flags = ["--arms", "topd-0.1", "--arms", "esr", "--steps", 6, "--eval-limit", 6, "--csv", path]
    flags += ["--seeds", 1, "--curve-points", 2, "--keep", tmp_path / "kept"]
    main(monkeypatch, *flags)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["esr-0", "topd-0.1-0"]
    before, after = (load_file(f / "model.safetensors") for f in (world / "student", tmp_path / "kept/esr-0"))
    assert before.keys() == after.keys() and any((before[k] != after[k]).any() for k in before)
    whole = path.read_text()
    rows = report.read_csv(path)
    assert [r["arm"] for r in rows] == ["student", "teacher", "topd-0.1", "esr"]
    assert [r["loss_tokens"] for r in rows] == ["0", "0", str(6 * 32 * 13), str(6 * 32 * 20)]
    assert len(claims.read_curves(path)["esr"]) == 1

    main(monkeypatch, *flags)
    assert path.read_text() == whole and "already" in capsys.readouterr().out
    monkeypatch.setattr(compare.prepare, "load", None)  # not even loaded
    main(monkeypatch, *flags, "--report")
    monkeypatch.undo()

    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:4]))  # without the last run, of esr
    main(monkeypatch, *flags)
    again = {r["arm"]: r for r in report.read_csv(path)}
    for r in rows:  # alone, it is the run that it was after others: the weights start anew
        assert {k: again[r["arm"]][k] for k in r if k[-2:] != "_s" and k != "seconds"} == {
            k: r[k] for k in r if k[-2:] != "_s" and k != "seconds"
        }
    with pytest.raises(BadInput, match=r"would mix lr '0.001' and '0.002'"):
        main(monkeypatch, *flags, "--lr", 0.002)
    path.unlink()
    with pytest.raises(BadInput, match="remove it too"):
        main(monkeypatch, *flags)


def test_a_student_that_cannot_be_kept_costs_no_row(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Stopped, match="row is written: make room, or name another --keep"):
        compare.keep(pair_of(tiny(), tiny(seed=1)), tmp_path / "file" / "full-0")


@pytest.mark.parametrize(
    "flags, why",
    [
        ("--schedule topd", "--schedule says nothing here"),
        ("--arms best", "invalid choice: 'best'"),
        ("--report --csv /nowhere/c.csv", "there is no /nowhere/c.csv"),
        ("--steps 1 --arms popd --csv /nowhere/c.csv", "never grows"),
        ("--csv /dev/null/c.csv", "name another one with --csv"),
        ("--csv c.csv --keep /dev/null/kept", "name another one with --keep"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, flags, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=why):
        main(monkeypatch, *flags.split())


def test_which_world_and_which_file():
    assert [
        compare.choose(given)[1].name for given in ({}, {"world": "closing"}, {"student": "A/b-1.5B"})
    ] == ["compare.csv", "compare_closing.csv", "compare_b-1.5B.csv"]
    assert compare.choose({"world": "closing"})[0].arms == arms.GROUPS["closing"]
    assert compare.choose({})[0].esr_tokens == 20 and compare.choose({"data": "x"})[0].esr_tokens == 100
