"""The weighted sum of SNCE losses with its gradient made in the forward pass.

Where the weights of the tokens are known, the gradient is known up to the factor that comes from above: scores need
not be computed twice. A block of tokens has all its scores in memory at a time, (n x K) of them, and no more.

Shape legend: N tokens, K codes, n tokens of one block, d width of hidden states, k neighbours of a table.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from softgen.relaxation.neighbours import NeighbourScores
from softgen.relaxation.precision import full_precision
from softgen.relaxation.streaming import finite_bias, row_products, spans

# Codes at a time, so that what is done to a score finds it in a core's cache.
_CODE_BLOCK = 1024
# Scores of one block of tokens: 64 MiB in float32. The gradient of the weight is read and written once a block, so
# that too few tokens in a block cost time; beyond 96 there is nothing to gain on a CPU.
_SCORES = 2**24
_MIN_TOKENS, _MAX_TOKENS = 32, 96


class _Target(Protocol):
    """The distribution q of a block of tokens."""

    def dot(self, rows: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k q_k s_k for scores (n, K), and the entropy of q; (n, 1) each. Then `subtract` is about these rows."""

    def subtract(self, tile: Tensor, factor: Tensor) -> None:
        """Take factor (n, 1) times q from a tile (n, K)."""


class _NeighbourTarget:
    def __init__(self, scores: NeighbourScores, *, code_block: int) -> None:
        self._scores, self._code_block = scores, code_block
        self._buffer: Tensor | None = None

    def dot(self, rows: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self._buffer is None:
            self._buffer = torch.empty_like(scores)
        q = self._buffer[: scores.shape[0]]
        blocks = list(spans(scores.shape[1], self._code_block))
        for block in blocks:
            keys, offset = self._scores.keys(block)
            _fill(q[:, block], self._scores.queries[rows], keys, offset)
        q -= q.amax(dim=-1, keepdim=True)
        total, dot, own = (scores.new_zeros((scores.shape[0], 1)) for _ in range(3))
        for block in blocks:
            weights = q[:, block].exp()
            total += weights.sum(dim=-1, keepdim=True)
            dot += row_products(weights, scores[:, block])
            own += row_products(weights, q[:, block])
            q[:, block] = weights
        self._q, self._total = q, total
        return dot / total, total.log() - own / total

    def subtract(self, tile: Tensor, factor: Tensor) -> None:
        tile.addcmul_(self._q, factor / self._total, value=-1)


class _TableTarget:
    def __init__(self, codes: Tensor, weights: Tensor, common: Tensor | None) -> None:
        self._codes, self._weights, self._common = codes, weights, common

    def dot(self, rows: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        self._rows = rows
        q = self._weights[rows]
        dot = row_products(q, scores.gather(1, self._codes[rows]))
        if self._common is not None:
            dot += (scores @ self._common).unsqueeze(-1)
        return dot, torch.special.entr(q).sum(dim=-1, keepdim=True)

    def subtract(self, tile: Tensor, factor: Tensor) -> None:
        tile.scatter_add_(1, self._codes[self._rows], -factor * self._weights[self._rows])
        if self._common is not None:
            tile.addcmul_(factor, self._common, value=-1)


class WeightedSum(NamedTuple):
    """What the operators below return: sums over tokens of weight times loss, and gradients, all wide.

    Attributes:
        loss: Cross-entropies, scalar.
        entropy: Entropies of q, scalar.
        hidden: Gradient of `loss`, (N, d), or empty where not needed.
        weight: (K, d), or empty.
        bias: (K,), or empty.
    """

    loss: Tensor
    entropy: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def _accumulate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weights: Tensor,
    needs: str,
    target: _Target,
    *,
    token_block: int,
    code_block: int,
) -> WeightedSum:
    wide = token_weights.dtype
    inputs, offsets = hidden.to(wide), finite_bias(bias, wide)
    sums = _empty_sum(inputs, weight, needs)
    for part in sums:
        part.zero_()
    blocks = list(spans(weight.shape[0], code_block))
    buffer = inputs.new_empty((min(token_block, inputs.shape[0]), weight.shape[0]))
    for rows in spans(inputs.shape[0], token_block):
        scores = buffer[: rows.stop - rows.start]
        for block in blocks:
            offset = None if offsets is None else offsets[block]
            _fill(scores[:, block], inputs[rows], weight[block].to(wide), offset)
        factor = token_weights[rows].unsqueeze(-1)
        dot, entropy = target.dot(rows, scores)
        peak = scores.amax(dim=-1, keepdim=True)
        total = torch.zeros_like(peak)
        for block in blocks:
            total += scores[:, block].sub_(peak).exp_().sum(dim=-1, keepdim=True)
        sums.loss.add_((factor * (peak + total.log() - dot)).sum())
        sums.entropy.add_((factor * entropy).sum())
        target.subtract(scores.mul_(factor / total), factor)
        for block in blocks:
            gradient = scores[:, block]
            if "hidden" in needs:
                sums.hidden[rows].addmm_(gradient, weight[block].to(wide))
            if "weight" in needs:
                sums.weight[block].addmm_(gradient.T, inputs[rows])
        if "bias" in needs:
            sums.bias.add_(scores.sum(dim=0))
    return sums


def _fill(out: Tensor, queries: Tensor, keys: Tensor, offset: Tensor | None) -> None:
    if offset is None:
        torch.mm(queries, keys.T, out=out)
    else:
        torch.addmm(offset, queries, keys.T, out=out)


def _choose_token_block(hidden: Tensor, weight: Tensor) -> int:
    tokens = hidden.shape[0]
    most = min(_SCORES // weight.shape[0], tokens // 4)
    if hidden.device.type == "cpu":
        most = min(most, _MAX_TOKENS)
    # However few the tokens are, never all at once.
    return max(most, min(_MIN_TOKENS, tokens // 2), 1)


def _empty_sum(hidden: Tensor, weight: Tensor, needs: str) -> WeightedSum:
    codes, width = weight.shape
    return WeightedSum(
        loss=hidden.new_empty(()),
        entropy=hidden.new_empty(()),
        hidden=hidden.new_empty(hidden.shape if "hidden" in needs else (0,)),
        weight=hidden.new_empty((codes, width) if "weight" in needs else (0,)),
        bias=hidden.new_empty(codes if "bias" in needs else 0),
    )


@torch.library.custom_op("softgen::neighbour_sum", mutates_args=())
def neighbour_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weights: Tensor,
    needs: str,
    token_block: int | None,
    code_block: int | None,
    latents: Tensor,
    codebook: Tensor,
    two_tau_squared: float,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A `WeightedSum` towards q(z); `token_weights` (N,) are in the wide dtype."""
    columns = code_block or _CODE_BLOCK
    rows = token_block or _choose_token_block(hidden, weight)
    with full_precision(hidden):
        scores = NeighbourScores(
            latents,
            codebook,
            two_tau_squared=two_tau_squared,
            distance=distance,
            bias=bias,
            dtype=token_weights.dtype,
        )
        target = _NeighbourTarget(scores, code_block=columns)
        return _accumulate(hidden, weight, bias, token_weights, needs, target, token_block=rows, code_block=columns)


@torch.library.custom_op("softgen::table_sum", mutates_args=())
def table_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weights: Tensor,
    needs: str,
    token_block: int | None,
    code_block: int | None,
    codes: Tensor,
    weights: Tensor,
    common: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A `WeightedSum` towards q given as codes (N, k) int64 and weights (N, k), and a part (K,) common to all tokens.

    The entropy is that of the weights.
    """
    rows = token_block or _choose_token_block(hidden, weight)
    with full_precision(hidden):
        target = _TableTarget(codes, weights, common)
        return _accumulate(
            hidden,
            weight,
            bias,
            token_weights,
            needs,
            target,
            token_block=rows,
            code_block=code_block or _CODE_BLOCK,
        )


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_weights: Tensor,
    needs: str,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = hidden.new_empty(hidden.shape, dtype=token_weights.dtype)
    return _empty_sum(wide, weight, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.others = len(inputs) - 3
    ctx.save_for_backward(*output[2:])
    # Else the backward is handed zeros for the gradients among the outputs, as large as those.
    ctx.set_materialize_grads(False)


def _graph_is_kept() -> bool:
    """Whether a later backward pass may come through here again; True where this release of PyTorch does not tell."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _backward(
    ctx: Any, of_loss: Tensor | None, _of_entropy: Tensor | None, *of_gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    if any(upstream is not None for upstream in of_gradients):
        raise RuntimeError("the fused loss can be differentiated once: impl='dense' has second derivatives")
    # The head's gradient is the largest tensor of all: where it is not needed again, it is scaled where it lies.
    scale = torch.mul if _graph_is_kept() else Tensor.mul_
    gradients = [
        scale(gradient, of_loss).to(dtype) if need and of_loss is not None else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    ]
    return (*gradients, *(None for _ in range(ctx.others)))


for _op in (neighbour_sum, table_sum):
    _op.register_fake(_fake)
    _op.register_autograd(_backward, setup_context=_save)
