"""One step of on-policy distillation on one short answer, with all its numbers.

    python -m extras.trace                                         the toy models
    python -m extras.trace --student A --teacher B --question "What is 2 + 2?"

For every sampled token it prints what both models predicted, the sampled estimator, and the reverse KL. For
the tokens with the largest gradient and the largest KL, or with --every for all, it prints the terms of the
KL, its gradient by formula, by autograd and by the estimator, and the gradients of two similar losses that
are wrong. Then it makes one update, and prints the same tokens again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import opd
import train
from rollout import Rollout, hidden_states, model_inputs, rollout, sampling_noise
from support import data, models, toy
from support.cli import BadInput, knob, parse, run_main
from support.prompts import render


@dataclass(frozen=True)
class Knobs:
    student: str = knob("", "hub name or folder; default: the toy's student", group="what is traced")
    teacher: str = knob("", "hub name or folder; default: the toy's teacher")
    question: str = knob("", "default: the first held-out problem of the toy")
    instruction: str = knob("", "text after the question, for example train.py's own")
    tokens: int = knob(8, "tokens of the answer", least=1)
    top: int = knob(5, "tokens of each distribution that are shown", least=2)
    every: bool = knob(False, "terms and gradients of every token, not only of one or two")
    seed: int = knob(0, "of the sampling", least=0, most=2**32)
    lr: float = knob(1e-3, "of the one update, by AdamW", least=0)


def log_probs_of(pair: train.Pair, rollouts: Rollout) -> tuple[Tensor, Tensor]:
    """The log-probabilities of student and teacher at each of the N sampled tokens, (N, V) each."""
    ids, predicts = model_inputs(rollouts, [0], rollouts.response_mask)
    with torch.no_grad():
        teacher = opd.log_probs(pair.teacher_head(hidden_states(pair.teacher, ids)[predicts]))
        student = opd.log_probs(pair.student_head(hidden_states(pair.student, ids)[predicts]))
    return student, teacher


def gradients(student_logp: Tensor, teacher_logp: Tensor) -> dict[str, Tensor]:
    """Gradients with respect to the student's logits of one token, (V,) each.

    Those of estimators are their expected values: the sum over every token y of p(y) times the gradient that
    y would give.
    """
    p = student_logp.exp()
    log_ratio = student_logp - teacher_logp
    every_token = torch.zeros(len(p), dtype=torch.long)  # of (V, 1): each token is a row of its own

    def autograd(loss: Callable[[Tensor], Tensor]) -> Tensor:
        logits = student_logp.clone().requires_grad_()  # log-probabilities are logits, too
        loss(torch.log_softmax(logits, dim=-1)).backward()
        return logits.grad

    def estimator(logp: Tensor) -> Tensor:
        return p @ opd.sampled_reverse_kl(logp[:, None], teacher_logp[:, None], every_token)

    return {
        "reverse KL, formula": p * (log_ratio - (p * log_ratio).sum()),
        "reverse KL, autograd": autograd(lambda logp: opd.reverse_kl(logp, teacher_logp, None)),
        "E[-A log p(y)]": autograd(estimator),
        "E[k1], wrong": autograd(lambda logp: p @ (logp - teacher_logp)),
        "E[k3], wrong": autograd(lambda logp: p @ ((teacher_logp - logp).exp() - 1 - (teacher_logp - logp))),
        "forward KL": autograd(lambda logp: opd.forward_kl(logp, teacher_logp, None)),
    }


class Names:
    """Tokens as printable text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        text = self.tokenizer.decode([int(token)])
        text = text.replace(" ", "\u2423")  # an open box: "step" and " step" are two tokens
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

    def top(self, logp: Tensor, k: int) -> str:
        values, ids = logp.exp().topk(min(k, len(logp)))
        return "  ".join(f"{self(i)} {value:.2g}" for value, i in zip(values.tolist(), ids.tolist()))


def answer_table(names: Names, tokens: Tensor, student: Tensor, teacher: Tensor, top: int) -> str:
    """One line for each token with the numbers, two lines with what the models predicted."""
    lines = []
    for i, token in enumerate(tokens.tolist()):
        kl = opd.reverse_kl(student[i : i + 1], teacher[i : i + 1], tokens[i : i + 1]).item()
        log_p, log_q = student[i, token].item(), teacher[i, token].item()
        advantage = log_q - log_p
        facts = f"log p(y) {log_p:7.3f}   log q(y) {log_q:7.3f}   A {advantage:7.3f}"
        facts += f"   -A log p(y) {-advantage * log_p:7.3f}   reverse KL {kl:6.3f}"
        lines.append(f"{i + 1:3}  {names(token):<14} {facts}")
        lines.append(f"       student  {names.top(student[i], top)}")
        lines.append(f"       teacher  {names.top(teacher[i], top)}")
    return "\n".join(lines)


