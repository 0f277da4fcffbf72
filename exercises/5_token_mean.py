"""Exercise 5: one mean over all tokens of a step.

The loss of a step is the mean over all response tokens of its batch. A batch that does not fit into memory is
split into micro-batches. Each has its own forward and backward; backward() adds to the gradients that are
already in .grad, so after the last one they are those of the whole batch. That is true only if each
micro-batch divides by the number of tokens of the whole step, the normalizer. The mean of the micro-batches'
means is something else: if one has 1 token and another has 3, the single token gets three times the weight of
each of the others. The result would depend on the split, which should change memory alone.
The real ones are `train.score`, which counts the tokens, and `opd.opd_backward`, which divides.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def backward_of_a_step(
    token_losses: Callable[[Tensor], Tensor],  # the forward pass: inputs -> (M, R), one loss per place
    micro_batches: list[tuple[Tensor, Tensor]],  # (inputs, mask (M, R) bool: True on response tokens)
) -> None:
    """Backpropagate the mean loss of all response tokens of the step, one micro-batch at a time."""
    raise NotImplementedError(
        "First count the True places of all masks. Then, for each micro-batch: sum the losses at its True "
        "places, divide by that count, and call backward()."
    )


def test_one_and_three_tokens_by_hand():
    """The loss of a token is weight * x, so the weight's gradient is the mean of x: (10 + 2 + 2 + 2) / 4."""
    weight = torch.ones((), requires_grad=True)
    short = (torch.tensor([[10.0]]), torch.tensor([[True]]))
    long = (torch.tensor([[2.0, 2.0, 2.0, 99.0]]), torch.tensor([[True, True, True, False]]))
    backward_of_a_step(lambda x: weight * x, [short, long])
    assert weight.grad is not None, "There is no gradient: call backward() on each micro-batch's loss."
    mistakes = {
        6.0: "a mean of means: the single token of one micro-batch counts as much as the other's three",
        12.0: "a sum of the micro-batches' means: each was divided by its own number of tokens",
        16.0: "a sum over the tokens, without a normalizer",
        3.2: "divided by the number of places: padding has no loss and is not counted either",
    }
    gradient = round(weight.grad.item(), 4)
    hint = mistakes.get(gradient, "compare with the mean written out above")
    assert gradient == 4, f"The gradient is {gradient}, expected 4: {hint}."


def test_the_split_does_not_matter():
    torch.manual_seed(0)
    inputs, weight = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3, 1])[:, None]
    gradients = []
    for rows in ([6], [3, 3], [1, 5], [1] * 6):
        leaf = weight.clone().requires_grad_()
        parts = list(zip(inputs.split(rows), mask.split(rows)))
        backward_of_a_step(lambda x, leaf=leaf: (x @ leaf) ** 2, parts)
        gradients.append(leaf.grad)
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0]), (
            "The same batch, split in another way, has another gradient: divide by the number of tokens of "
            "the whole step."
        )


def test_one_backward_for_each_micro_batch():
    weight = torch.ones((), requires_grad=True)
    seen = []

    def token_losses(x: Tensor) -> Tensor:
        seen.append(weight.grad is not None)
        return weight * x

    backward_of_a_step(token_losses, [(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))] * 3)
    assert seen == [False, True, True], (
        "One forward pass per micro-batch, and its backward before the next one: otherwise the graphs of all "
        "micro-batches are in memory at once, and splitting has saved nothing."
    )
