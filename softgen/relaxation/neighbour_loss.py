"""SNCE for large codebooks: cross-entropy towards the neighbours of a latent, without the (tokens x codes) matrix.

    L_i = -sum_k q_ik log p_ik = logsumexp_k(s_ik) - sum_k q_ik s_ik,   s = h W' + b,   q = softmax(-d(z, v) / 2 tau^2)

Both softmaxes are carried along tile by tile; the backward recomputes p - q, the gradient of the scores.

Shape legend: N tokens, K codes, d width of hidden states, D code dimension.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from softgen.relaxation.codebook_attention import check_head, dense_logits
from softgen.relaxation.neighbour_sum import neighbour_sum
from softgen.relaxation.neighbours import Distance, NeighbourScores, check_neighbours, neighbour_logits
from softgen.relaxation.precision import full_precision
from softgen.relaxation.streaming import (
    Impl,
    ProductGradient,
    RunningSoftmax,
    Tiling,
    check_blocks,
    finite_bias,
    needs_of,
    row_products,
    score_tile,
    use_fused,
    wide_dtype,
)

Reduction = Literal["mean", "sum", "none"]


def neighbour_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    latents: Tensor,
    codebook: Tensor,
    *,
    two_tau_squared: float,
    distance: Distance = "l2",
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    subtract_entropy: bool = False,
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """SNCE (eq. 8) of p = softmax(h W' + b) towards q(z) (eq. 5), in nats.

    Differentiable, once, in hidden, weight and bias. q is a target: no gradient reaches latents or codebook. The scores
    of p and q are at least float32 whatever the inputs, under autocast too.

    Args:
        hidden: Hidden states before the head, shape (N, d); N may be 0.
        weight: The head, shape (K, d).
        latents: Encoder outputs before quantisation, shape (N, D); the code vectors where only codes are stored.
        codebook: Code vectors, shape (K, D).
        two_tau_squared: 2 tau^2, in the units of the distance; above 0.
        distance: `l2` is the *squared* Euclidean distance, `dot` is -z.v, `cosine` is minus the cosine similarity.
        bias: Of the head, shape (K,). -inf forbids a code: it has no part in p nor in q. One code must be allowed.
        token_weights: Weight of each token, shape (N,), at least 0, such as 1/t of masked diffusion (eq. 15); constants
            without gradient, ones if None.
        reduction: `mean` is sum(weight * loss) / sum(weight), 0 where the weights sum to 0; `sum` leaves the division
            out, `none` the sum too. For `mean` and `sum` the fused path makes the gradient in the forward, once; `none`
            computes the scores again in the backward.
        subtract_entropy: Give KL(q || p) instead, which is 0 at a perfect fit and has the same gradient. The floor of
            the bare loss moves with tau, so that this is what runs are compared by.
        impl: `dense` stores the (N, K) matrix, `fused` blocks of it; `auto` is dense up to `DENSE_LIMIT` elements.
        token_block: Tokens a tile of the fused path; chosen from the shapes if None.
        code_block: Codes a tile of the fused path; chosen from the shapes if None.

    Returns:
        A scalar, or (N,) for `none`; float32 (float64 where an input is).

    Raises:
        ValueError: If 2 tau^2 is not positive, shapes disagree, a choice is unknown, a block size is below 1, or
            latents on the CPU are not finite.
    """
    check_head(hidden, weight, bias)
    check_neighbours(latents, codebook, two_tau_squared=two_tau_squared, distance=distance)
    check_blocks(token_block, code_block)
    check_reduction(reduction, token_weights, tokens=hidden.shape[0])
    if codebook.shape[0] != weight.shape[0]:
        raise ValueError(f"codebook: expected {weight.shape[0]} codes as weight, got {codebook.shape[0]}")
    if latents.shape[0] != hidden.shape[0]:
        raise ValueError(f"latents: expected {hidden.shape[0]} tokens as hidden, got {latents.shape[0]}")
    kept = weighted_rows(token_weights, reduction)
    if kept is not None:
        hidden, latents, token_weights = select_rows(kept, hidden, latents, token_weights)
    factors = token_factors(token_weights, reduction, like=hidden, dtype=wide_dtype(hidden, weight, latents, codebook))
    needs = needs_of(**gradients_wanted(hidden=hidden, weight=weight, bias=bias))
    fused = use_fused(impl, tokens=hidden.shape[0], codes=weight.shape[0])
    summed = fused and reduction != "none" and needs != ""
    target, blocks = (two_tau_squared, distance), (token_block, code_block)
    with full_precision(hidden):
        if summed:
            loss, entropy, *_ = neighbour_sum(hidden, weight, bias, factors, needs, *blocks, latents, codebook, *target)
        elif fused:
            loss, entropy, *_ = _stream(hidden, weight, latents, codebook, bias, *target, *blocks)
        else:
            q = _dense_target(latents, codebook, bias, two_tau_squared, distance)
            logits = dense_logits(hidden, weight, finite_bias(bias, wide_dtype(hidden, weight)))
            loss = -(q * logits.log_softmax(dim=-1)).sum(dim=-1)
            entropy = torch.special.entr(q).sum(dim=-1)
    loss = loss - entropy.detach() if subtract_entropy else loss
    total: Tensor = loss if summed else combine(loss, factors, reduction)
    return total


def neighbour_entropy(
    latents: Tensor,
    codebook: Tensor,
    *,
    two_tau_squared: float,
    distance: Distance = "l2",
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """Entropy of q(z) in nats; its exponential is the perplexity. Arguments as `neighbour_cross_entropy`.

    Returns:
        Shape (N,), float32 (float64 where an argument is), without gradient.

    Raises:
        ValueError: As `neighbour_cross_entropy`.
    """
    check_neighbours(latents, codebook, two_tau_squared=two_tau_squared, distance=distance)
    check_blocks(token_block, code_block)
    with torch.no_grad(), full_precision(latents):
        if use_fused(impl, tokens=latents.shape[0], codes=codebook.shape[0]):
            entropy: Tensor = _stream_entropy(latents, codebook, two_tau_squared, distance, token_block, code_block)
        else:
            q = _dense_target(latents, codebook, None, two_tau_squared, distance)
            entropy = torch.special.entr(q).sum(dim=-1)
    return entropy


def check_reduction(reduction: str, token_weights: Tensor | None, *, tokens: int) -> None:
    """Refuse an unknown reduction and weights that are not one a token.

    Raises:
        ValueError: Naming the argument, what was expected and what was got.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: expected one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if token_weights is not None and token_weights.shape != (tokens,):
        raise ValueError(f"token_weights: expected shape ({tokens},) as hidden, got {tuple(token_weights.shape)}")


def weighted_rows(token_weights: Tensor | None, reduction: str) -> Tensor | None:
    """Indices of the tokens whose weight is not 0, so that the others cost nothing, (n,).

    None stands for all: for `none`, and where asking would stall the device, or is being compiled.
    """
    if token_weights is None or reduction == "none":
        return None
    if token_weights.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return token_weights.nonzero().squeeze(-1)


def select_rows(rows: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """The rows of each tensor."""
    return [tensor[rows] for tensor in tensors if tensor is not None]


def token_factors(token_weights: Tensor | None, reduction: str, *, like: Tensor, dtype: torch.dtype) -> Tensor:
    """What each loss is multiplied by, (N,): its weight, over the sum of the weights for `mean`."""
    weights = like.new_ones(like.shape[0]) if token_weights is None else token_weights.detach()
    weights = weights.to(dtype)
    return weights / weights.sum().clamp(min=torch.finfo(dtype).tiny) if reduction == "mean" else weights


def combine(loss: Tensor, factors: Tensor, reduction: str) -> Tensor:
    """Losses (N,) times `token_factors`, added up unless the reduction is `none`."""
    return loss * factors if reduction == "none" else (loss * factors).sum()


def gradients_wanted(**tensors: Tensor | None) -> dict[str, bool]:
    """Which of the tensors autograd is recording."""
    enabled = torch.is_grad_enabled()
    return {name: enabled and x is not None and x.requires_grad for name, x in tensors.items()}


@torch.no_grad()
def _dense_target(
    latents: Tensor, codebook: Tensor, bias: Tensor | None, two_tau_squared: float, distance: Distance
) -> Tensor:
    logits = neighbour_logits(latents, codebook, two_tau_squared=two_tau_squared, distance=distance)
    if bias is not None:
        logits = logits.masked_fill(bias == -math.inf, -math.inf)
    return logits.softmax(dim=-1)


@torch.library.custom_op("softgen::neighbour_entropy", mutates_args=())
def _stream_entropy(
    latents: Tensor,
    codebook: Tensor,
    two_tau_squared: float,
    distance: str,
    token_block: int | None,
    code_block: int | None,
) -> Tensor:
    wide = wide_dtype(latents, codebook)
    target = NeighbourScores(latents, codebook, two_tau_squared=two_tau_squared, distance=distance, dtype=wide)
    tokens, codes = latents.shape[0], codebook.shape[0]
    tiling = Tiling(tokens, codes, device=latents.device, token_block=token_block, code_block=code_block)
    softmax = RunningSoftmax(tokens, target.queries)
    mean = torch.zeros_like(softmax.total)
    with full_precision(latents):
        for block in tiling.codes():
            keys, offset = target.keys(block)
            for rows in tiling.tokens():
                scores = score_tile(target.queries[rows], keys, offset)
                weights, decay = softmax.absorb(rows, scores)
                mean[rows] = mean[rows] * decay + row_products(weights, scores)
    return (softmax.log_total() - mean / softmax.total).squeeze(-1)


@_stream_entropy.register_fake
def _(
    latents: Tensor,
    codebook: Tensor,
    two_tau_squared: float,
    distance: str,
    token_block: int | None,
    code_block: int | None,
) -> Tensor:
    return latents.new_empty(latents.shape[0], dtype=wide_dtype(latents, codebook))


@torch.library.custom_op("softgen::neighbour_cross_entropy", mutates_args=())
def _stream(
    hidden: Tensor,
    weight: Tensor,
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    two_tau_squared: float,
    distance: str,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy, entropy of q, logsumexp of the scores of p and of q: (N,) each, wide."""
    wide = wide_dtype(hidden, weight, latents, codebook)
    inputs, scored_bias = hidden.to(wide), finite_bias(bias, wide)
    target = NeighbourScores(
        latents, codebook, two_tau_squared=two_tau_squared, distance=distance, bias=bias, dtype=wide
    )
    tokens, codes = hidden.shape[0], weight.shape[0]
    tiling = Tiling(tokens, codes, device=hidden.device, token_block=token_block, code_block=code_block)
    p, q = RunningSoftmax(tokens, inputs), RunningSoftmax(tokens, inputs)
    # Sums over codes of exp(q's score) times the score of p, and of q.
    p_sum, q_sum = torch.zeros_like(q.total), torch.zeros_like(q.total)
    with full_precision(hidden):
        for block in tiling.codes():
            head, head_offset = weight[block].to(wide), None if scored_bias is None else scored_bias[block]
            keys, offset = target.keys(block)
            for rows in tiling.tokens():
                scores = score_tile(inputs[rows], head, head_offset)
                target_scores = score_tile(target.queries[rows], keys, offset)
                weights, decay = q.absorb(rows, target_scores)
                p_sum[rows] = p_sum[rows] * decay + row_products(weights, scores)
                q_sum[rows] = q_sum[rows] * decay + row_products(weights, target_scores)
                p.absorb(rows, scores)
    log_p, log_q = p.log_total(), q.log_total()
    loss, entropy = log_p - p_sum / q.total, log_q - q_sum / q.total
    return loss.squeeze(-1), entropy.squeeze(-1), log_p.squeeze(-1), log_q.squeeze(-1)


@_stream.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    two_tau_squared: float,
    distance: str,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden, weight, latents, codebook))
    return like, torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)


@torch.library.custom_op("softgen::neighbour_cross_entropy_backward", mutates_args=())
def _stream_backward(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    log_p: Tensor,
    log_q: Tensor,
    needs: str,
    two_tau_squared: float,
    distance: str,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those that `needs` does not name are empty.

    `gradient`, the upstream of the loss, and the logsumexps `log_p` and `log_q` are columns (N, 1).
    """
    wide = log_p.dtype
    inputs, scored_bias = hidden.to(wide), finite_bias(bias, wide)
    target = NeighbourScores(
        latents, codebook, two_tau_squared=two_tau_squared, distance=distance, bias=bias, dtype=wide
    )
    tiling = Tiling(
        hidden.shape[0], weight.shape[0], device=hidden.device, token_block=token_block, code_block=code_block
    )
    product = ProductGradient(inputs, weight, needs=needs)
    with full_precision(hidden):
        for block in tiling.codes():
            head, head_offset = weight[block].to(wide), None if scored_bias is None else scored_bias[block]
            keys, offset = target.keys(block)
            for rows in tiling.tokens():
                probs = score_tile(inputs[rows], head, head_offset).sub_(log_p[rows]).exp_()
                q = score_tile(target.queries[rows], keys, offset).sub_(log_q[rows]).exp_()
                product.add(rows, head, probs.sub_(q).mul_(gradient[rows]))
            product.store(block)
    return product.hidden.to(hidden.dtype), product.weight, product.bias


@_stream_backward.register_fake
def _(
    gradient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    latents: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    log_p: Tensor,
    log_q: Tensor,
    needs: str,
    two_tau_squared: float,
    distance: str,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if "hidden" in needs else (0,)),
        weight.new_empty(weight.shape if "weight" in needs else (0,)),
        log_p.new_empty(weight.shape[0] if "bias" in needs else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, latents, codebook, bias, *ctx.settings = inputs
    _, _, log_p, log_q = output
    ctx.save_for_backward(hidden, weight, latents, codebook, bias, log_p, log_q)


def _backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, log_p, log_q = ctx.saved_tensors
    hidden, weight, _, _, bias, *_ = ctx.needs_input_grad
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    columns = (x.unsqueeze(-1) for x in (log_p, log_q))
    gradients = _stream_backward(of_loss.unsqueeze(-1), *tensors, *columns, needs_of(**named), *ctx.settings)
    of_hidden, of_weight, of_bias = (
        gradient if need else None for gradient, need in zip(gradients, named.values(), strict=True)
    )
    return of_hidden, of_weight, None, None, of_bias, None, None, None, None


_stream.register_autograd(_backward, setup_context=_save)
