"""The soft embedding and the logsumexp of a large codebook, without the (tokens x codes) matrix.

softmax(h W' + b) E is attention with hidden states as queries, the head's rows as keys and the embedding's rows as
values. Forward and backward walk over tiles; the backward recomputes the scores.

Shape legend: N tokens, K codes, d width of hidden states, e width of embeddings.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from softgen.relaxation.expectation import expected_embedding, probabilities
from softgen.relaxation.precision import full_precision
from softgen.relaxation.streaming import (
    Impl,
    ProductGradient,
    RunningSoftmax,
    Tiling,
    check_blocks,
    finite_bias,
    needs_of,
    score_tile,
    use_fused,
    wide_dtype,
)


def soft_embedding(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor,
    *,
    bias: Tensor | None = None,
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """The expected embedding e = softmax(h W' + b) E straight from hidden states (Soft-Di[M]O, OpenReview 83pHDDmkXt).

    Equal to `expected_embedding(probabilities(logits), embedding)`. Differentiable, once, in all four tensors. The
    scores are at least float32 whatever the inputs, under autocast too.

    Args:
        hidden: Hidden states before the head, shape (N, d); N may be 0.
        weight: The head, shape (K, d).
        embedding: One row a code, shape (K, e).
        bias: Of the head, shape (K,); -inf forbids a code. At least one code must be allowed.
        impl: `dense` stores the (N, K) matrix, `fused` blocks of it; `auto` is dense up to `DENSE_LIMIT` elements.
        token_block: Tokens a tile of the fused path; chosen from the shapes if None.
        code_block: Codes a tile of the fused path; chosen from the shapes if None.

    Returns:
        Expected rows, shape (N, e), in the embedding's dtype.

    Raises:
        ValueError: If shapes disagree, `impl` is unknown or a block size is below 1.
    """
    check_head(hidden, weight, bias)
    check_blocks(token_block, code_block)
    if embedding.ndim != 2 or embedding.shape[0] != weight.shape[0]:
        raise ValueError(
            f"embedding: expected shape ({weight.shape[0]}, e) for the codes of weight, got {tuple(embedding.shape)}"
        )
    with full_precision(hidden):
        if not use_fused(impl, tokens=hidden.shape[0], codes=weight.shape[0]):
            logits = dense_logits(hidden, weight, bias)
            mean = expected_embedding(probabilities(logits), embedding.to(logits.dtype))
        elif bias is None and _flash_serves(hidden, weight, embedding):
            mean = _flash_attention(hidden, weight, embedding)
        else:
            mean, _ = _attend(hidden, weight, embedding, bias, token_block, code_block)
    return mean.to(embedding.dtype)


def logsumexp_linear(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    impl: Impl = "auto",
    token_block: int | None = None,
    code_block: int | None = None,
) -> Tensor:
    """logsumexp_k(h.w_k + b_k) of each token: the normaliser of a large head. Arguments as `soft_embedding`.

    Returns:
        Shape (N,), float32 (float64 where an argument is). Differentiable, once, in hidden, weight and bias.

    Raises:
        ValueError: If shapes disagree, `impl` is unknown or a block size is below 1.
    """
    check_head(hidden, weight, bias)
    check_blocks(token_block, code_block)
    with full_precision(hidden):
        if not use_fused(impl, tokens=hidden.shape[0], codes=weight.shape[0]):
            return dense_logits(hidden, weight, bias).logsumexp(dim=-1)
        # Attention to embeddings of no columns leaves the normaliser alone.
        _, normaliser = _attend(hidden, weight, weight.new_empty(weight.shape[0], 0), bias, token_block, code_block)
    log_total: Tensor = normaliser
    return log_total


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse hidden states, heads and biases that do not fit together.

    Raises:
        ValueError: Naming the argument, the expected shape and what was got.
    """
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (K, d) with at least one code, got {tuple(weight.shape)}")
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden: expected shape (N, {weight.shape[1]}) as weight, got {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},) as weight, got {tuple(bias.shape)}")


