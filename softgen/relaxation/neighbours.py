"""The neighbour distribution q(z) of SNCE: soft targets that follow the geometry of the codebook.

Shape legend: N latents, K codes, D code dimension.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.relaxation.precision import full_precision

Distance = Literal["l2", "dot", "cosine"]


def neighbour_logits(latents: Tensor, codebook: Tensor, *, two_tau_squared: float, distance: Distance = "l2") -> Tensor:
    """Unnormalised log q_k(z) = -d(z, v_k) / (2 tau^2), up to a constant a latent (SNCE, eq. 5).

    Args:
        latents: Encoder outputs before quantisation, shape (..., D).
        codebook: Code vectors, shape (K, D).
        two_tau_squared: 2 tau^2, in the units of the distance; above 0.
        distance: `l2` is the *squared* Euclidean distance, `dot` is -z.v, `cosine` is minus the cosine similarity.

    Returns:
        Logits, shape (..., K), float32 (float64 for float64 latents).

    Raises:
        ValueError: If 2 tau^2 is not positive, the distance unknown, or the dimensions differ.
    """
    if not two_tau_squared > 0:
        raise ValueError(f"two_tau_squared: expected a number above 0, got {two_tau_squared}")
    if distance not in get_args(Distance):
        raise ValueError(f"distance: expected one of {', '.join(get_args(Distance))}, got {distance!r}")
    if latents.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"latents: expected a last dimension of {codebook.shape[-1]} as the codebook, got {latents.shape[-1]}"
        )
    wide = latents.dtype if latents.dtype == torch.float64 else torch.float32
    z, v = latents.to(wide), codebook.to(wide)
    if distance == "cosine":
        z, v = F.normalize(z, dim=-1), F.normalize(v, dim=-1)
    with full_precision(z):
        if distance != "l2":
            return z @ v.T / two_tau_squared
        # |z - v|^2 is invariant under a common shift; centring keeps float32 exact for codebooks far from 0.
        centre = v.mean(dim=0)
        z, v = z - centre, v - centre
        return (2 * (z @ v.T) - v.square().sum(dim=-1)) / two_tau_squared


def neighbour_distribution(
    latents: Tensor, codebook: Tensor, *, two_tau_squared: float, distance: Distance = "l2"
) -> Tensor:
    """q(z), the categorical distribution over codes near a latent (SNCE, eq. 5). Arguments as `neighbour_logits`.

    Returns:
        Probabilities, shape (..., K).
    """
    logits = neighbour_logits(latents, codebook, two_tau_squared=two_tau_squared, distance=distance)
    return logits.softmax(dim=-1)


def auto_two_tau_squared(latents: Tensor, codebook: Tensor, *, distance: Distance = "l2", factor: float = 3.5) -> float:
    """A 2 tau^2 that fits the codebook: `factor` times the median gap between a latent and its best code.

    For `l2` the gap is the squared distance to the nearest code. The other distances have no natural zero, so the
    gap is taken between the best code and the mean over the latent's ten best.

    Args:
        latents: A sample of training latents, shape (N, D).
        codebook: Code vectors, shape (K, D).
        distance: As in `neighbour_logits`.
        factor: 3 to 4 was best at small scale; the optimum is flat.

    Returns:
        2 tau^2, above 0.
    """
    logits = neighbour_logits(latents, codebook, two_tau_squared=1.0, distance=distance)
    if distance == "l2":
        centred = latents.to(logits.dtype) - codebook.to(logits.dtype).mean(dim=0)
        gap = centred.square().sum(dim=-1) - logits.amax(dim=-1)
    else:
        best = logits.topk(min(10, logits.shape[-1]), dim=-1).values
        gap = best[..., 0] - best.mean(dim=-1)
    median = gap.clamp(min=0).median().item()
    return max(factor * median, torch.finfo(torch.float32).eps)


def perplexity(probs: Tensor) -> Tensor:
    """exp(entropy) of each distribution over the last dimension, shape (...)."""
    entropy: Tensor = torch.special.entr(probs).sum(dim=-1)
    return entropy.exp()
