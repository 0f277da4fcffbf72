from torch import Tensor


def response_mask(tokens: Tensor, eos_id: int) -> Tensor:
    """True on the tokens of each response, its first eos token included: (B, R) int64 -> (B, R) bool."""
    is_eos = (tokens == eos_id).long()
    eos_before = is_eos.cumsum(-1) - is_eos
    return eos_before == 0
