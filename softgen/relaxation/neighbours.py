"""The neighbour distribution q(z) of SNCE: soft targets that follow the geometry of the codebook.

Shape legend: N latents, K codes, k codes of one block, D code dimension.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.relaxation.precision import full_precision
from softgen.relaxation.streaming import DENSE_LIMIT, forbidden_score, score_tile, spans, wide_dtype

Distance = Literal["l2", "dot", "cosine"]

_BLOCK = 4096
_COPY = 1e-6
"""A copy of a code is nearer to it, squared, than this share of its squared distance to the codebook's mean."""


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


def neighbour_logits(latents: Tensor, codebook: Tensor, *, two_tau_squared: float, distance: Distance = "l2") -> Tensor:
    """Unnormalised log q_k(z) = -d(z, v_k) / (2 tau^2), up to a constant a latent (SNCE, eq. 5).

    Args:
        latents: Encoder outputs before quantisation, shape (..., D).
        codebook: Code vectors, shape (K, D).
        two_tau_squared: 2 tau^2, in the units of the distance; above 0.
        distance: `l2` is the *squared* Euclidean distance, `dot` is -z.v, `cosine` is minus the cosine similarity.

    Returns:
        Logits, shape (..., K), float32 (float64 where an argument is).

    Raises:
        ValueError: If 2 tau^2 is not positive, the distance unknown, the shapes disagree, or latents on the CPU are
            not finite.
    """
    flat = latents.flatten(0, -2)
    check_neighbours(flat, codebook, two_tau_squared=two_tau_squared, distance=distance)
    with full_precision(flat):
        scores = NeighbourScores(
            flat, codebook, two_tau_squared=two_tau_squared, distance=distance, dtype=wide_dtype(flat, codebook)
        )
        logits = score_tile(scores.queries, *scores.keys(slice(None)))
    return logits.view(*latents.shape[:-1], codebook.shape[0])


def neighbour_distribution(
    latents: Tensor, codebook: Tensor, *, two_tau_squared: float, distance: Distance = "l2"
) -> Tensor:
    """q(z), the categorical distribution over codes near a latent (SNCE, eq. 5). Arguments as `neighbour_logits`.

    Returns:
        Probabilities, shape (..., K).
    """
    logits = neighbour_logits(latents, codebook, two_tau_squared=two_tau_squared, distance=distance)
    return logits.softmax(dim=-1)


def auto_two_tau_squared(
    latents: Tensor,
    codebook: Tensor,
    *,
    distance: Distance = "l2",
    factor: float = 3.5,
    own_codes: Tensor | None = None,
) -> float:
    """A 2 tau^2 that fits the codebook: `factor` times the median gap between a latent and its best code.

    For `l2` the gap is the squared distance to the nearest code. The other distances have no natural zero, so the
    gap is taken between the best code and the mean over the latent's ten best. The (N, K) matrix is never whole.

    Args:
        latents: A sample of training latents, shape (N, D), N at least 1.
        codebook: Code vectors, shape (K, D).
        distance: As in `neighbour_logits`.
        factor: 3 to 4 was best at small scale; the optimum is flat.
        own_codes: Where the latents are rows of the codebook, as only codes are stored: which ones, shape (N,) int64.
            A latent's gap is then to the best of the other codes, for `l2` of those that are no copies of it.

    Returns:
        2 tau^2, above 0.

    Raises:
        ValueError: As `neighbour_logits`.
    """
    rows = max(1, DENSE_LIMIT // codebook.shape[0])
    gaps = []
    for block in spans(latents.shape[0], rows):
        z = latents[block]
        logits = neighbour_logits(z, codebook, two_tau_squared=1.0, distance=distance)
        if own_codes is not None:
            logits.scatter_(1, own_codes[block].unsqueeze(-1), -math.inf)
        if distance == "l2":
            centred = z.to(logits.dtype) - codebook.mean(dim=0, dtype=logits.dtype)
            squares = centred.square().sum(dim=-1)
            if own_codes is not None:
                logits.masked_fill_(logits > squares.unsqueeze(-1) * (1 - _COPY), -math.inf)
            gaps.append((squares - logits.amax(dim=-1)).nan_to_num(posinf=0.0))
        else:
            others = codebook.shape[0] - (own_codes is not None)
            best = logits.topk(min(10, others), dim=-1).values
            gaps.append(best[..., 0] - best.mean(dim=-1))
    median = torch.cat(gaps).clamp(min=0).median().item()
    return max(factor * median, torch.finfo(torch.float32).eps)


def perplexity(probs: Tensor) -> Tensor:
    """exp(entropy) of each distribution over the last dimension, shape (...)."""
    entropy: Tensor = torch.special.entr(probs).sum(dim=-1)
    return entropy.exp()
