"""The logits of SNCE's neighbour distribution as products, block of codes by block of codes.

Shape legend: N latents, K codes, k codes of one block, D code dimension.
"""

import math
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.relaxation.neighbours import Distance
from softgen.relaxation.streaming import forbidden_score, spans

_BLOCK = 4096


def check_neighbours(latents: Tensor, codebook: Tensor, *, two_tau_squared: float, distance: str) -> None:
    """Refuse what no neighbour distribution can be made of.

    Raises:
        ValueError: Naming the argument, what was expected and what was got.
    """
    if not two_tau_squared > 0:
        raise ValueError(f"two_tau_squared: expected a number above 0, got {two_tau_squared}")
    if distance not in get_args(Distance):
        raise ValueError(f"distance: expected one of {', '.join(get_args(Distance))}, got {distance!r}")
    check_latents(latents, codebook)


def check_latents(latents: Tensor, codebook: Tensor) -> None:
    """Refuse latents and codebooks that do not fit together, and latents that are not finite.

    NaN and infinities are looked for on the CPU alone: elsewhere the answer would stall the device, and a NaN shows in
    the loss.

    Raises:
        ValueError: Naming the argument, what was expected and what was got.
    """
    if codebook.ndim != 2 or codebook.shape[0] == 0:
        raise ValueError(f"codebook: expected shape (K, D) with at least one code, got {tuple(codebook.shape)}")
    if latents.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        raise ValueError(f"latents: expected shape (N, {codebook.shape[1]}) as codebook, got {tuple(latents.shape)}")
    on_cpu = latents.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not bool(latents.isfinite().all()):
        raise ValueError("latents: expected finite values, got NaN or infinity")


class NeighbourScores:
    """log q_k(z_i) = queries_i . keys_k + offset_k, up to a constant a latent (SNCE, eq. 5; see `neighbour_logits`).

    The squared distance -|z - v|^2 is 2 z.v - |v|^2 up to |z|^2, which the softmax does not see. A common shift changes
    nothing either: with the codebook's mean at 0, float32 stays exact for codebooks far from 0.

    Args:
        latents: (N, D).
        codebook: (K, D).
        two_tau_squared: 2 tau^2, above 0.
        distance: As in `neighbour_logits`.
        bias: Of the head, (K,): codes whose bias is -inf get no probability. None forbids none.
        dtype: Of queries, keys and offsets.

    Attributes:
        queries: (N, D).
    """

    def __init__(
        self,
        latents: Tensor,
        codebook: Tensor,
        *,
        two_tau_squared: float,
        distance: str,
        bias: Tensor | None = None,
        dtype: torch.dtype,
    ) -> None:
        self._codebook, self._distance, self._dtype = codebook, distance, dtype
        queries = latents.to(dtype)
        if distance == "cosine":
            queries = F.normalize(queries, dim=-1)
        offsets = None if bias is None else queries.new_zeros(codebook.shape[0])
        if distance == "l2":
            self._centre = codebook.mean(dim=0, dtype=dtype)
            queries = 2 * (queries - self._centre)
            # Block by block, as a centred copy of a large codebook is what this class spares.
            squares = [self._block(codes).square().sum(dim=-1) for codes in spans(codebook.shape[0], _BLOCK)]
            offsets = -torch.cat(squares) / two_tau_squared
        if offsets is not None and bias is not None:
            offsets = offsets.masked_fill(bias == -math.inf, forbidden_score(dtype))
        self.queries = queries / two_tau_squared
        self._offsets = offsets

    def keys(self, codes: slice) -> tuple[Tensor, Tensor | None]:
        """Keys (k, D) of a block of codes, and their offsets (k,); None stands for zeros."""
        return self._block(codes), None if self._offsets is None else self._offsets[codes]

    def _block(self, codes: slice) -> Tensor:
        rows = self._codebook[codes]
        if self._distance == "l2":
            return rows - self._centre
        rows = rows.to(self._dtype)
        return F.normalize(rows, dim=-1) if self._distance == "cosine" else rows
