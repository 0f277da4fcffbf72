import torch
from torch import Tensor


def predicting_places(prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """True where the state predicts a response token: (B,), (B,) -> (B, L) bool, L the longest text."""
    places = torch.arange(int((prompt_lengths + response_lengths).max()))
    first = prompt_lengths[:, None] - 1
    return (places >= first) & (places < first + response_lengths[:, None])
