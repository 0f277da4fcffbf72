from torch import Tensor


def sampled_loss(student_logp: Tensor, teacher_logp: Tensor, tokens: Tensor) -> Tensor:
    """-A log p(y) at each of N places: log-probabilities (N, V), (N, V), sampled tokens (N,) -> (N,)."""
    student_token_logp = student_logp.gather(-1, tokens[:, None]).squeeze(-1)
    teacher_token_logp = teacher_logp.gather(-1, tokens[:, None]).squeeze(-1)
    advantage = (teacher_token_logp - student_token_logp).detach()
    return -advantage * student_token_logp
