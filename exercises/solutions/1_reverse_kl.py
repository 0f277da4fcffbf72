from torch import Tensor


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher) at each of N places, from log-probabilities: (N, V), (N, V) -> (N,) nats."""
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
