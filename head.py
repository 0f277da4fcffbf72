"""The output head: from hidden states to log-probabilities. The loss runs it itself, a chunk at a time.

Shapes: C tokens of a chunk, V vocabulary, D hidden size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import BadInput


class Head(NamedTuple):
    """What turns hidden states into logits, cut to the `vocab_size` ids that student and teacher share."""

    weight: Tensor  # (V or more, D)
    bias: Tensor | None
    softcap: float | None  # Gemma 2: logits = softcap * tanh(logits / softcap)
    vocab_size: int

    def cut(self) -> "Head":
        """The same without gradient, of V rows.

        A bias of -inf forbids an id; -1e4 does so too, and adds 0 to a divergence, not 0 * inf = NaN.
        """
        v = self.vocab_size
        bias = None if self.bias is None else self.bias[:v].detach().clamp_min(-1e4)
        return self._replace(weight=self.weight[:v].detach(), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """The matmul: (C, D) -> (C, V), not capped yet."""
        return F.linear(hidden, self.weight, self.bias)

    def logp(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """(C, V) -> (C, V): log softmax(logits / temperature), the law that the tokens were sampled from.

        At least fp32: a bf16 divergence loses up to a third of its gradient.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


@torch.no_grad()
def head_of(model, vocab_size: int) -> Head:
    """A model's output head, checked against the model's own logits.

    Raises BadInput, naming the model's class, if that does more than matmul, bias and soft cap.
    """
    linear, softcap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    head = Head(linear.weight, getattr(linear, "bias", None), softcap, vocab_size)
    ids = torch.arange(8, device=linear.weight.device)[None] % vocab_size
    theirs = model(input_ids=ids, use_cache=False).logits[..., :vocab_size].float().log_softmax(-1)
    ours = head.logp(head.cut().logits(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state))
    if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item()):
        raise BadInput(
            f"{type(model).__name__} changes its logits in a way that head.Head lacks: add it there"
        )
    return head
