"""A codebook of unit vectors that follows the latents by exponential moving averages."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.distributed import broadcast_from_rank_zero, sum_over_ranks
from softgen.relaxation import full_precision, perplexity, widen
from softgen.tokenizers.parts import by_rows


@dataclass(frozen=True)
class CodebookUsage:
    """How the codes of one update were used; tensors of one number each.

    Attributes:
        used: Share of codes assigned at least once, in [0, 1].
        perplexity: exp(entropy) of the assignments, in [1, K].
        revived: Codes replaced because they were dead.
    """

    used: Tensor
    perplexity: Tensor
    revived: Tensor


class EMACodebook(nn.Module):
    """l2-normalised codes (arXiv 2110.04627) learned by moving averages (VQ-VAE, arXiv 1711.00937, appendix A.1).

    Args:
        num_codes: K.
        code_dim: D.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, *, num_codes: int, code_dim: int) -> None:
        super().__init__()
        codes = F.normalize(torch.randn(num_codes, code_dim), dim=-1)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", codes.clone())

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code of each unit latent (..., D); the first of equals."""
        with full_precision(latents):
            codes = widen(self.codes)
            return by_rows(lambda z: (z @ codes.T).argmax(dim=-1), widen(latents), num_codes=len(codes))

    @torch.no_grad()
    def normalise(self) -> None:
        """Make codes unit vectors again, after something moved them."""
        self.codes.copy_(F.normalize(self.codes, dim=-1))

    @torch.no_grad()
    def reset_to(self, latents: Tensor) -> None:
        """Start over from latents (n, D); n >= K of them become the codes, fewer are repeated."""
        rows = broadcast_from_rank_zero(latents)
        repeats = -(-self.codes.shape[0] // rows.shape[0])
        codes = F.normalize(rows.repeat(repeats, 1)[: self.codes.shape[0]], dim=-1)
        self.codes.copy_(codes)
        self.sums.copy_(codes)
        self.counts.fill_(1.0)

    @torch.no_grad()
    def update(
        self, latents: Tensor, tokens: Tensor, *, candidates: Tensor, decay: float, dead_below: float
    ) -> CodebookUsage:
        """Move the codes towards the latents that chose them, and revive dead ones.

        Args:
            latents: Unit latents (n, D), float32.
            tokens: Their codes (n,).
            candidates: Latents (K, D) to replace dead codes with.
            decay: Of the moving averages, in [0, 1).
            dead_below: A code is dead when its average count falls below this share of the mean count.
        """
        num_codes = self.codes.shape[0]
        counts = sum_over_ranks(torch.zeros_like(self.counts).index_add_(0, tokens, torch.ones_like(latents[:, 0])))
        sums = sum_over_ranks(torch.zeros_like(self.sums).index_add_(0, tokens, latents))
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)

        mean_count = self.counts.mean()
        dead = (self.counts < dead_below * mean_count).unsqueeze(-1)
        fresh = F.normalize(broadcast_from_rank_zero(candidates), dim=-1)
        self.sums.copy_(torch.where(dead, fresh * mean_count, self.sums))
        self.counts.copy_(torch.where(dead.squeeze(-1), mean_count, self.counts))
        self.codes.copy_(F.normalize(self.sums, dim=-1))

        share = counts / counts.sum()
        return CodebookUsage(
            used=(counts > 0).sum() / num_codes,
            perplexity=perplexity(share),
            revived=dead.sum(),
        )
