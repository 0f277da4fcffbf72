"""The loss of on-policy distillation: how far the student is from the teacher, on the student's own tokens.

Shapes: N response tokens, C of them in a chunk, V vocabulary, D hidden size (the two models' may differ).
Full fp32 logits are 0.6 MB a token at V = 151,936. So the loss takes hidden states, projects them a chunk
at a time, and takes the chunk's gradient while its logits are at hand: none is kept, none is computed twice.
"""

import torch
from torch import Tensor

from head import Head


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


CHUNK = 1 << 23  # logits held at a time: 32 MB in fp32, which a CPU's allocator still reuses
BLOCK = 8  # chunks whose gradients reach the head's large weight in one matmul
# A new divergence is one function above and one entry here.
DIVERGENCES = {"reverse_kl": reverse_kl, "sampled": sampled_reverse_kl, "forward_kl": forward_kl}


def of_tokens(logp: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token: (C, V), (C,) -> (C,)."""
    return logp.gather(-1, tokens[:, None]).squeeze(-1)


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
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they serve one backward
        return None, None, *(g if g is None else g.mul_(above) for g in gradients)


def opd_loss(
    student: tuple[Head, Tensor],  # head, and the hidden states that predict the response tokens: (N, D)
    teacher: tuple[Head, Tensor],  # the same of the teacher
    tokens: Tensor,  # (N,) sampled tokens: end tokens yes, prompts and padding no
    normalizer: int,  # response tokens in the whole optimizer step, over all its micro-batches
    divergence: str = "reverse_kl",
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the tokens' divergence / normalizer, and their `token_stats`, (N,) each.

    The text before a token is taken as given: no gradient flows through the sampling.
    """
    head, teacher_head, learns = student[0].cut(), teacher[0].cut(), torch.is_grad_enabled()
    inputs, n, v = (student[1], student[0].weight, student[0].bias), len(tokens), head.vocab_size
    wanted = [x is student[1] or (x is not None and x.requires_grad) for x in inputs]
    gradients = [torch.zeros_like(x) if w and learns else None for x, w in zip(inputs, wanted)]
    total, stats, size = tokens.new_zeros((), dtype=torch.float), {}, max(1, chunk // v)
    grad_logits = head.weight.new_empty(min(BLOCK * size, n) if learns else 0, v)  # of a block of chunks
    for start in range(0, max(n, 1), size):
        rows, done = slice(start, start + size), start % (BLOCK * size)  # in the block
        with torch.no_grad():
            hidden = student[1][rows]  # (C, D)
            logits = head.logits(hidden).requires_grad_(learns)  # (C, V)
            teacher_logp = teacher_head.logp(teacher_head.logits(teacher[1][rows]), temperature)  # (C, V)
        student_logp = head.logp(logits, temperature)  # (C, V)
        loss = DIVERGENCES[divergence](student_logp, teacher_logp, tokens[rows]).sum() / max(normalizer, 1)
        total = total + loss.detach()
        for name, values in token_stats(student_logp, teacher_logp, tokens[rows]).items():
            stats.setdefault(name, values.new_empty(n))[rows] = values
        if not learns:
            continue
        # Now, while the logits are at hand, their gradient; that of the large weight in one matmul a block.
        grad_logits[done : done + len(hidden)] = torch.autograd.grad(loss, logits)[0]
        gradients[0][rows] = grad_logits[done : done + len(hidden)] @ head.weight
        if done == (BLOCK - 1) * size or start + size >= n:
            of_block, block = grad_logits[: done + len(hidden)], slice(start - done, start + size)
            if gradients[1] is not None:
                gradients[1][:v].addmm_(of_block.T, student[1][block].detach())
            if gradients[2] is not None:
                gradients[2][:v] += of_block.sum(0)
    return WithGradients.apply(total, gradients, *inputs) if learns else total, stats
