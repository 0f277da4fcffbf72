"""Exercise 4: which place of the model's output predicts which token.

A causal language model reads a text of L tokens and returns L hidden states, which become logits. The state
at place i has seen tokens 0 to i, and predicts the token at place i + 1:

    place                0     1     2     3     4
    token                What  is    it    ?     Blue      a prompt of 4 tokens, a response of 1
    its state predicts   is    it    ?     Blue  (nothing in this text)

A loss on the response therefore takes the state of the last prompt token, which predicts the first response
token, and leaves out that of the last response token. Prompts differ in length, so the places differ from row
to row. Texts start at place 0, padding is on the right. The real one is `predicts` in `rollout.model_inputs`.
"""

import torch
from torch import Tensor

from rollout import Rollout, model_inputs


def predicting_places(prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """True where the state predicts a response token: (B,), (B,) -> (B, L) bool, L the longest text."""
    raise NotImplementedError(
        "Compare torch.arange(L), the places, with the first and the last predicting place of each row; "
        "lengths[:, None] makes a column, which broadcasts against the places."
    )


def test_two_rows_by_hand():
    found = predicting_places(torch.tensor([3, 1]), torch.tensor([2, 3])).long().tolist()
    assert found != [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]], (
        "Off by one: these are the places of the response tokens. The state at place i predicts token i + 1."
    )
    assert [sum(row) for row in found] == [2, 3], (
        f"{[sum(row) for row in found]} states for responses of 2 and 3 tokens: one state predicts each "
        "token, and each row starts at the end of its own prompt."
    )
    expected = [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert found == expected, "Each row starts at its last prompt token, and has as many places as tokens."


def test_a_model_that_counts():
    """This model has learnt to count: after token n it predicts n + 1. So its predictions come true."""
    prompt_lengths, response_lengths = torch.tensor([2, 5, 1]), torch.tensor([4, 1, 2])
    texts = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25], [30, 31, 32, 0, 0, 0]])
    responses = [12, 13, 14, 15, 25, 31, 32]
    predicted = texts + 1
    found = predicted[predicting_places(prompt_lengths, response_lengths)].tolist()
    assert found == responses, (
        f"The chosen states predict {found}, the responses are {responses}. A token too late: off by one. "
        "Tokens missing or of a prompt: the prompts have 2, 5 and 1 tokens, one slice does not fit all rows."
    )


def test_the_places_are_those_of_the_project():
    torch.manual_seed(0)
    prompt_lengths, response_lengths = torch.randint(1, 8, (2, 20))
    prompts = [[1] * int(n) for n in prompt_lengths]
    mask = torch.arange(7) < response_lengths[:, None]
    rollouts = Rollout(prompts, torch.ones_like(mask).long(), mask, torch.zeros(mask.shape), mask[:, -1])
    _, expected = model_inputs(rollouts, list(range(20)), mask)
    found = predicting_places(prompt_lengths, response_lengths)
    longest = int((prompt_lengths + response_lengths).max())
    assert found.shape == (20, longest), f"(B, L) is (20, {longest}), not {tuple(found.shape)}."
    assert not found[:, -1].any(), "Off by one: the last place of the longest text predicts nothing in it."
    assert torch.equal(found[:, :-1], expected), "These are not the places that rollout.model_inputs selects."
