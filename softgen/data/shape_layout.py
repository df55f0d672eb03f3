"""Where the shapes of a picture lie: apart from each other and from the border, by construction.

Centres lie at quarters of the side: a row, or the rows, of one object at any of the three, of two at the outer ones.
Rows may later be turned into columns, and turned around.
Shape legend: B pictures, 4 places: 0 and 1 in the first row, 2 and 3 in the second.
"""

import torch
from torch import Tensor

LAYOUT_DRAWS = 8
"""Random numbers that one layout takes."""

_QUARTERS = torch.tensor((0.25, 0.5, 0.75))
_OUTER = _QUARTERS[[0, 2]]


def lay_out(is_shown: Tensor, *, is_related: Tensor, draws: Tensor) -> Tensor:
    """Centres of the objects of each picture.

    Args:
        is_shown: (B, 4) bool; places are filled in order.
        is_related: (B,) bool: the second object lies straight beside the first.
        draws: (B, 8) uniform in [0, 1).

    Returns:
        (B, 4, 2): along the row, and across the rows, as fractions of the side.
    """
    anywhere = _QUARTERS[(draws * len(_QUARTERS)).long()]
    along, across = torch.split(anywhere, 4, dim=1)
    has_two = is_shown[:, 1::2].repeat_interleave(2, dim=1)  # in each row
    along = torch.where(has_two, _OUTER.repeat(2), along)
    across = torch.where(is_shown[:, 2:3], _OUTER.repeat_interleave(2), across)
    beside = torch.where(is_related, across[:, 0], across[:, 1])
    across = torch.cat([across[:, :1], beside[:, None], across[:, 2:]], dim=1)
    return torch.stack([along, across], dim=-1)
