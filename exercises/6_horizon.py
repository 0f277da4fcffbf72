"""Exercise 6: the horizon of POPD, and what a truncated response is.

Sampling is the expensive part of a step: one forward pass per token. POPD (progressive on-policy
distillation) stops it after H tokens, the horizon, and raises H during the run. At step k, counted from 0,

    H = min(T, H0 + growth * floor(k / interval))

T is the budget, the longest response allowed: every `interval` steps H rises by `growth` tokens, up to T. A
response longer than H is truncated: it has H tokens and no eos token, the token that ends a text. None is
appended, because the student did not write one there: its loss would be about a decision that the student
never made. The real ones are `schedules.staircase` and `finished` in `rollout.rollout`.
"""

from schedules import make_schedule


def horizon_at(step: int, budget: int, start: int, growth: int, interval: int) -> int:
    """H in tokens at `step`, with T = budget and H0 = start."""
    raise NotImplementedError("floor(k / interval) is a division of integers in Python: k // interval.")


def truncate(response: list[int], horizon: int, eos_id: int) -> tuple[list[int], bool]:
    """The first `horizon` tokens of the response, and whether it ended by itself within them.

    `response` is what the student would write without a horizon; its last token is the eos token.
    """
    raise NotImplementedError(
        "A slice, and one comparison. A response ended by itself if the last token kept is the eos token; "
        "its length does not say so."
    )


def test_the_horizon_by_hand():
    steps = [0, 4, 5, 9, 10, 20, 22, 23, 25, 1000]
    expected = [10, 10, 30, 30, 50, 90, 90, 90, 100, 100]
    found = [horizon_at(step, budget=100, start=10, growth=20, interval=5) for step in steps]
    assert max(found) <= 100, (
        f"A horizon of {max(found)} is above the budget of 100: take the minimum with T."
    )
    assert found[:3] == [10, 10, 30], (
        f"H at steps 0, 4 and 5 is {found[:3]}, expected [10, 10, 30]: it rises every 5 steps by "
        "20 tokens, and not a little at every step. Is the division rounded down?"
    )
    assert found == expected, f"At steps {steps} H is {found}, expected {expected}: compare with the formula."


def test_the_horizon_is_that_of_the_project():
    settings = {"budget": 1024, "growth": 7, "interval": 3}
    project = make_schedule("popd", steps=600, horizon=100, **settings)
    for step in range(600):
        found = horizon_at(step, start=100, **settings)
        assert found == project(step), f"Step {step}: H is {found}, that of schedules.py is {project(step)}."
        assert isinstance(found, int), f"H is a number of tokens, so an int, not {found!r}."


def test_a_truncated_response_has_no_eos_token():
    eos = 2
    kept, finished = truncate([5, 6, 7, 8, eos], horizon=3, eos_id=eos)
    assert eos not in kept, (
        f"{kept} contains the eos token {eos}: none is appended or put in. The student did not stop "
        "here, and the loss would teach it about stopping in the middle of a sentence."
    )
    assert kept == [5, 6, 7], f"The first 3 tokens are [5, 6, 7], not {kept}."
    assert not finished, "The horizon cut this response: it did not end by itself."


def test_a_response_that_ends_within_the_horizon_is_whole():
    response = [5, 6, 2]
    for horizon in (4, 3):
        kept, finished = truncate(list(response), horizon, eos_id=2)
        assert kept == response, f"3 tokens within a horizon of {horizon} are kept as they are, not {kept}."
        assert finished, (
            f"It ended by itself: its last token is eos. Its length of {len(kept)} does not matter."
        )
