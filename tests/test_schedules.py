"""Schedules against the papers' formulas."""

import pytest

import schedules
from schedules import make_schedule
from support.cli import BadInput


def test_formulas():
    assert [make_schedule("full", 1000, 10)(k) for k in (0, 9)] == [1000, 1000]
    assert [make_schedule("topd", 15360, 10, rho)(5) for rho in (0.25, 0.1)] == [3840, 1536]  # paper 1
    assert make_schedule("esr", 2048, 200)(150) == 100  # paper 2
    popd = make_schedule("popd", 100, 50, 10, growth=7, interval=3)
    assert [popd(k) for k in range(50)] == [min(100, 10 + 7 * (k // 3)) for k in range(50)]


@pytest.mark.parametrize("steps", [3, 7, 40, 60, 200, 1000])
def test_popd_by_default_is_full_at_two_thirds(steps):
    popd = make_schedule("popd", 1024, steps)
    assert popd(0) == 102 and popd(steps * 2 // 3) == 1024
    if steps >= 40:
        assert popd(steps // 2) < 1024


def test_a_horizon_up_to_1_is_a_fraction():
    assert make_schedule("topd", 128, 10, 1)(0) == 128
    assert make_schedule("topd", 128, 10, 2)(0) == 2
    assert make_schedule("topd", 128, 10, 0.0001)(0) == 1


BAD = [
    ("topd", 0, None, None),
    ("topd", -0.5, None, None),
    ("topd", float("nan"), None, None),
    ("topd", 129, None, None),
    ("topd", 12.5, None, None),
    ("full", 0.5, None, None),
    ("topd", 0.1, 5, None),
    ("popd", 0.1, 0, None),
    ("popd", 0.1, 5, 0),
    ("popd", 0.1, 5, 10),
    ("popd", 1, None, None),
]


@pytest.mark.parametrize("name, horizon, growth, interval", BAD)
def test_settings_that_make_no_schedule(name, horizon, growth, interval):
    with pytest.raises(BadInput, match=": |;"):
        make_schedule(name, 128, 10, horizon, growth, interval)


@pytest.mark.parametrize(
    "formula, value",
    [(lambda step, **_: 4.0, "4.0"), (lambda step, **_: 2 - step, "0"), (lambda step, **_: 129, "129")],
)
def test_the_values_of_a_new_formula_are_checked(monkeypatch, formula, value):
    monkeypatch.setitem(schedules.SCHEDULES, "new", schedules.Schedule(horizon=1.0, formula=formula))
    with pytest.raises(BadInput, match=f"new gives the horizon {value} at step .*from 1 to the budget, 128"):
        make_schedule("new", 128, 10)


def test_full_has_no_horizon_to_measure():
    with pytest.raises(BadInput, match="full has the horizon --max-new-tokens, not auto"):
        make_schedule("full", 128, 10, "auto")
    assert make_schedule("esr", 128, 10, "auto")(0) == 100  # until it has been measured
    assert make_schedule("esr", 50, 10, "auto")(0) == 50
