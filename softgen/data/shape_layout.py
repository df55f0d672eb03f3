"""Where the shapes of a picture lie: apart from each other and from the border, by construction.

Objects fill up to two rows of up to two places. Free space is shared out at random along the rows, then across
them, so that no layout is ever drawn in vain. Rows may later be turned into columns, and turned around.
Shape legend: B pictures, 4 places: 0 and 1 in the first row, 2 and 3 in the second.
"""

import torch
from torch import Tensor

MARGIN = 0.04
"""Least distance from an object to the border, as a fraction of the side, before places are rounded."""
GAP = 0.16
"""Least distance between two objects, along the rows or across them, before places are rounded."""
MAX_SLANT = 0.25
"""Where a relation is stated: the largest offset across it, in units of the offset along it."""
LAYOUT_DRAWS = 11
"""Random numbers that one layout takes."""


def lay_out(radius: Tensor, *, is_related: Tensor, draws: Tensor) -> Tensor:
    """Centres of the objects of each picture.

    Args:
        radius: (B, 4), 0 where there is no object; places are filled in order.
        is_related: (B,) bool: the second object lies beside the first, with at most `MAX_SLANT`.
        draws: (B, 11) uniform in [0, 1).

    Returns:
        (B, 4, 2): along the row, and across the rows.
    """
    row_splits, row_split, places_along, places_across = torch.split(draws, [2, 1, 4, 4], dim=1)
    pairs = radius.view(-1, 2, 2)
    along_parts = _parts(pairs, row_splits).flatten(1, 2)
    along = _within(along_parts, radius, places_along)
    rows = _parts(pairs.amax(dim=2).unsqueeze(1), row_split).squeeze(1).repeat_interleave(2, dim=1)
    across = _within(rows, radius, places_across)

    reach = MAX_SLANT * (along[:, 1] - along[:, 0])
    part = torch.stack([across[:, 0] - reach - radius[:, 1], across[:, 0] + reach + radius[:, 1]], dim=1)
    part = torch.stack([torch.maximum(part[:, 0], rows[:, 1, 0]), torch.minimum(part[:, 1], rows[:, 1, 1])], dim=1)
    beside = _within(part[:, None], radius[:, 1:2], places_across[:, 1:2])[:, 0]
    across[:, 1] = torch.where(is_related, beside, across[:, 1])
    return torch.stack([along, across], dim=-1)


def _parts(radius: Tensor, split: Tensor) -> Tensor:
    """Share [MARGIN, 1 - MARGIN] between two objects, or leave it all to the first.

    Args:
        radius: (B, R, 2), 0 where there is no second object.
        split: (B, R) in [0, 1), the first object's share of the free space.

    Returns:
        (B, R, 2, 2): where the part of each object begins and ends.
    """
    free = 1 - 2 * MARGIN - GAP - 2 * radius.sum(dim=2)
    end = torch.where(radius[..., 1] > 0, MARGIN + 2 * radius[..., 0] + split * free, 1 - MARGIN)
    low, high = torch.full_like(end, MARGIN), torch.full_like(end, 1 - MARGIN)
    return torch.stack([torch.stack([low, end], dim=2), torch.stack([end + GAP, high], dim=2)], dim=2)


def _within(parts: Tensor, radius: Tensor, places: Tensor) -> Tensor:
    """Centres (B, P) of objects of radii (B, P), each at its own place in [0, 1) of its part (B, P, 2)."""
    low, high = parts[..., 0] + radius, parts[..., 1] - radius
    return low + places * (high - low)
