"""The objective of on-policy distillation: a divergence between student and teacher at every response token.

p and q are the next-token distributions of student and teacher, y is the sampled token. All values are in
nats. Shapes: N response tokens of a micro-batch, C tokens of one chunk, V vocabulary, D hidden size (the two
models may differ in it).

At V = 151,936 the fp32 logits of one token take 0.6 MB, so those of a whole batch do not fit into memory.
`opd_backward` therefore takes hidden states and computes logits for one chunk of tokens at a time.
`python -m extras.trace` shows p, q and the gradient of each token of an answer, in numbers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student_logp, teacher_logp, tokens) -> nats, (C,)


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature); the student's is what `rollout` samples from: (C, V) -> (C, V)."""
    if temperature != 1:  # dividing copies the logits, which are among the largest tensors of a step
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1)


def token_logp(logp: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token: (C, V), (C,) -> (C,)."""
    return logp.gather(-1, tokens[:, None]).squeeze(-1)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p (log p - log q), exact: (C, V), (C, V), (C,) -> (C,).

    ESR's loss (Zhou et al., arXiv 2605.27028). The terms - p + q sum to zero over the vocabulary, so they do
    not change the value. They make the gradient in log p equal to p (log p - log q), exactly zero where
    p = q. Without them it has an additional term p, which the backward pass of log_softmax cancels only up
    to rounding. AdamW divides a gradient by its own size, so the rounding error would become an update.
    """
    p, q = student_logp.exp(), teacher_logp.exp()
    return (p * (student_logp - teacher_logp) - p + q).sum(-1)


def forward_kl(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v q (log q - log p): the reverse KL with the two models exchanged.

    Its gradient in log p is p - q, exactly zero where p = q.
    """
    return reverse_kl(teacher_logp, student_logp, tokens)


def jsd(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al., arXiv 2306.13649).

    beta KL(q || m) + (1 - beta) KL(p || m) with the mixture m = beta q + (1 - beta) p. In the
    gradient with respect to log p, the factor log p contributes (1 - beta) p, and the two factors log m
    together -(1 - beta) p. They cancel (in either KL alone they do not), so the logarithms are computed
    without gradient. What remains is (1 - beta) p (log p - log m), exactly zero where p = q.
    """
    with torch.no_grad():
        log_ratio = (teacher_logp - student_logp).clamp_max(80)  # log q - log p; e^89 overflows in fp32
        mixture_gap = torch.log1p(beta * torch.expm1(log_ratio))  # log m - log p, exactly 0 where p = q
        teacher_term = teacher_logp.exp() * (log_ratio - mixture_gap)
    student_term = -student_logp.exp() * mixture_gap
    return (beta * teacher_term + (1 - beta) * student_term).sum(-1)


def sampled_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """One-sample estimator (REINFORCE): -A log p(y) with A = log q(y) - log p(y) of this token, detached.

    POPD's and TOPD's loss (Zhang et al., arXiv 2605.31490). Its expected *gradient* is that of `reverse_kl`;
    its value has no meaning. Differentiating log p(y) - log q(y) itself would teach nothing: the expected
    gradient of log p(y) is zero.
    """
    student_token_logp = token_logp(student_logp, tokens)
    advantage = (token_logp(teacher_logp, tokens) - student_token_logp).detach()
    return -advantage * student_token_logp


def nll(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy -log p(y) of the given tokens, for supervised baselines on a teacher's answers.

    On tokens that the student has sampled, as in train.py, its expected gradient is zero.
    """
    return -token_logp(student_logp, tokens)


# A new divergence is one function above and one entry here.
DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "sampled": sampled_reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "nll": nll,
}


@torch.no_grad()
def token_statistics(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Per-token statistics, (C,) each, whichever loss is used.

    The two `_logp` are those of the token; `agreement` is 1 where both argmaxes are equal, else 0. The mean
    of each statistic over the tokens with a loss is a column of metrics.csv.
    """
    return {
        "reverse_kl": reverse_kl(student_logp, teacher_logp, tokens),
        "student_entropy": -(student_logp.exp() * student_logp).sum(-1),
        "teacher_entropy": -(teacher_logp.exp() * teacher_logp).sum(-1),
        "agreement": (student_logp.argmax(-1) == teacher_logp.argmax(-1)).float(),
        "student_logp": token_logp(student_logp, tokens),
        "teacher_logp": token_logp(teacher_logp, tokens),
    }


def opd_backward(
    student_head: Callable[[Tensor], Tensor],  # (C, D) -> (C, V) logits: `OutputHead` in support/models.py
    student_hidden: Tensor,  # (N, D) the states that predict the tokens
    teacher_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor,  # (N, D) of the teacher
    tokens: Tensor,  # (N,) response tokens with a loss: eos tokens included, prompts and padding not
    normalizer: int,  # tokens with a loss in the whole optimizer step, over all its micro-batches
    divergence: Divergence = reverse_kl,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,  # by default that of the student
    chunk: int = 128,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss = sum of the tokens' divergence / normalizer, backpropagated into the student chunk by chunk.

    Returns the loss, a scalar, and `token_statistics`, (N,) each. Under `torch.no_grad()` nothing is
    backpropagated. Raises ValueError if the lengths differ, or if the divergence does not return one value
    per token.
    """
    lengths = len(student_hidden), len(teacher_hidden), len(tokens)
    if len(set(lengths)) > 1:
        raise ValueError(f"the lengths of student states, teacher states and tokens differ: {lengths}")
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    # Logits of all N tokens would not fit into memory. So the graph is cut at the hidden states: `leaf` has
    # their values, but no history.
    # 1. Each chunk runs head, divergence and backward before the next one starts. This fills its rows of
    #    leaf.grad and frees its graph.
    # 2. After the last chunk, one backward pass takes leaf.grad through the rest of the student.
    leaf = student_hidden.detach().requires_grad_(student_hidden.requires_grad)
    chunks = zip(leaf.split(chunk), teacher_hidden.split(chunk), tokens.split(chunk))
    loss = torch.zeros((), device=tokens.device)
    statistics = []
    for student_chunk, teacher_chunk, token_chunk in chunks:
        student_logp = log_probs(student_head(student_chunk), temperature)  # (C, V)
        with torch.no_grad():
            teacher_logp = log_probs(teacher_head(teacher_chunk), teacher_temperature)  # (C, V)
        token_loss = divergence(student_logp, teacher_logp, token_chunk)  # (C,)
        if token_loss.shape != token_chunk.shape:
            shape = tuple(token_loss.shape)
            raise ValueError(f"the divergence returns the shape {shape}, not one value per token")
        chunk_loss = token_loss.sum() / max(normalizer, 1)  # the normalizer is 0 if no token has a loss
        if chunk_loss.requires_grad:
            chunk_loss.backward()  # into leaf.grad and the head's weight
        loss += chunk_loss.detach()
        statistics.append(token_statistics(student_logp, teacher_logp, token_chunk))
    if leaf.grad is not None:
        student_hidden.backward(leaf.grad)
    return loss, {name: torch.cat([part[name] for part in statistics]) for name in statistics[0]}
