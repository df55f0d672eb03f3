"""The divergences that Di[M]O matches, and their gradients on the logits of the first argument.

With p the auxiliary model's distribution and q the teacher's at one site (Di[M]O, arXiv 2503.15457):

    forward KL    D = KL(q || p)       dD/dlogits_p = p - q
    reverse KL    D = KL(p || q)       dD/dlogits_p = p (log p - log q - KL(p || q))
    Jeffreys      (1 - beta) forward + beta reverse; beta may lie outside [0, 1]
"""

from dataclasses import dataclass

from torch import Tensor

from softgen.relaxation import widen


@dataclass(frozen=True)
class Divergence:
    """Value and gradient of a divergence.

    Attributes:
        value: In nats, shape (...).
        gradient: On the first argument's logits, shape (..., K).
    """

    value: Tensor
    gradient: Tensor


def generalised_jeffreys(logits_p: Tensor, logits_q: Tensor, *, beta: float) -> Divergence:
    """(1 - beta) KL(q || p) + beta KL(p || q) and its gradient on `logits_p`.

    Args:
        logits_p: The auxiliary model's, shape (..., K).
        logits_q: The teacher's, shape (..., K).
        beta: 0 is the forward KL, 1 the reverse; -0.2 is used in a published recipe.

    Returns:
        Float32 (float64 for float64 logits); no gradient flows through either.
    """
    log_p, log_q = _log_probs(logits_p), _log_probs(logits_q)
    p, q = log_p.exp(), log_q.exp()
    ratio = log_p - log_q
    forward = -(q * ratio).sum(dim=-1)
    value, gradient = (1 - beta) * forward, (1 - beta) * (p - q)
    if beta != 0:
        reverse = (p * ratio).sum(dim=-1)
        value = value + beta * reverse
        gradient = gradient + beta * p * (ratio - reverse.unsqueeze(-1))
    return Divergence(value=value, gradient=gradient)


def _log_probs(logits: Tensor) -> Tensor:
    return widen(logits.detach()).log_softmax(dim=-1)
