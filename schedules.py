"""How long a rollout may be at each step: the only thing in which OPD, POPD, TOPD and ESR differ.

H = horizon(step): sampling stops after H response tokens, or at an end token if that comes first.
T = budget: the full length, `--max-new-tokens`. `python schedules.py` draws H in the terminal.
"""

import math
from collections.abc import Callable
from functools import partial

from cli import BadInput


def fixed(step: int, budget: int, start: int, growth: int, interval: int) -> int:
    """OPD: H = T. TOPD: H = rho * T (arXiv 2605.31490). ESR: H = N tokens (arXiv 2605.27028). All the run."""
    return start


def popd(step: int, budget: int, start: int, growth: int, interval: int) -> int:
    """Progressive OPD: H = min(T, H_0 + growth * floor(step / interval)) (arXiv 2605.31490)."""
    return min(budget, start + growth * (step // interval))


# A new schedule is one function above and one entry here: name: (law, default --horizon).
SCHEDULES = {"full": (fixed, 1.0), "popd": (popd, 0.1), "topd": (fixed, 0.1), "esr": (fixed, 100)}


def make_schedule(
    name: str,
    budget: int,  # T
    steps: int,
    horizon: float | None = None,  # up to 1 a fraction of T, above 1 tokens
    growth: int | None = None,  # POPD's, in tokens; by default T is reached at 2/3 of the run (ours)
    interval: int | None = None,  # POPD's, in steps; by default 1/30 of the run (ours: none is published)
) -> Callable[[int], int]:
    """The function step -> H; None is a default. Raises BadInput if the settings make no schedule."""
    law, default = SCHEDULES[name]
    horizon = default if horizon is None else horizon
    if not 0 < horizon <= max(budget, 1) or (horizon > 1 and horizon != int(horizon)):
        what = f"horizon {horizon:g} is neither a fraction (above 0, up to 1) nor a whole number of tokens"
        raise BadInput(f"{what} within the budget: lower it, or raise --max-new-tokens {budget}")
    start = int(horizon) if horizon > 1 else max(1, round(horizon * budget))
    if name == "full" and start < budget:
        raise BadInput(f"horizon {horizon:g} is not full: drop --horizon, or use --schedule topd")
    if law is not popd and (growth, interval) != (None, None):
        raise BadInput(f"schedule {name} does not grow: drop POPD's growth and interval, or use popd")
    interval = max(1, steps // 30) if interval is None else interval
    if growth is None:
        growth = math.ceil((budget - start) / max(1, steps * 2 // 3 // max(1, interval)))
    if law is popd and (growth < 1 or not 1 <= interval < steps):
        what = f"popd from {start} to {budget} tokens in {steps} steps, {growth} more every {interval}"
        raise BadInput(f"{what}, never grows: start lower, grow by more, or more often")
    return partial(law, budget=budget, start=start, growth=growth, interval=interval)


if __name__ == "__main__":
    for name in SCHEDULES:
        horizons = [make_schedule(name, 1024, 60)(step) for step in range(60)]
        print(f"\n{name}: {sum(horizons) / 60 / 1024:.0%} of the tokens of full rollouts")
        for step in range(0, 60, 6):
            print(f"  step {step:2d} {'█' * (horizons[step] // 16):<64} {horizons[step]}")
