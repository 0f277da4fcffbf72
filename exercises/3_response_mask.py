"""Exercise 3: which tokens of a batch of responses have a loss.

Responses of a batch differ in length, so their tokens are stored in a rectangle, and the places after the end
of a response hold padding. The mask is True on every token that the student wrote. The student also wrote
the eos token (end of sequence) that ended its response: if that has no loss, nothing teaches it when to stop.
Many tokenizers have no padding token of their own and pad with the eos id, so padding cannot be told from
the eos token by its id, only by its place: all that follows the first eos token is padding. A response that
was cut before its end contains no eos token, and every one of its tokens counts.
`rollout.rollout` avoids the question: it records the mask while it samples, and never looks at ids again.
"""

import torch
from torch import Tensor


def response_mask(tokens: Tensor, eos_id: int) -> Tensor:
    """True on the tokens of each response, its first eos token included: (B, R) int64 -> (B, R) bool."""
    raise NotImplementedError(
        "For each place, count the eos tokens *before* it: cumsum(-1) counts those up to and including it. "
        "(Subtract integers: convert a bool tensor with .long() first.)"
    )


EOS = 2


def check(rows: list[list[int]], expected: list[list[int]], hint: str) -> None:
    for eos_id in (EOS, 11):  # of two tokenizers
        renamed = [[eos_id if token == EOS else token for token in row] for row in rows]
        found = response_mask(torch.tensor(renamed), eos_id)
        assert found.dtype == torch.bool, f"The mask is {found.dtype}: a comparison gives torch.bool."
        for row, mask, right in zip(renamed, found.long().tolist(), expected):
            assert mask == right, f"tokens {row} with eos id {eos_id}: mask {mask}, expected {right}. {hint}"


def test_padding_with_the_eos_id():
    check(
        [[5, 9, 7, EOS, EOS, EOS], [5, EOS, EOS, EOS, EOS, EOS], [EOS, EOS, EOS, EOS, EOS, EOS]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
        "The first eos token was sampled and must be in the mask, or the student never learns when to stop; "
        "the eos ids after it are padding.",
    )


def test_padding_with_another_id():
    """Here padding is 0, which is also the id of an ordinary token that the student may write."""
    check(
        [[5, 0, 7, EOS, 0, 0], [0, EOS, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
        "All after the first eos token is padding, whatever its id, and a 0 before it is an ordinary token.",
    )


def test_a_truncated_response_counts_whole():
    check(
        [[5, 9, 7, 4], [5, 9, 7, EOS], [5, 9, EOS, EOS]],
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]],
        "A row without an eos token was cut, and all its tokens were sampled. An eos token in the last place "
        "belongs to its response.",
    )
