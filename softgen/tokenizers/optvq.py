"""OptVQ (arXiv 2412.15195) as SFTok published it: codes are shared out among the latents by optimal transport.

Shape legend: N latents, K codes, D code dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.relaxation import full_precision, widen

_SHARPNESS, _ITERATIONS, _EPSILON = 10.0, 5, 1e-8


class OptVQCodebook(nn.Module):
    """A table behind one linear map that all codes share, so that every code moves with those in use.

    Args:
        num_codes: K.
        code_dim: D.
        use_l2_norm: Whether codes are unit vectors.
    """

    def __init__(self, *, num_codes: int, code_dim: int, use_l2_norm: bool) -> None:
        super().__init__()
        self.use_l2_norm = use_l2_norm
        self.embedding = nn.Parameter(torch.randn(1, num_codes, code_dim))
        self.shared_linear = nn.Linear(code_dim, code_dim)
        nn.init.eye_(self.shared_linear.weight)
        nn.init.zeros_(self.shared_linear.bias)

    @property
    def codes(self) -> Tensor:
        """The effective code vectors (K, D), float32 at least."""
        with full_precision(self.embedding):
            moved = widen(self.shared_linear(self.embedding[0]))
        return F.normalize(moved, dim=-1) if self.use_l2_norm else moved


@torch.no_grad()
def sinkhorn_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Assign codes to latents as SFTok does: a transport plan between *all* the latents given and the codes.

    The plan starts at exp(-10 |z - c|), with distances from the smallest of all, and is scaled five times by turns, so
    that codes and latents have the same share each. A latent's code so depends on the other latents, and need not be
    the nearest.

    Args:
        latents: (N, D).
        codebook: (K, D).

    Returns:
        (N,), int64.
    """
    with full_precision(latents):
        distances = torch.cdist(widen(codebook), widen(latents), compute_mode="donot_use_mm_for_euclid_dist")
    codes, count = distances.shape
    plan = (-_SHARPNESS * (distances - distances.min())).exp()
    plan = plan / (plan.sum() + _EPSILON)
    for _ in range(_ITERATIONS):
        plan = plan / (plan.sum(dim=1, keepdim=True) + _EPSILON) / codes
        plan = plan / (plan.sum(dim=0, keepdim=True) + _EPSILON) / count
    return (plan * count).argmax(dim=0)


@dataclass(frozen=True)
class Assigned:
    """Latents and their codes, for training.

    Attributes:
        embeddings: Code vectors with the gradient of the latents (straight-through), of the latents' shape.
        loss: w |z - sg(c)|^2 + |sg(z) - c|^2, each a mean over elements; scalar.
    """

    embeddings: Tensor
    loss: Tensor


def straight_through(latents: Tensor, codes: Tensor, *, commitment: float = 0.25) -> Assigned:
    """Quantise latents to code vectors of the same shape, with w = `commitment`."""
    loss = commitment * F.mse_loss(latents, codes.detach()) + F.mse_loss(latents.detach(), codes)
    return Assigned(embeddings=latents + (codes - latents).detach(), loss=loss)
