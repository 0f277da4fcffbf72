def horizon_at(step: int, budget: int, start: int, growth: int, interval: int) -> int:
    """H in tokens at `step`, with T = budget and H0 = start."""
    return min(budget, start + growth * (step // interval))


def truncate(response: list[int], horizon: int, eos_id: int) -> tuple[list[int], bool]:
    """The first `horizon` tokens of the response, and whether it ended by itself within them."""
    kept = response[:horizon]
    return kept, kept[-1] == eos_id
