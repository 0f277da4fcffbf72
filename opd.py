"""The loss of on-policy distillation: how far the student is from the teacher, on the student's own tokens.

Shapes: N response tokens, C of them in a chunk, V vocabulary, D hidden size (the two models' may differ).
Full fp32 logits are 0.6 MB a token at V = 151,936. So the loss takes hidden states, projects them a chunk
at a time, and takes the chunk's gradient while its logits are at hand: none is kept, none is computed twice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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

    def cast(self) -> "Head":
        """A copy in the dtype that matmuls run in, cut to V rows: made once a loss, not once a chunk."""
        kind, v = self.weight.device.type, self.vocab_size
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        weight, bias = (
            x if x is None else x[:v].detach().to(dtype).requires_grad_(x.requires_grad) for x in self[:2]
        )
        return self._replace(weight=weight, bias=bias)

    def parameters(self) -> list[Tensor]:
        return [x for x in (self.weight, self.bias) if x is not None and x.requires_grad]

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


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already: backward hands them out, times what comes from above."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they serve one backward
        return None, None, *(gradient.mul_(above) for gradient in gradients)


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
    head, learns, stats = student[0].cast(), torch.is_grad_enabled(), []
    inputs = [student[1], *student[0].parameters()]
    total, gradients = tokens.new_zeros((), dtype=torch.float), [torch.zeros_like(x) for x in inputs]
    for start in range(0, max(len(tokens), 1), chunk):
        rows = slice(start, start + chunk)
        hidden = student[1][rows].detach().to(head.weight.dtype).requires_grad_(learns)  # (C, D)
        student_logp = head.logp(hidden, temperature)  # (C, V)
        with torch.no_grad():
            teacher_logp = teacher[0].logp(teacher[1][rows], temperature)  # (C, V)
        loss = DIVERGENCES[divergence](student_logp, teacher_logp, tokens[rows]).sum() / max(normalizer, 1)
        stats.append(token_stats(student_logp, teacher_logp, tokens[rows]))
        total = total + loss.detach()
        if learns:
            of_hidden, *of_head = torch.autograd.grad(loss, [hidden, *head.parameters()])
            gradients[0][rows] = of_hidden
            for gradient, part in zip(gradients[1:], of_head):
                gradient[: head.vocab_size] += part
    loss = WithGradients.apply(total, gradients, *inputs) if learns else total
    return loss, {name: torch.cat([s[name] for s in stats]) for name in stats[0]}