def dense_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Scores (N, K) in the wide dtype."""
    wide = wide_dtype(hidden, weight)
    return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def _flash_serves(hidden: Tensor, weight: Tensor, embedding: Tensor) -> bool:
    # On a CPU its backward uses one core, and computes gradients that nobody asked for: tiles are faster there.
    if not hidden.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    from torch.backends.cuda import SDPAParams, can_use_flash_attention

    query, key, value = (x.unsqueeze(0).unsqueeze(0) for x in (hidden, weight, embedding))
    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, False)))


def _flash_attention(hidden: Tensor, weight: Tensor, embedding: Tensor) -> Tensor:
    """`soft_embedding` without bias by the flash kernel; the others, which may store the matrix, are barred."""
    query, key, value = (x.unsqueeze(0).unsqueeze(0) for x in (hidden, weight, embedding))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(0).squeeze(0)


@torch.library.custom_op("softgen::codebook_attention", mutates_args=())
def _attend(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor]:
    """Mean embedding (N, e) and logsumexp (N,), both wide."""
    wide = wide_dtype(hidden, weight, embedding)
    inputs, scored_bias = hidden.to(wide), finite_bias(bias, wide)
    tokens, codes = hidden.shape[0], weight.shape[0]
    tiling = Tiling(tokens, codes, device=hidden.device, token_block=token_block, code_block=code_block)
    softmax = RunningSoftmax(tokens, inputs)
    mean = inputs.new_zeros((tokens, embedding.shape[1]))
    with full_precision(hidden):
        for block in tiling.codes():
            keys, values = weight[block].to(wide), embedding[block].to(wide)
            offset = None if scored_bias is None else scored_bias[block]
            for rows in tiling.tokens():
                weights, decay = softmax.absorb(rows, score_tile(inputs[rows], keys, offset))
                mean[rows].mul_(decay).addmm_(weights, values)
    return mean.div_(softmax.total), softmax.log_total().squeeze(-1)


@_attend.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(hidden, weight, embedding)
    mean = hidden.new_empty((hidden.shape[0], embedding.shape[1]), dtype=wide)
    return mean, hidden.new_empty(hidden.shape[0], dtype=wide)


@torch.library.custom_op("softgen::codebook_attention_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    shift: Tensor,
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    normaliser: Tensor,
    needs: str,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, embedding and bias; those that `needs` does not name are empty.

    The gradient of the scores is P o (G E' + shift), with `shift` (N, 1) = upstream of the logsumexp - G.mean.
    """
    wide = normaliser.dtype
    inputs, scored_bias = hidden.to(wide), finite_bias(bias, wide)
    tiling = Tiling(
        hidden.shape[0], weight.shape[0], device=hidden.device, token_block=token_block, code_block=code_block
    )
    product = ProductGradient(inputs, weight, needs=needs)
    of_embedding = torch.empty_like(embedding) if "embedding" in needs else embedding.new_empty(0)
    with full_precision(hidden):
        for block in tiling.codes():
            keys, values = weight[block].to(wide), embedding[block].to(wide)
            offset = None if scored_bias is None else scored_bias[block]
            of_values = torch.zeros_like(values)
            for rows in tiling.tokens():
                probs = score_tile(inputs[rows], keys, offset).sub_(normaliser[rows]).exp_()
                if "embedding" in needs:
                    of_values.addmm_(probs.T, gradient[rows])
                if needs != "embedding":
                    product.add(rows, keys, torch.addmm(shift[rows], gradient[rows], values.T).mul_(probs))
            product.store(block)
            if "embedding" in needs:
                of_embedding[block] = of_values
    return product.hidden.to(hidden.dtype), product.weight, of_embedding, product.bias


@_attend_backward.register_fake
def _(
    gradient: Tensor,
    shift: Tensor,
    hidden: Tensor,
    weight: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    normaliser: Tensor,
    needs: str,
    token_block: int | None,
    code_block: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if "hidden" in needs else (0,)),
        weight.new_empty(weight.shape if "weight" in needs else (0,)),
        embedding.new_empty(embedding.shape if "embedding" in needs else (0,)),
        normaliser.new_empty(weight.shape[0] if "bias" in needs else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, embedding, bias, *ctx.blocks = inputs
    ctx.save_for_backward(hidden, weight, embedding, bias, *output)


def _backward(ctx: Any, of_mean: Tensor, of_normaliser: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, embedding, bias, mean, normaliser = ctx.saved_tensors
    shift = (of_normaliser - (of_mean * mean).sum(dim=-1)).unsqueeze(-1)
    named = dict(zip(("hidden", "weight", "embedding", "bias"), ctx.needs_input_grad[:4], strict=True))
    gradients = _attend_backward(
        of_mean, shift, hidden, weight, embedding, bias, normaliser.unsqueeze(-1), needs_of(**named), *ctx.blocks
    )
    return (*(gradient if need else None for gradient, need in zip(gradients, named.values(), strict=True)), None, None)


_attend.register_autograd(_backward, setup_context=_save)
