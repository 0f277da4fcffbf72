"""The horizon at each step: where OPD, POPD, TOPD and ESR differ (the papers' losses differ too, see opd.py).

    H = min(T, H0 + growth * floor(step / interval))

Sampling stops after H response tokens, or at an eos token if that comes first. T is the budget, the full
response length (`--max-new-tokens`). H0 is `--horizon`: a number of tokens N, or a fraction rho of T.
`python schedules.py` draws H in the terminal.

    full   on-policy distillation: H = T
    popd   progressive OPD: H grows from H0 to T (Zhang et al., arXiv 2605.31490)
    topd   truncated OPD: H = rho * T in all steps (the same paper)
    esr    early stopping rollout: H = N tokens in all steps (Zhou et al., arXiv 2605.27028)

Here `topd` and `esr` differ in their default of `--horizon` alone: both accept N and rho.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from support.cli import BadInput, NoKnobs, parse, run_main


def staircase(step: int, steps: int, budget: int, start: int, growth: int, interval: int) -> int:
    """The horizon in tokens at `step`, which counts from 0: the formula of all four schedules.

    `budget` is T, and `start` is H0 in tokens. A schedule that does not grow has growth 0 and interval 1, so
    H = H0. Every formula is called with all these arguments, by name except `step`; this one ignores `steps`.
    """
    return min(budget, start + growth * (step // interval))


class Schedule(NamedTuple):
    horizon: float  # default of --horizon: up to 1 a fraction of the budget, above 1 a number of tokens
    uses_growth: bool = False  # whether --popd-growth and --popd-interval apply; growth is 0 otherwise
    formula: Callable[..., int] = staircase


# A new schedule is an entry here, with a function like `staircase` if its formula is another one.
SCHEDULES = {
    "full": Schedule(horizon=1.0),
    "popd": Schedule(horizon=0.1, uses_growth=True),
    "topd": Schedule(horizon=0.1),
    "esr": Schedule(horizon=100),
}


def first_horizon(horizon: float, budget: int) -> int:
    """H0 in tokens, at least 1, from a fraction up to 1 or a number of tokens above 1. Raises BadInput."""
    is_valid = 0 < horizon <= budget and (horizon <= 1 or horizon == int(horizon))
    if not is_valid:
        what = f"horizon {horizon:g} is neither a fraction above 0 and up to 1 nor a whole number up to"
        raise BadInput(f"{what} --max-new-tokens {budget}: give one of the two")
    return int(horizon) if horizon > 1 else max(1, round(horizon * budget))


def make_schedule(
    name: str,
    budget: int,
    steps: int,
    horizon: float | str | None = None,
    growth: int | None = None,
    interval: int | None = None,
) -> Callable[[int], int]:
    """The function step -> H in tokens. Raises BadInput if the settings are invalid or contradict each other.

    By default the horizon is the schedule's, and POPD's grows every 1/30 of the run, by an amount with which
    it reaches the budget by 2/3 of the run. This is our choice: we did not find the paper's.
    """
    schedule = SCHEDULES[name]
    if name == "full" and horizon not in (None, 1, budget):
        raise BadInput(f"full has the horizon --max-new-tokens, not {horizon}: drop --horizon, or use topd")
    if horizon is None:
        horizon = schedule.horizon
    if horizon == "auto":
        # Provisional: `main` of train.py calls this again with the measured horizon.
        horizon = min(schedule.horizon, budget)
    start = first_horizon(horizon, budget)
    if schedule.uses_growth:
        if interval is None:
            interval = max(1, steps // 30)
        if growth is None:
            increases = max(1, steps * 2 // 3 // max(1, interval))  # an interval of 0 is refused below
            growth = math.ceil((budget - start) / increases)
        if growth <= 0 or not 0 < interval < steps:
            what = f"{name} from {start} to {budget} tokens in {steps} steps, {growth} more every {interval}"
            raise BadInput(f"{what}, never grows: start lower, grow by more or more often, or raise --steps")
    elif growth is not None or interval is not None:
        raise BadInput(f"--popd-growth and --popd-interval do not apply to {name}: drop them, or use popd")
    else:
        growth = 0
        interval = 1
    settings = {"steps": steps, "budget": budget, "start": start, "growth": growth, "interval": interval}
    horizon_at = partial(schedule.formula, **settings)
    for step, tokens in enumerate(map(horizon_at, range(steps))):
        if not (isinstance(tokens, int) and 1 <= tokens <= budget):
            what = f"{name} gives the horizon {tokens!r} at step {step}"
            raise BadInput(f"{what}: its formula must return a whole number from 1 to the budget, {budget}")
    return horizon_at


def main() -> None:
    parse(NoKnobs, __doc__)  # it has no flag but --help
    budget = 1024
    steps = 60
    for name in SCHEDULES:
        horizon_at = make_schedule(name, budget, steps)
        horizons = [horizon_at(step) for step in range(steps)]
        print(f"\n{name}: {sum(horizons) / (steps * budget):.0%} of the tokens of full rollouts")
        for step in [*range(0, steps, 6), steps - 1]:
            bar = "#" * (64 * horizons[step] // budget)
            print(f"  step {step:2d} {bar:<64} {horizons[step]}")


if __name__ == "__main__":
    run_main(main)
