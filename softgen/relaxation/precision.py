"""Keeping products in the precision of their operands, under mixed-precision training too."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in float32 at least: narrower floats are widened, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast does not narrow the products of tensors on `x`'s device."""
    return torch.autocast(x.device.type, enabled=False)
