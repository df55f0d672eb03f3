"""What a teacher is trained towards: hard codes, smoothed codes, or the neighbours of the latent (SNCE).

Shape legend: B batch, N sites, K codes, D code dimension.
"""

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from softgen.relaxation import Distance, neighbour_distribution

Target = Literal["hard", "label_smoothing", "snce"]


def check_target(target: str, *, label_smoothing: float, two_tau_squared: float | Literal["auto"], key: str) -> None:
    """Refuse impossible settings.

    Raises:
        ValueError: Naming the key, what was expected and what was got.
    """
    if target not in get_args(Target):
        raise ValueError(f"{key}.target: expected one of {', '.join(get_args(Target))}, got {target!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{key}.label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if two_tau_squared != "auto" and not two_tau_squared > 0:
        raise ValueError(f"{key}.two_tau_squared: expected 'auto' or a number above 0, got {two_tau_squared}")


def hard_cross_entropy(logits: Tensor, tokens: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each site, float32.

    Args:
        logits: (B, N, K).
        tokens: (B, N) int64 in [0, K).
        label_smoothing: Mass spread evenly over all codes, in [0, 1].

    Returns:
        (B, N).
    """
    loss = F.cross_entropy(
        logits.float().flatten(0, -2), tokens.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return loss.view(tokens.shape)


def neighbour_cross_entropy_dense(
    logits: Tensor, latents: Tensor, codebook: Tensor, *, two_tau_squared: float, distance: Distance
) -> Tensor:
    """KL(q(z) || p) of each site: SNCE (eq. 8) less the entropy of its target, so that 0 is a perfect fit.

    Args:
        logits: (..., K).
        latents: z, (..., D); the code vectors themselves where only codes are stored.
        codebook: (K, D).
        two_tau_squared: 2 tau^2 of q, above 0.
        distance: Of q.

    Returns:
        (...), float32. Its gradient is that of SNCE.
    """
    q = neighbour_distribution(latents, codebook, two_tau_squared=two_tau_squared, distance=distance)
    return F.kl_div(logits.float().log_softmax(dim=-1), q, reduction="none").sum(dim=-1)
