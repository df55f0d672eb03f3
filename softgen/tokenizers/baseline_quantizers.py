"""What SoftVQ's quantiser is compared with, in the same network: hard codes, and none at all.

Shape legend: B batch, L latent tokens, K codes, D code dimension.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from softgen.relaxation import widen
from softgen.tokenizers.codebook import EMACodebook


class HardQuantizer(nn.Module):
    """VQ: the nearest of K unit vectors, which follow the latents by moving averages.

    Args:
        num_codes: K.
        code_dim: D.
    """

    def __init__(self, *, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.codebook = EMACodebook(num_codes=num_codes, code_dim=code_dim)

    def prepare(self, latents: Tensor) -> Tensor:
        """Latents (B, L, D) as they are compared with codes: unit vectors, float32 at least."""
        return F.normalize(widen(latents), dim=-1)

    def forward(self, latents: Tensor) -> Tensor:
        """Nearest codes (B, L, D) of latents (B, L, D), with the gradient of the unit latents (straight-through)."""
        unit = self.prepare(latents)
        # In this order the values are exactly those of the codes.
        return self.codebook.codes[self.codebook.nearest(unit.detach())] + (unit - unit.detach())

    def codes(self, latents: Tensor) -> Tensor:
        """Numbers of the nearest codes, (1, B L) int64."""
        return self.codebook.nearest(self.prepare(latents)).view(1, -1)


class NoQuantizer(nn.Module):
    """A plain autoencoder: latents are left as they are."""

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, L, D) of any values, float32 at least."""
        return widen(latents)
