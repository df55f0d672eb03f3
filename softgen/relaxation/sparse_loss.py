"""Cross-entropy of a large head towards few codes a token, without the (tokens x codes) matrix.

The targets are hard codes, smoothed codes, or the rows of a table of neighbours: only the logsumexp sees all codes.

Shape legend: N tokens, K codes, k codes of a target, d width of hidden states.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.relaxation.codebook_attention import check_head, logsumexp_linear
from softgen.relaxation.neighbour_loss import (
    Reduction,
    check_reduction,
    combine,
    gradients_wanted,
    select_rows,
    token_factors,
    weighted_rows,
)
from softgen.relaxation.neighbour_sum import table_sum
from softgen.relaxation.precision import full_precision
from softgen.relaxation.streaming import Impl, check_blocks, needs_of, use_fused, wide_dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """Cross-entropy of p = softmax(h W' + b) towards hard codes, in nats.

    Equal to `torch.nn.functional.cross_entropy` of the logits. Differentiable, once, in hidden, weight and bias. The
    scores are at least float32 whatever the inputs, under autocast too.

    Args:
        hidden: Hidden states before the head, shape (N, d); N may be 0.
        weight: The head, shape (K, d).
        tokens: The codes, shape (N,) int64 in [0, K).
        bias: Of the head, shape (K,). -inf forbids a code, which then must not be a target.
        label_smoothing: Mass that is spread evenly over all allowed codes, in [0, 1].
        token_weights: As in `neighbour_cross_entropy`.
        reduction: As in `neighbour_cross_entropy`.
        impl: As in `neighbour_cross_entropy`.
        token_block: Tokens a tile of the fused path; chosen from the shapes if None.
        code_block: Codes a tile of the fused path; chosen from the shapes if None.

    Returns:
        A scalar, or (N,) for `none`; float32 (float64 where an input is).

    Raises:
        ValueError: If shapes disagree, or a choice is unknown or out of range.
    """
    check_head(hidden, weight, bias)
    check_tokens(tokens, hidden)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    q = hidden.new_full((hidden.shape[0], 1), 1 - label_smoothing, dtype=wide_dtype(hidden, weight))
    common = None
    if label_smoothing > 0:
        common = q.new_ones(weight.shape[0]) if bias is None else (bias.detach() != -math.inf).to(q.dtype)
        common = common * (label_smoothing / common.sum())
    return sparse_cross_entropy(
        hidden,
        weight,
        tokens.unsqueeze(-1),
        q,
        common=common,
        bias=bias,
        token_weights=token_weights,
        reduction=reduction,
        impl=impl,
        token_block=token_block,
        code_block=code_block,
    )


def sparse_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    codes: Tensor,
    q: Tensor,
    *,
    common: Tensor | None = None,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    subtract_entropy: bool = False,
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """Cross-entropy towards targets that are 0 but for k codes a token, and a part that all tokens share.

    Args:
        hidden: As in `linear_cross_entropy`.
        weight: As in `linear_cross_entropy`.
        codes: The codes of each target, shape (N, k) int64 in [0, K).
        q: Their probabilities, shape (N, k).
        common: Probabilities that every target has besides, shape (K,); `q` sums to what is left of 1.
        bias: As in `linear_cross_entropy`; forbidden codes have no part in `q` nor in `common`.
        token_weights: As in `neighbour_cross_entropy`.
        reduction: As in `neighbour_cross_entropy`.
        subtract_entropy: Subtract the entropy of `q`, where there is no `common`.
        impl: As in `neighbour_cross_entropy`.
        token_block: As in `linear_cross_entropy`.
        code_block: As in `linear_cross_entropy`.

    Returns:
        As `linear_cross_entropy`.

    Raises:
        ValueError: As `linear_cross_entropy`.
    """
    check_reduction(reduction, token_weights, tokens=hidden.shape[0])
    check_blocks(token_block, code_block)
    assert common is None or not subtract_entropy
    kept = weighted_rows(token_weights, reduction)
    if kept is not None:
        hidden, codes, q, token_weights = select_rows(kept, hidden, codes, q, token_weights)
    factors = token_factors(token_weights, reduction, like=hidden, dtype=wide_dtype(hidden, weight))
    needs = needs_of(**gradients_wanted(hidden=hidden, weight=weight, bias=bias))
    summed = use_fused(impl, tokens=hidden.shape[0], codes=weight.shape[0]) and reduction != "none" and needs != ""
    blocks = (token_block, code_block)
    if summed:
        loss, entropy, *_ = table_sum(hidden, weight, bias, factors, needs, *blocks, codes, q, common)
    else:
        normaliser = logsumexp_linear(
            hidden, weight, bias=bias, impl=impl, token_block=token_block, code_block=code_block
        )
        loss = normaliser - _mean_score(hidden, weight, bias, codes, q, common)
        entropy = torch.special.entr(q).sum(dim=-1)
    loss = loss - entropy.detach() if subtract_entropy else loss
    total: Tensor = loss if summed else combine(loss, factors, reduction)
    return total


def check_tokens(tokens: Tensor, hidden: Tensor) -> None:
    """Refuse codes that are not one a token.

    Raises:
        ValueError: Naming the expected and the given shape.
    """
    if tokens.shape != hidden.shape[:1]:
        raise ValueError(f"tokens: expected shape ({hidden.shape[0]},) as hidden, got {tuple(tokens.shape)}")


def _mean_score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codes: Tensor, q: Tensor, common: Tensor | None
) -> Tensor:
    """sum_k q_ik (h_i.w_k + b_k) over the codes (N, k) of each token and those of `common`, (N,)."""
    wide = weight.to(q.dtype)
    with full_precision(hidden):
        if codes.shape[1] == 1:
            row = q * F.embedding(codes.squeeze(1), wide)
        else:
            row = F.embedding_bag(codes, wide, per_sample_weights=q, mode="sum")
        if common is not None:
            row = row + common @ wide
        score = (hidden.to(q.dtype) * row).sum(dim=-1)
    if bias is None:
        return score
    # A forbidden code has no probability, and its -inf must not meet that 0.
    offsets = bias.to(q.dtype)
    score = score + (q * offsets[codes].masked_fill(q == 0, 0)).sum(dim=-1)
    return score if common is None else score + (common * offsets.masked_fill(common == 0, 0)).sum()