def token_table(names: Names, student: Tensor, teacher: Tensor, top: int) -> str:
    """The terms of one token's reverse KL and the gradients, for the `top` tokens with the largest terms."""
    terms = student.exp() * (student - teacher)
    rows = {"p": student.exp(), "log p": student, "log q": teacher, "p (log p - log q)": terms}
    rows |= gradients(student, teacher)
    chosen = terms.abs().topk(min(top, len(terms))).indices.tolist()
    width = max(map(len, rows))
    head = [names(token)[:11] for token in chosen] + ["others", "sum"]
    lines = [" " * width + "".join(f"{name:>12}" for name in head)]
    for name, values in rows.items():
        cells = [values[token].item() for token in chosen]
        if not name.startswith("log"):  # a sum of logarithms says nothing
            total = values.sum().item()
            cells += [total - sum(cells), total]
        lines.append(f"{name:{width}}" + "".join(f"{cell:12.6f}" for cell in cells))
    return "\n".join(lines)


def hand_check(names: Names, student: Tensor, teacher: Tensor, number: int) -> str:
    """How to compute the gradient of one logit of token `number` by hand."""
    terms = student.exp() * (student - teacher)
    token = int(terms.abs().argmax())
    kl, p, term = terms.sum().item(), student[token].exp().item(), terms[token].item()
    gradient = term - p * kl
    sign, moves = ("positive", "lowers") if gradient > 0 else ("negative", "raises")
    if gradient == 0:  # p = q
        sign, moves = "zero", "keeps"
    return f"""
To check by hand, for token {number}: in each column but the last two multiply p by (log p - log q). These
products, those of the other tokens included, sum to the reverse KL, {kl:.6f} nats. The gradient of a logit is
its own product minus p times that sum: for {names(token)!r} {term:.6f} - {p:.6f} * {kl:.6f} = {gradient:.6f}.
It is {sign}, so the update {moves} this logit. Where p is almost 1, the gradient is almost 0, however large
the KL is: the student never samples what the teacher would prefer. Only other earlier tokens can change it.
k1 = log p(y) - log q(y) has the right value, but its gradient is zero on average: as a loss it teaches
nothing. The gradient of k3 is p - q, that of the forward KL, which is another objective."""


def update(pair: train.Pair, rollouts: Rollout, lr: float) -> None:
    """One AdamW step on this answer, as in training."""
    optimizer = train.adamw(pair, train.Knobs())
    optimizer.param_groups[0]["lr"] = lr
    train.score(pair, rollouts)
    optimizer.step()
    pair.copy_masters_to_weights()


def main() -> None:
    knobs = Knobs(**parse(Knobs, __doc__))
    world = toy.build("opening")
    question = knobs.question or data.read_problems(str(world), "test")[0].question
    settings = train.Knobs(
        student=knobs.student or str(world / "student"),
        teacher=knobs.teacher or str(world / "teacher"),
        checkpointing=False,
        dtype="float32",
    )
    pair = train.load_pair(settings, torch.device("cpu"))
    names = Names(pair.tokenizer)
    prompt = render(pair.tokenizer, [data.Problem(question, "")], knobs.instruction)[0]
    if len(prompt) + knobs.tokens > models.context_length(pair.student.config):
        what = f"the prompt of {len(prompt)} tokens and --tokens {knobs.tokens} exceed the student's context"
        raise BadInput(f"{what}: lower --tokens")
    print(f"The prompt, {len(prompt)} tokens: {' | '.join(map(names, prompt))}\n")

    noise = sampling_noise([(knobs.seed, 0, 0)], knobs.tokens)
    rollouts = rollout(pair.student, [prompt], knobs.tokens, pair.eos_ids, noise, 1.0, pair.vocab_size)
    tokens = rollouts.tokens[rollouts.response_mask]
    student, teacher = log_probs_of(pair, rollouts)  # (N, V) each
    kl = opd.reverse_kl(student, teacher, tokens)
    print(
        f"1. The student samples {len(tokens)} tokens. 2. The teacher scores each; A = log q(y) - log p(y)."
    )
    print(answer_table(names, tokens, student, teacher, knobs.top))
    print(f"\nThe loss is the mean of the reverse KL over the tokens: {kl.mean():.5f} nats.")
    gradient = (student.exp() * (student - teacher - kl[:, None])).norm(dim=-1)  # of each token's logits
    by_gradient = gradient.argsort(descending=True).tolist()
    telling = dict.fromkeys([by_gradient[0], int(kl.argmax())])
    for i in range(len(tokens)) if knobs.every else telling:
        size = f"a reverse KL of {kl[i]:.3f} nats and a gradient of norm {gradient[i]:.4f}"
        print(f"\nToken {i + 1}, {names(tokens[i])!r}, has {size}. By terms of the vocabulary:")
        print(token_table(names, student[i], teacher[i], knobs.top))
    print(hand_check(names, student[by_gradient[0]], teacher[by_gradient[0]], by_gradient[0] + 1))

    update(pair, rollouts, knobs.lr)
    student, teacher = log_probs_of(pair, rollouts)
    print(f"\n3. The same tokens after one AdamW step with learning rate {knobs.lr:g}:")
    print(answer_table(names, tokens, student, teacher, knobs.top))
    print(f"\nThe loss is now {opd.reverse_kl(student, teacher, tokens).mean():.5f} nats.")


if __name__ == "__main__":
    run_main(main)
