"""Where the shapes of a picture lie: each in a quarter of its own, by construction.

Pictures have two rows of two places each. Rows may later be turned into columns, and turned around.
Shape legend: B pictures, 4 objects: 0 and 1 in the first row, 2 and 3 in the second.
"""

import torch
from torch import Tensor

LAYOUT_DRAWS = 8
"""Random numbers that one layout takes."""

_MIDDLES = torch.tensor((0.25, 0.75))


def lay_out(is_shown: Tensor, *, is_related: Tensor, draws: Tensor) -> Tensor:
    """Centres of the objects of each picture.

    Args:
        is_shown: (B, 4) bool; objects are shown in order.
        is_related: (B,) bool: the second object lies straight beside the first.
        draws: (B, 8) uniform in [0, 1).

    Returns:
        (B, 4, 2): along the row, and across the rows, as fractions of the side.
    """
    anywhere = _MIDDLES[(draws * len(_MIDDLES)).long()]
    along, across = torch.split(anywhere, 4, dim=1)
    has_two = is_shown[:, 1::2].repeat_interleave(2, dim=1)  # in each row
    along = torch.where(has_two, _MIDDLES.repeat(2), along)
    across = torch.where(is_shown[:, 2:3], _MIDDLES.repeat_interleave(2), across)
    beside = torch.where(is_related, across[:, 0], across[:, 1])
    across = torch.cat([across[:, :1], beside[:, None], across[:, 2:]], dim=1)
    return torch.stack([along, across], dim=-1)
