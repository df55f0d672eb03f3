"""Mask schedules and the forward (masking) process of masked diffusion models.

Shape legend: B batch, N sites.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["linear", "square", "cosine", "arccos", "root"]
MaskLaw = Literal["linear", "square", "cosine", "arccos", "mage"]

_MAGE_MEAN, _MAGE_STD, _MAGE_LOW, _MAGE_HIGH = 0.55, 0.25, 0.5, 1.0


def _arccos(u: Tensor) -> Tensor:
    return u.clamp(0, 1).acos() * (2 / math.pi)


def _cosine(u: Tensor) -> Tensor:
    return (u * (math.pi / 2)).cos()


def _mage(u: Tensor) -> Tensor:
    """Truncated normal by its inverse distribution function (MAGE, arXiv 2211.09117)."""
    low, high = (
        torch.special.ndtr(torch.tensor((edge - _MAGE_MEAN) / _MAGE_STD)).item() for edge in (_MAGE_LOW, _MAGE_HIGH)
    )
    ratio: Tensor = _MAGE_MEAN + _MAGE_STD * torch.special.ndtri(low + (high - low) * u)
    return ratio.clamp(_MAGE_LOW, _MAGE_HIGH)


_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r.square(),
    "cosine": _cosine,
    "arccos": _arccos,
    "root": lambda r: 1 - r.sqrt(),
}
_LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u,
    "square": torch.square,
    "cosine": _cosine,
    "arccos": _arccos,
    "mage": _mage,
}


def masked_fraction(schedule: Schedule, progress: Tensor) -> Tensor:
    """Share of sites still masked after a share `progress` of the sampling steps (MaskGIT, arXiv 2202.04200).

    Args:
        schedule: Falls from 1 at progress 0 to 0 at progress 1.
        progress: In [0, 1], any shape.

    Raises:
        ValueError: If the schedule is unknown.
    """
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(get_args(Schedule))}, got {schedule!r}")
    return _SCHEDULES[schedule](progress)


def draw_mask_ratio(law: MaskLaw, uniform: Tensor, *, key: str = "mask_law") -> Tensor:
    """Mask ratios g(u) of the forward process, as Di[M]O's published code draws them.

    Args:
        law: arccos: acos(u) 2/pi; cosine: cos(pi u/2); linear: u; square: u^2; mage: a normal of mean 0.55 and
            standard deviation 0.25 truncated to [0.5, 1].
        uniform: Uniform draws in [0, 1), any shape.
        key: The config key that named the law, for the error message.

    Raises:
        ValueError: If the law is unknown.
    """
    if law not in _LAWS:
        raise ValueError(f"{key}: expected one of {', '.join(get_args(MaskLaw))}, got {law!r}")
    return _LAWS[law](uniform)


def mask_counts(ratio: Tensor, num_sites: int) -> Tensor:
    """Exact number of masked sites for each ratio: max(1, round(N ratio)), int64."""
    return (ratio * num_sites).round().long().clamp(1, num_sites)


def exact_mask(counts: Tensor, uniform: Tensor) -> Tensor:
    """Masks with exactly `counts` sites set, placed by a random permutation.

    Args:
        counts: Sites to mask in each sample, shape (B,), int64 in [0, N].
        uniform: Uniform draws whose order is the permutation, shape (B, N).

    Returns:
        True where masked, shape (B, N).
    """
    order = uniform.argsort(dim=-1)
    first = torch.arange(uniform.shape[-1], device=uniform.device) < counts.unsqueeze(-1)
    return torch.zeros_like(first).scatter_(-1, order, first)


def mask_least_confident(tokens: Tensor, confidence: Tensor, masked: Tensor, *, kept: int, mask_id: int) -> Tensor:
    """Mask the least confident tokens again, as TiTok's family of samplers does (arXiv 2406.07550).

    As many as `kept`, but fewer than the first sample had masked and at least one, and with them all that are as
    confident as the last of these. The count stays on the device.

    Args:
        tokens: (B, N).
        confidence: (B, N), infinite where a token stays.
        masked: Before they were drawn, (B, N).
        kept: Masks that the schedule leaves.
        mask_id: What masks.

    Returns:
        Tokens (B, N).
    """
    count = (masked[:1].sum(dim=1, keepdim=True) - 1).clamp(max=kept).clamp(min=1)
    threshold = confidence.sort(dim=-1).values.gather(-1, (count - 1).expand(len(tokens), 1))
    return tokens.masked_fill(confidence <= threshold, mask_id)
