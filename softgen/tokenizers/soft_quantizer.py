"""SoftVQ's quantiser (arXiv 2412.10958): a latent becomes the mean code under its own posterior over the codebook.

Shape legend: B batch, L latent tokens, G groups, R residual levels, K codes, D code dimension, N latents of one group.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softgen.relaxation import (
    DENSE_LIMIT,
    Impl,
    expected_code,
    expected_embedding,
    full_precision,
    probabilities,
    soft_embedding,
    widen,
)

SoftDistance = Literal["l2", "cosine", "dot"]
Temperature = Literal["fixed", "learnable", "predicted"]

_RELEASED_KL_TAU = 0.01


class SoftQuantizer(nn.Module):
    """q(z) = softmax(-d(z, C) / tau) and its expectation q(z) C: no straight-through gradient, no commitment.

    With R levels, each quantises what the levels before it left, and their codes are added up. Eq. 13 prints
    r_l = r_{l-1} - z_l, which would take the sum z_l off at every level anew; here r_l = z - z_l.

    Args:
        num_codes: K, of every codebook.
        code_dim: D.
        groups: G: the tokens are cut into G runs of L / G, each with its own codebook (product quantisation).
        levels: R (residual quantisation), with `l2` alone; 1 for none. Every level of every group has its own codebook.
        distance: `l2`: |z - c|, the norm itself and not its square (eq. 5); codes learn through posterior and mean.
            `cosine`: minus the cosine, as released: latents and codes become unit vectors, and codes learn through the
            mean alone. `dot`: as released, without making them unit vectors.
        tau: Above 0; 0.07 in the paper.
        temperature: `fixed`: tau. `learnable`: one parameter, from tau on. `predicted`: 1 / tau becomes w(z) > 0, a
            function of the latent (GMMVQ, eq. 11), which starts at 1 / tau everywhere.
        key: The config key of these arguments, for error messages.

    Attributes:
        embedding: The codebooks (R G, K, D), those of the first level first.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        code_dim: int,
        groups: int = 1,
        levels: int = 1,
        distance: SoftDistance = "l2",
        tau: float = 0.07,
        temperature: Temperature = "fixed",
        key: str = "quantizer",
    ) -> None:
        super().__init__()
        for name, value in (("num_codes", num_codes), ("code_dim", code_dim), ("groups", groups), ("levels", levels)):
            if value < 1:
                raise ValueError(f"{key}.{name}: expected at least 1, got {value}")
        if distance not in get_args(SoftDistance):
            raise ValueError(f"{key}.distance: expected one of {', '.join(get_args(SoftDistance))}, got {distance!r}")
        if temperature not in get_args(Temperature):
            expected = ", ".join(get_args(Temperature))
            raise ValueError(f"{key}.temperature: expected one of {expected}, got {temperature!r}")
        if not 0 < tau < math.inf:
            raise ValueError(f"{key}.tau: expected a finite number above 0, got {tau}")
        if levels > 1 and distance != "l2":
            raise ValueError(f"{key}.levels: expected 1 unless distance is l2, got {levels} with {distance}")
        self.num_codes, self.code_dim, self.groups, self.levels = num_codes, code_dim, groups, levels
        self.distance: SoftDistance = distance
        self.tau, self.temperature = tau, temperature
        self.embedding = nn.Parameter(F.normalize(torch.randn(levels * groups, num_codes, code_dim), dim=-1))
        if temperature == "learnable":
            self.log_tau = nn.Parameter(torch.full((), math.log(tau)))
        elif temperature == "predicted":
            self.weigh = nn.Linear(code_dim, 1)
            nn.init.zeros_(self.weigh.weight)
            # softplus^-1(1 / tau), in the form that does not overflow.
            nn.init.constant_(self.weigh.bias, 1 / tau + math.log(-math.expm1(-1 / tau)))

    @property
    def codebooks(self) -> Tensor:
        """The codes that are averaged, (R G, K, D), float32 at least; unit vectors where the distance is `cosine`."""
        codes = widen(self.embedding)
        return F.normalize(codes, dim=-1) if self.distance == "cosine" else codes

    def forward(self, latents: Tensor, *, impl: Impl = "auto") -> Tensor:
        """Expected codes (B, L, D), float32, of latents (B, L, D).

        Args:
            latents: Encoder outputs.
            impl: `fused` keeps nothing of size latents x codes; `auto` does so where that is large.

        Raises:
            ValueError: If the latents have another dimension, or G does not divide L.
        """
        z = self._grouped(latents)
        total = torch.zeros_like(z)
        for codes in self._levels():
            total = total + self._means(z - total, codes, impl)
        return self._ungrouped(total, len(latents))

    def posterior(self, latents: Tensor) -> Tensor:
        """q(z): probabilities (R, B, L, K), float32, of latents (B, L, D), stored as a whole."""
        z, probs = self._grouped(latents), []
        total = torch.zeros_like(z)
        for codes in self._levels():
            residual = z - total
            level = [probabilities(self._scores(*pair)) for pair in zip(residual, codes, strict=True)]
            probs.append(self._ungrouped(torch.stack(level), len(latents)))
            total = total + self._means(residual, codes, "auto")
        return torch.stack(probs)

    @torch.no_grad()
    def codes(self, latents: Tensor) -> Tensor:
        """The likeliest code of every latent in each codebook: (R G, B L / G) int64, of latents (B, L, D)."""
        z, chosen = self._grouped(latents), []
        total = torch.zeros_like(z)
        for level, codes in enumerate(self._levels()):
            residual = z - total
            for rows, table in zip(residual, codes, strict=True):
                blocks = torch.split(rows, self._rows())
                chosen.append(torch.cat([self._scores(block, table).argmax(dim=-1) for block in blocks]))
            if level + 1 < self.levels:
                total = total + self._means(residual, codes, "auto")
        return torch.stack(chosen)

    def kl(self, latents: Tensor) -> Tensor:
        """H(q(z)) - H(E q(z)), in nats, between -log K and 0; scalar. E is the mean over the latents given.

        With `l2` as in the paper: of the posterior itself, and a mean over codebooks. With `cosine` and `dot` as
        released: at the temperature 0.01 whatever tau is, with codes that get no gradient, and one E q for all
        codebooks together. (The released logarithm adds 1e-6, which moves the value by less than K 1e-6.)
        """
        z = self._grouped(latents)
        total, entropies, means = torch.zeros_like(z), [], []
        tau = None if self.distance == "l2" else _RELEASED_KL_TAU
        for level, codes in enumerate(self._levels()):
            residual = z - total
            for rows, table in zip(residual, codes, strict=True):
                entropy, mean = self._moments(rows, table, tau)
                entropies.append(entropy)
                means.append(mean)
            if level + 1 < self.levels:
                total = total + self._means(residual, codes, "auto")
        mean = torch.stack(means)
        if tau is not None:
            mean = mean.mean(dim=0, keepdim=True)
        floor = torch.finfo(mean.dtype).tiny
        return torch.stack(entropies).mean() + (mean * mean.clamp(min=floor).log()).sum(dim=-1).mean()

    def _levels(self) -> Iterator[Tensor]:
        """The codebooks (G, K, D) of each level."""
        yield from self.codebooks.unflatten(0, (self.levels, self.groups))  # type: ignore[no-untyped-call]

    def _grouped(self, latents: Tensor) -> Tensor:
        """Latents (G, N, D), float32, from (B, L, D)."""
        if latents.ndim != 3 or latents.shape[2] != self.code_dim:
            raise ValueError(f"latents: expected shape (B, L, {self.code_dim}), got {tuple(latents.shape)}")
        batch, length, dim = latents.shape
        if length % self.groups:
            raise ValueError(f"quantizer.groups: expected a divisor of the {length} tokens, got {self.groups}")
        runs = widen(latents).view(batch, self.groups, length // self.groups, dim)
        return runs.transpose(0, 1).flatten(1, 2)

    def _ungrouped(self, grouped: Tensor, batch: int) -> Tensor:
        """The inverse of `_grouped`."""
        return grouped.view(self.groups, batch, -1, grouped.shape[-1]).transpose(0, 1).flatten(1, 2)

    def _sharpness(self, z: Tensor) -> Tensor | float:
        """1 / tau: one number, or one a latent, (N, 1)."""
        if self.temperature == "learnable":
            return widen(self.log_tau).neg().exp()
        if self.temperature == "predicted":
            with full_precision(z):
                return F.softplus(widen(self.weigh(z.to(self.weigh.weight.dtype))))
        return 1 / self.tau

    def _means(self, z: Tensor, codes: Tensor, impl: Impl) -> Tensor:
        """Expected codes (G, N, D)."""
        return torch.stack([self._mean(*pair, impl) for pair in zip(z, codes, strict=True)])

    def _mean(self, z: Tensor, codes: Tensor, impl: Impl) -> Tensor:
        sharpness = self._sharpness(z)
        if self.distance != "l2":
            return soft_embedding(self._query(z) * sharpness, codes.detach(), codes, impl=impl)
        if self.temperature == "fixed":
            return expected_code(z, codes, tau=self.tau, impl=impl)
        if self.temperature == "learnable":
            return expected_code(z * sharpness, codes * sharpness, tau=1.0, embedding=codes, impl=impl)
        return torch.cat(self._by_block(self._block_mean, z, codes))

    def _block_mean(self, z: Tensor, codes: Tensor) -> Tensor:
        return expected_embedding(probabilities(self._scores(z, codes)), codes)

    def _moments(self, z: Tensor, codes: Tensor, tau: float | None) -> tuple[Tensor, Tensor]:
        """Mean entropy and mean probabilities (K,) over latents (N, D), a block of them at a time."""

        def sums(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            scores = self._scores(rows, table, tau=tau)
            probs = probabilities(scores)
            # Not p log p: where p underflows, its gradient would be infinite.
            return -(probs * scores.log_softmax(dim=-1)).sum(), probs.sum(dim=0)

        blocks = self._by_block(sums, z, codes)
        entropy, mean = (torch.stack(parts).sum(dim=0) / len(z) for parts in zip(*blocks, strict=True))
        return entropy, mean

    def _by_block(self, function: Any, z: Tensor, codes: Tensor) -> list[Any]:
        """`function(rows, codes)` of as many rows at a time as a dense matrix may have; of several, none is kept."""
        blocks = torch.split(z, self._rows())
        if len(blocks) == 1:
            return [function(z, codes)]
        return [_recomputed(function, rows, codes) for rows in blocks]

    def _rows(self) -> int:
        return max(1, DENSE_LIMIT // self.num_codes)

    def _query(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.distance == "cosine" else z

    def _scores(self, z: Tensor, codes: Tensor, *, tau: float | None = None) -> Tensor:
        """Logits (N, K) at the quantiser's own temperature, or at another."""
        with full_precision(z):
            if self.distance == "l2":
                # The other modes expand the square, and lose what is near.
                scores = -torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist")
            else:
                # The released logits do not pass their gradient to the codes.
                scores = self._query(z) @ codes.detach().T
        return scores * (self._sharpness(z) if tau is None else 1 / tau)


def _recomputed(function: Any, *inputs: Tensor) -> Any:
    """`function(*inputs)`, whose activations are computed again in the backward pass instead of being kept."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
