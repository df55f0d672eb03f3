"""Walking over a (tokens x codes) matrix tile by tile, so that it never exists as a whole.

The outer loop runs over blocks of codes and the inner one over blocks of tokens: a block of weights is widened once and
its gradient written once, while a softmax over all codes is carried along as a running maximum and a running sum.

Shape legend: N tokens, K codes, n and k the tokens and codes of one tile, d width of hidden states.
"""

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "dense", "fused"]

DENSE_LIMIT = 2**22
"""Elements of the (tokens x codes) matrix up to which `impl="auto"` is the dense path: 16 MiB in float32."""

# A tile of 2^18 float32 elements (1 MiB) stays in a core's cache; an accelerator needs larger ones to be busy.
_SMALL_TILE = 2**18
_LARGE_TILE = 2**24


def use_fused(impl: str, *, tokens: int, codes: int) -> bool:
    """Whether a function takes its fused path.

    Raises:
        ValueError: If `impl` is unknown.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl: expected one of {', '.join(get_args(Impl))}, got {impl!r}")
    return impl == "fused" or (impl == "auto" and tokens * codes > DENSE_LIMIT)


def check_blocks(token_block: int | None, code_block: int | None) -> None:
    """Refuse blocks of no rows.

    Raises:
        ValueError: If a block size is given and below 1.
    """
    for name, size in (("token_block", token_block), ("code_block", code_block)):
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected None or at least 1, got {size}")


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that scores are kept in: float64 where any of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class Tiling:
    """Block sizes for a matrix of scores.

    Args:
        tokens: N.
        codes: K.
        device: CPU tiles fit a core's cache; elsewhere a tile holds a 16th of the matrix, within bounds.
        token_block: Tokens a tile, at least 1; None chooses.
        code_block: Codes a tile, at least 1; None chooses.
    """

    def __init__(
        self, tokens: int, codes: int, *, device: torch.device, token_block: int | None, code_block: int | None
    ) -> None:
        area = _SMALL_TILE
        if device.type != "cpu":
            area = min(_LARGE_TILE, max(_SMALL_TILE, tokens * codes // 16))
        rows = token_block or max(1, min(tokens, math.isqrt(area)))
        columns = code_block or max(1, min(codes, area // rows))
        if token_block is None:
            rows = max(1, min(tokens, area // columns))
        self._tokens, self._codes = tokens, codes
        # Blocks that were chosen are evened out, so that none is a sliver.
        self._rows = token_block or -(-tokens // max(1, -(-tokens // rows)))
        self._columns = code_block or -(-codes // -(-codes // columns))

    def codes(self) -> Iterator[slice]:
        """The blocks of codes, in order."""
        return spans(self._codes, self._columns)

    def tokens(self) -> Iterator[slice]:
        """The blocks of tokens, in order."""
        return spans(self._tokens, self._rows)


def spans(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `range(total)`, in order."""
    return (slice(start, min(start + size, total)) for start in range(0, total, max(1, size)))


def forbidden_score(dtype: torch.dtype) -> float:
    """The finite score of a code that must get no probability: it underflows to 0, and 0 times it is 0."""
    return torch.finfo(dtype).min / 2


def finite_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias in `dtype`, with -inf replaced by `forbidden_score`."""
    if bias is None:
        return None
    return bias.to(dtype).masked_fill(bias == -math.inf, forbidden_score(dtype))


def score_tile(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Scores (n, k) = hidden (n, d) weight (k, d)' + bias (k,)."""
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of two tiles (n, k), as a column (n, 1)."""
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze(-1)


class RunningSoftmax:
    """Softmax of each token over codes that arrive block by block (online softmax, arXiv 1805.02867)."""

    def __init__(self, tokens: int, like: Tensor) -> None:
        # Forbidden scores lie below the floor, so that they underflow even where a whole block of codes is forbidden.
        self.peak = like.new_full((tokens, 1), forbidden_score(like.dtype) / 2)
        self.total = like.new_zeros((tokens, 1))

    def absorb(self, rows: slice, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile of scores (n, k).

        Returns:
            exp(scores - peak) (n, k), and the factor (n, 1) by which sums over earlier weights shrink.
        """
        before = self.peak[rows]
        peak = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
        weights = (scores - peak).exp_()
        decay = (before - peak).exp_()
        self.peak[rows] = peak
        self.total[rows] = self.total[rows] * decay + weights.sum(dim=-1, keepdim=True)
        return weights, decay

    def log_total(self) -> Tensor:
        """Logsumexp of all scores so far, (N, 1)."""
        return self.peak + self.total.log()


def needs_of(**needed: bool) -> str:
    """The names that are True in one string, which every release of PyTorch takes as an argument of an operator."""
    return " ".join(name for name, need in needed.items() if need)


class ProductGradient:
    """Gradients of hidden, weight and bias from tiles of the gradient of scores = hidden weight' + bias.

    Sums are kept in the dtype of `hidden`, which is the wide one; the weight's gradient is narrowed block by block.
    What is not needed stays empty.

    Args:
        hidden: (N, d), wide.
        weight: (K, d), in its own dtype.
        needs: Names of those whose gradients are needed, as of `needs_of`.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, *, needs: str) -> None:
        self._inputs = hidden
        self._needs = needs
        codes = weight.shape[0]
        self.hidden = torch.zeros_like(hidden) if "hidden" in needs else hidden.new_empty(0)
        self.weight = torch.empty_like(weight) if "weight" in needs else weight.new_empty(0)
        self.bias = hidden.new_empty(codes if "bias" in needs else 0)
        self._weight_block: Tensor | None = None
        self._bias_block: Tensor | None = None

    def add(self, rows: slice, weight: Tensor, tile: Tensor) -> None:
        """Take in the gradient (n, k) of one tile, whose weights (k, d) are given in the wide dtype."""
        if "hidden" in self._needs:
            self.hidden[rows].addmm_(tile, weight)
        if "weight" in self._needs:
            if self._weight_block is None:
                self._weight_block = torch.zeros_like(weight)
            self._weight_block.addmm_(tile.T, self._inputs[rows])
        if "bias" in self._needs:
            if self._bias_block is None:
                self._bias_block = tile.new_zeros(tile.shape[1])
            self._bias_block += tile.sum(dim=0)

    def store(self, codes: slice) -> None:
        """Close a block of codes."""
        if "weight" in self._needs:
            self.weight[codes] = 0 if self._weight_block is None else self._weight_block
        if "bias" in self._needs:
            self.bias[codes] = 0 if self._bias_block is None else self._bias_block
        self._weight_block = self._bias_block = None
