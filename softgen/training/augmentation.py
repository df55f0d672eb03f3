"""DiffAugment (arXiv 2006.10738): differentiable augmentation of what a discriminator sees.

Shape legend: B batch, H and W pixels.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from softgen.categorical import UniformSource

Augmentation = Literal["translation", "colour", "cutout"]
DRAWS = 10
"""Uniform draws a sample that one call of `augment` takes, whatever it does with them."""


def augment(
    images: Tensor, draws: Tensor, *, kinds: Sequence[Augmentation], probability: float, cutout: float
) -> Tensor:
    """Change each image at random, differentiably.

    Args:
        images: (B, 3, H, W).
        draws: Uniform in [0, 1), (B, `DRAWS`); real and fake may share them.
        kinds: `translation` by up to an eighth of the side, what comes in is 0; `colour`: brightness by up to +-0.5,
            saturation by 0 to 2, contrast by 0.5 to 1.5; `cutout`: a square is 0.
        probability: That a kind is applied to an image.
        cutout: Side of the square as a share of the image's.
    """
    applied = draws[:, :3] < probability
    if "colour" in kinds:
        images = torch.where(_column(applied[:, 0]), _coloured(images, draws[:, 3:6]), images)
    if "translation" in kinds:
        shifts = ((2 * draws[:, 6:8] - 1) * images.shape[-1] / 8).round().long()
        images = _translated(images, shifts * applied[:, 1:2])
    if "cutout" in kinds:
        side = round(cutout * images.shape[-1])
        hole = _square(images, draws[:, 8:10], side=side) & _column(applied[:, 2])
        images = images.masked_fill(hole, 0)
    return images


def augmentation_draws(noise: UniformSource) -> Tensor:
    """The draws (B, `DRAWS`) of one call."""
    return noise.uniform(DRAWS)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _coloured(images: Tensor, draws: Tensor) -> Tensor:
    brightness, saturation, contrast = (_column(column) for column in draws.to(images.dtype).unbind(1))
    images = images + brightness - 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, 2 * saturation)
    centre = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(centre, images, contrast + 0.5)


def _translated(images: Tensor, shifts: Tensor) -> Tensor:
    """Images moved down and right by shifts (B, 2) pixels."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shifts[:, :1]
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height)).view(batch, 1, height, 1) & ((columns >= 0) & (columns < width)).view(
        batch, 1, 1, width
    )
    sample = torch.arange(batch, device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[
        sample, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    ]
    return moved.permute(0, 3, 1, 2) * inside


def _square(images: Tensor, draws: Tensor, *, side: int) -> Tensor:
    """True in a square about a point drawn anywhere, (B, 1, H, W); it may reach over the edge."""
    height, width = images.shape[-2:]
    top = (draws[:, 0] * height).floor().view(-1, 1, 1, 1) - side // 2
    left = (draws[:, 1] * width).floor().view(-1, 1, 1, 1) - side // 2
    row = torch.arange(height, device=images.device).view(1, 1, -1, 1)
    column = torch.arange(width, device=images.device).view(1, 1, 1, -1)
    return (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
