"""Muon: momentum whose matrices are made orthogonal (https://kellerjordan.github.io/posts/muon).

Shape legend: G matrices, R rows, C columns.
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
ELONGATED = 1.5
"""Ratio of the sides from which on iterations on X X^T, or X^T X, cost less than those on X."""
BATCH = 2**24
"""Elements that are made orthogonal at once, at most, or one matrix; it bounds the memory."""


class Muon(torch.optim.Optimizer):
    """The updates and the state of `torch.optim.Muon`, matrices of one shape together.

    Small models have dozens of small matrices, and one at a time they keep an accelerator waiting for its launches. An
    accelerator computes in bfloat16, as Muon's author does; a processor, where bfloat16 may be emulated at a third of
    the speed, in the matrices' own type, and there iterates on their small products where one side is longer.

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
                directions = orthogonalise(torch.stack(self._momentum(some, group))).to(some[0].dtype)
                if group["weight_decay"]:
                    torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                rows, columns = some[0].shape
                step = group["lr"] * math.sqrt(max(1.0, rows / columns))
                torch._foreach_add_(some, directions.unbind(), alpha=-step)
        return loss

    def _momentum(self, matrices: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, ...]:
        """The moving averages of the gradients, moved, with Nesterov's look ahead."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        return torch._foreach_lerp(gradients, averages, group["momentum"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows, or columns where these are fewer, roughly.

    Singular values end between 0.68 and 1.13.

    Args:
        matrices: (G, R, C).

    Returns:
        Like `matrices`, bfloat16 on an accelerator.
    """
    result = matrices.bfloat16() if on_accelerator(matrices.device) else matrices
    result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp(min=SMALLEST_NORM)
    rows, columns = result.shape[1:]
    is_wide = rows <= columns
    if torch.finfo(result.dtype).bits >= 32 and max(rows, columns) > ELONGATED * min(rows, columns):
        product = _iterated_product(_gram(result, is_wide=is_wide))
        return torch.bmm(product, result) if is_wide else torch.bmm(result, product)
    first = COEFFICIENTS[0]
    for _ in range(ITERATIONS):
        higher = _higher_terms(_gram(result, is_wide=is_wide))
        result = torch.baddbmm(result, *((higher, result) if is_wide else (result, higher)), beta=first)
    return result


def _gram(matrices: Tensor, *, is_wide: bool) -> Tensor:
    """The smaller of X X^T and X^T X."""
    return torch.bmm(matrices, matrices.mT) if is_wide else torch.bmm(matrices.mT, matrices)


def _iterated_product(gram: Tensor) -> Tensor:
    """What all iterations together multiply matrices X by, from the smaller of X X^T and X^T X alone.

    An iteration multiplies X by a polynomial P of X X^T, which then is P X X^T P: X itself need not be touched
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
    """The polynomial of a Gram matrix but for its constant term, the first coefficient."""
    _, cubic, quintic = COEFFICIENTS
    return torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)


def _alike(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices that can be stacked, at most `BATCH` elements or one matrix at a time."""
    kinds: dict[Any, list[Tensor]] = {}
    for matrix in matrices:
        kinds.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(matrix)
    for some in kinds.values():
        size = max(1, BATCH // some[0].numel())
        for first in range(0, len(some), size):
            yield some[first : first + size]
