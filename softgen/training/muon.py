"""Muon: momentum whose matrices are made orthogonal (https://kellerjordan.github.io/posts/muon).

Shape legend: G matrices, R rows, C columns, R <= C.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from softgen.devices import on_accelerator

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that an iteration applies to the singular values."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7
WIDE = 1.5
"""Columns per row from which on iterations on X X^T cost less than those on X."""
BATCH = 2**24
"""Elements that are made orthogonal at once, at most, or one matrix; it bounds the memory."""


class Muon(torch.optim.Optimizer):
    """The updates and the state of `torch.optim.Muon`, matrices of one shape together.

    Small models have dozens of small matrices, and one at a time they keep an accelerator waiting for its launches. An
    accelerator computes in bfloat16, as Muon's author does; a processor, where bfloat16 may be emulated at a third of
    the speed, in the matrices' own type, and there iterates on their small products where they are wide.

    Args:
        params: Matrices, or groups of them.
        lr: Of a square matrix or a wide one; a tall (R, C) one takes sqrt(R / C) times as much.
        weight_decay: Decoupled.
        momentum: Of the moving average of gradients, with Nesterov's look ahead.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            assert all(parameter.ndim == 2 for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            for some in _alike(matrices):
                directions = orthogonalise(torch.stack([_wide(self._momentum(matrix, group)) for matrix in some]))
                for matrix, direction in zip(some, directions, strict=True):
                    rows, columns = matrix.shape
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    step = group["lr"] * math.sqrt(max(1.0, rows / columns))
                    matrix.add_(direction if rows <= columns else direction.T, alpha=-step)
        return loss

    def _momentum(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        assert matrix.grad is not None
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
        return matrix.grad.lerp(average, group["momentum"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows, roughly: singular values end between 0.68 and 1.13.

    Args:
        matrices: (G, R, C).

    Returns:
        Like `matrices`, bfloat16 on an accelerator.
    """
    result = matrices.bfloat16() if on_accelerator(matrices.device) else matrices
    result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp(min=SMALLEST_NORM)
    if torch.finfo(result.dtype).bits >= 32 and result.shape[2] > WIDE * result.shape[1]:
        return torch.bmm(_iterated_product(result @ result.mT), result)
    first = COEFFICIENTS[0]
    for _ in range(ITERATIONS):
        result = torch.baddbmm(result, _higher_terms(result @ result.mT), result, beta=first)
    return result


def _iterated_product(gram: Tensor) -> Tensor:
    """What all iterations together multiply matrices X by, from their X X^T alone, (G, R, R).

    An iteration multiplies X by a polynomial P of X X^T, which then is P X X^T P: wide matrices need not be touched
    (Gram Newton-Schulz, https://tridao.me/blog/2026/gram-newton-schulz). Half precision would not hold it.
    """
    first = COEFFICIENTS[0]
    higher = _higher_terms(gram)
    product = higher + first * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS - 1):
        half_way = torch.baddbmm(gram, higher, gram, beta=first)
        gram = torch.baddbmm(half_way, half_way, higher, beta=first)
        higher = _higher_terms(gram)
        product = torch.baddbmm(product, higher, product, beta=first)
    return product


def _higher_terms(gram: Tensor) -> Tensor:
    """The polynomial of X X^T but for its constant term, the first coefficient."""
    _, cubic, quintic = COEFFICIENTS
    return torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _alike(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices that can be stacked once they are wide, at most `BATCH` elements or one matrix at a time."""
    kinds: dict[Any, list[Tensor]] = {}
    for matrix in matrices:
        kinds.setdefault((_wide(matrix).shape, matrix.dtype, matrix.device), []).append(matrix)
    for some in kinds.values():
        size = max(1, BATCH // some[0].numel())
        for first in range(0, len(some), size):
            yield some[first : first + size]
