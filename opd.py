"""The loss of on-policy distillation: how far the student is from the teacher, on the student's own tokens.

Shapes: N response tokens, C of them in a chunk, V vocabulary, D hidden size (the two models' may differ).
Full fp32 logits are 0.6 MB a token at V = 151,936. So the loss takes hidden states and projects them a chunk
at a time; backward projects each chunk again rather than remember its logits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T), exact, (C, V) -> (C,) nats. ESR's loss."""
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def forward_kl(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """KL(teacher || student), for comparison: covers all that the teacher may say; reverse KL picks of it."""
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def sampled_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """Score-function estimator -A log p_S(y), A = log p_T(y) - log p_S(y). POPD's and TOPD's loss.

    Its mean *gradient* is that of reverse KL; its value means nothing. A is detached: the gradient of
    log p_S(y) - log p_T(y) itself averages to zero. A is this token's alone, not a sum over later tokens.
    """
    student_token, teacher_token = of_tokens(student_logp, tokens), of_tokens(teacher_logp, tokens)
    return -(teacher_token - student_token).detach() * student_token


# A new divergence is one function above and one entry here.
DIVERGENCES = {"reverse_kl": reverse_kl, "sampled": sampled_reverse_kl, "forward_kl": forward_kl}


def of_tokens(logp: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token: (C, V), (C,) -> (C,)."""
    return logp.gather(-1, tokens[:, None]).squeeze(-1)


class Head(NamedTuple):
    """What turns hidden states into logits, cut to the `vocab_size` ids that student and teacher share."""

    weight: Tensor  # (V or more, D)
    bias: Tensor | None
    softcap: float | None  # Gemma 2: logits = softcap * tanh(logits / softcap)
    vocab_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, D) -> (C, V), in the dtype that the model itself computes in."""
        cut = len(self.weight) > self.vocab_size  # an idle cut would cost backward a copy of the weight
        weight = self.weight[: self.vocab_size] if cut else self.weight
        logits = F.linear(hidden, weight, None if self.bias is None else self.bias[: self.vocab_size])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logp(self, hidden: Tensor, temperature: float) -> Tensor:
        """(C, D) -> (C, V): log softmax(logits / temperature), the law that the tokens were sampled from.

        At least fp32: a bf16 divergence loses up to a third of its gradient. exp(-1e4) is 0, so that an id
        which both models forbid (logit -inf) adds 0 to the sum, not 0 * inf = NaN.
        """
        logits = self.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.log_softmax(logits / temperature, dim=-1).clamp_min(-1e4)


@torch.no_grad()
def token_stats(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What to know of each token whatever the loss, (C,) each: nats; agreement is 1 or 0."""
    return {
        "reverse_kl": reverse_kl(student_logp, teacher_logp, tokens),
        "student_entropy": -(student_logp.exp() * student_logp).sum(-1),
        "teacher_entropy": -(teacher_logp.exp() * teacher_logp).sum(-1),
        "agreement": (student_logp.argmax(-1) == teacher_logp.argmax(-1)).float(),
        "student_logp": of_tokens(student_logp, tokens),
        "teacher_logp": of_tokens(teacher_logp, tokens),
    }


def opd_loss(
    student: tuple[Head, Tensor],  # head, and the hidden states that predict the response tokens: (N, D)
    teacher: tuple[Head, Tensor],  # the same of the teacher
    tokens: Tensor,  # (N,) sampled tokens: end tokens yes, prompts and padding no
    normalizer: int,  # response tokens in the whole optimizer step, over all its micro-batches
    divergence: str = "reverse_kl",
    temperature: float = 1.0,
    chunk: int = 128,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the tokens' divergence / normalizer, and their `token_stats`, (N,) each.

    The text before a token is taken as given: no gradient flows through the sampling.
    """

    def of_chunk(student_hidden: Tensor, teacher_hidden: Tensor, chunk_tokens: Tensor):
        student_logp = student[0].logp(student_hidden, temperature)  # (C, V)
        with torch.no_grad():
            teacher_logp = teacher[0].logp(teacher_hidden, temperature)  # (C, V)
        loss = DIVERGENCES[divergence](student_logp, teacher_logp, chunk_tokens).sum()
        return loss, token_stats(student_logp, teacher_logp, chunk_tokens)

    total, stats = student[1].sum() * 0, []  # differentiable even without a token
    for chunks in zip(student[1].split(chunk), teacher[1].split(chunk), tokens.split(chunk)):
        loss, chunk_stats = checkpoint(of_chunk, *chunks, use_reentrant=False)
        total = total + loss / max(normalizer, 1)
        stats.append(chunk_stats)
    return total, {name: torch.cat([s[name] for s in stats]) for name in stats[0]}
