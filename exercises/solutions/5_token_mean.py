from collections.abc import Callable

from torch import Tensor


def backward_of_a_step(
    token_losses: Callable[[Tensor], Tensor],  # the forward pass: inputs -> (M, R), one loss per place
    micro_batches: list[tuple[Tensor, Tensor]],  # (inputs, mask (M, R) bool: True on response tokens)
) -> None:
    """Backpropagate the mean loss of all response tokens of the step, one micro-batch at a time."""
    normalizer = sum(mask.sum() for _, mask in micro_batches)
    for inputs, mask in micro_batches:
        loss = token_losses(inputs)[mask].sum() / normalizer
        loss.backward()
