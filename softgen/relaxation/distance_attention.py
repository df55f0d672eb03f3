"""SoftVQ's posterior over a large codebook: softmax over *unsquared* distances, without the (tokens x codes) matrix.

Unlike a squared distance, |z - c| is no product of vectors, so that attention kernels do not serve here.

Shape legend: N tokens, K codes, n and k those of one tile, D code dimension, e width of embeddings.
"""

from typing import Any

import torch
from torch import Tensor

from softgen.relaxation.expectation import expected_embedding, probabilities
from softgen.relaxation.neighbours import check_latents
from softgen.relaxation.precision import full_precision
from softgen.relaxation.streaming import (
    Impl,
    RunningSoftmax,
    Tiling,
    check_blocks,
    use_fused,
    wide_dtype,
)

# A squared distance is a difference of squared norms: below this many units of their rounding it is noise.
_NOISE = 16


def expected_code(
    latents: Tensor,
    codebook: Tensor,
    *,
    tau: float,
    embedding: Tensor | None = None,
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """The expected code softmax(-|z - c| / tau) C under SoftVQ's posterior (arXiv 2412.10958), norm not squared.

    Differentiable, once, in all tensors. A norm has no gradient at 0: where a latent lies on a code, that code's
    distance passes none, as in `torch.cdist`. The fused path finds distances from squared ones, and takes those below
    about 1e-3 (float32; 6e-8 in float64) of the norms of latent and code, seen from the codebook's mean, for 0.

    Args:
        latents: z, shape (N, D); N may be 0.
        codebook: C, shape (K, D).
        tau: Temperature in units of the distance, above 0; 0.07 in the paper.
        embedding: Rows that are averaged instead of the codes, shape (K, e). With the codebook detached and given here
            as it is, codes learn through the average alone.
        impl: `dense` stores the (N, K) matrix, `fused` blocks of it; `auto` is dense up to `DENSE_LIMIT` elements.
        token_block: Tokens a tile of the fused path; chosen from the shapes if None.
        code_block: Codes a tile of the fused path; chosen from the shapes if None.

    Returns:
        Shape (N, D), or (N, e), in the dtype of codebook or embedding.

    Raises:
        ValueError: If tau is not positive, shapes disagree, `impl` is unknown, a block size is below 1, or latents on
            the CPU are not finite.
    """
    if not tau > 0:
        raise ValueError(f"tau: expected a number above 0, got {tau}")
    check_latents(latents, codebook)
    check_blocks(token_block, code_block)
    rows = codebook if embedding is None else embedding
    if rows.ndim != 2 or rows.shape[0] != codebook.shape[0]:
        raise ValueError(f"embedding: expected shape ({codebook.shape[0]}, e) as codebook, got {tuple(rows.shape)}")
    with full_precision(latents):
        if use_fused(impl, tokens=latents.shape[0], codes=codebook.shape[0]):
            mean, _ = _attend(latents, codebook, rows, tau, token_block, code_block)
        else:
            wide = wide_dtype(latents, codebook, rows)
            # The other modes expand the square, and lose what is near.
            exact = "donot_use_mm_for_euclid_dist"
            distances = torch.cdist(latents.to(wide), codebook.to(wide), compute_mode=exact)
            mean = expected_embedding(probabilities(-distances, temperature=tau), rows.to(wide))
    narrowed: Tensor = mean.to(rows.dtype)
    return narrowed


class _Distances:
    """Tiles of distances, in coordinates whose origin is the codebook's mean."""

    def __init__(self, latents: Tensor, codebook: Tensor, dtype: torch.dtype) -> None:
        self._codebook = codebook
        self._centre = codebook.mean(dim=0, dtype=dtype)
        self.latents = latents.to(dtype) - self._centre
        self._squares = self.latents.square().sum(dim=-1, keepdim=True)
        # `tiny` keeps the distance above 0 where latent and code are both at the origin.
        self.floor = _NOISE * torch.finfo(dtype).eps * self._squares + torch.finfo(dtype).tiny

    def codes(self, block: slice) -> Tensor:
        """Centred codes (k, D)."""
        return self._codebook[block].to(self.latents.dtype) - self._centre

    def tile(self, rows: slice, codes: Tensor) -> Tensor:
        """Squared distances (n, k), no less than `floor` (N, 1)."""
        squares = torch.addmm(codes.square().sum(dim=-1), self.latents[rows], codes.T, alpha=-2)
        bounded: Tensor = squares.add_(self._squares[rows]).clamp_(min=self.floor[rows])
        return bounded


@torch.library.custom_op("softgen::distance_attention", mutates_args=())
def _attend(
    latents: Tensor, codebook: Tensor, embedding: Tensor, tau: float, token_block: int | None, code_block: int | None
) -> tuple[Tensor, Tensor]:
    """Mean embedding (N, e) and logsumexp of the scores (N,), both wide."""
    wide = wide_dtype(latents, codebook, embedding)
    tokens, codes = latents.shape[0], codebook.shape[0]
    tiling = Tiling(tokens, codes, device=latents.device, token_block=token_block, code_block=code_block)
    distances = _Distances(latents, codebook, wide)
    softmax = RunningSoftmax(tokens, distances.latents)
    mean = distances.latents.new_zeros((tokens, embedding.shape[1]))
    with full_precision(latents):
        for block in tiling.codes():
            keys, values = distances.codes(block), embedding[block].to(wide)
            for rows in tiling.tokens():
                weights, decay = softmax.absorb(rows, distances.tile(rows, keys).sqrt_().div_(-tau))
                mean[rows].mul_(decay).addmm_(weights, values)
    return mean.div_(softmax.total), softmax.log_total().squeeze(-1)


@_attend.register_fake
def _(
    latents: Tensor, codebook: Tensor, embedding: Tensor, tau: float, token_block: int | None, code_block: int | None
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(latents, codebook, embedding)
    mean = latents.new_empty((latents.shape[0], embedding.shape[1]), dtype=wide)
    return mean, latents.new_empty(latents.shape[0], dtype=wide)


@torch.library.custom_op("softgen::distance_attention_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    shift: Tensor,
    latents: Tensor,
    codebook: Tensor,
    embedding: Tensor,
    normaliser: Tensor,
    tau: float,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of latents, codebook and embedding.

    With u = P o (G E' + shift) / (-tau r), the derivative of r = |z - c| gives sum_k u_ik (z_i - c_k) for z_i and
    sum_i u_ik (c_k - z_i) for c_k. `shift` (N, 1) is -G.mean.
    """
    wide = normaliser.dtype
    tokens, codes = latents.shape[0], codebook.shape[0]
    tiling = Tiling(tokens, codes, device=latents.device, token_block=token_block, code_block=code_block)
    distances = _Distances(latents, codebook, wide)
    token_sums = torch.zeros_like(distances.floor)
    of_latents = torch.zeros_like(distances.latents)
    of_codebook, of_embedding = torch.empty_like(codebook), torch.empty_like(embedding)
    with full_precision(latents):
        for block in tiling.codes():
            keys, values = distances.codes(block), embedding[block].to(wide)
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
            code_sums = keys.new_zeros(keys.shape[0])
            for rows in tiling.tokens():
                squares = distances.tile(rows, keys)
                at_zero = squares <= distances.floor[rows]
                scores = squares.sqrt_().div_(-tau)
                probs = (scores - normaliser[rows]).exp_()
                of_values.addmm_(probs.T, gradient[rows])
                tile = torch.addmm(shift[rows], gradient[rows], values.T).mul_(probs)
                # tau r = -tau^2 score
                tile.div_(scores.mul_(tau * tau)).masked_fill_(at_zero, 0)
                of_latents[rows].addmm_(tile, keys, alpha=-1)
                of_keys.addmm_(tile.T, distances.latents[rows], alpha=-1)
                token_sums[rows] += tile.sum(dim=-1, keepdim=True)
                code_sums += tile.sum(dim=0)
            of_codebook[block] = of_keys.addcmul_(code_sums.unsqueeze(-1), keys)
            of_embedding[block] = of_values
    of_latents.addcmul_(token_sums, distances.latents)
    return of_latents.to(latents.dtype), of_codebook, of_embedding


@_attend_backward.register_fake
def _(
    gradient: Tensor,
    shift: Tensor,
    latents: Tensor,
    codebook: Tensor,
    embedding: Tensor,
    normaliser: Tensor,
    tau: float,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(latents), torch.empty_like(codebook), torch.empty_like(embedding)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    latents, codebook, embedding, *ctx.settings = inputs
    ctx.save_for_backward(latents, codebook, embedding, *output)


def _backward(ctx: Any, of_mean: Tensor, _of_normaliser: Tensor) -> tuple[Tensor | None, ...]:
    latents, codebook, embedding, mean, normaliser = ctx.saved_tensors
    shift = -(of_mean * mean).sum(dim=-1, keepdim=True)
    gradients = _attend_backward(of_mean, shift, latents, codebook, embedding, normaliser.unsqueeze(-1), *ctx.settings)
    return (*gradients, None, None, None)


_attend.register_autograd(_backward, setup_context=_save)
