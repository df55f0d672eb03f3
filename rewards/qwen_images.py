"""Qwen2-VL's image preprocessing on tensors, differentiable.

Shape legend: B images, g_h and g_w patches of 14 pixels a side, rows of 3 x 2 x 14 x 14 numbers.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, normalised

PATCH, MERGE, FRAMES = 14, 2, 2


def fitted_size(height: int, width: int, *, least: int, most: int) -> tuple[int, int]:
    """Height and width, multiples of 28, of about the same aspect ratio and with `least` to `most` pixels."""
    factor = PATCH * MERGE
    fitted = (round(height / factor) * factor, round(width / factor) * factor)
    area = fitted[0] * fitted[1]
    if area > most:
        scale = math.sqrt(height * width / most)
        return _floor(height / scale, factor), _floor(width / scale, factor)
    if area < least:
        scale = math.sqrt(least / (height * width))
        return _ceil(height * scale, factor), _ceil(width * scale, factor)
    return fitted


def _floor(value: float, factor: int) -> int:
    return max(factor, math.floor(value / factor) * factor)


def _ceil(value: float, factor: int) -> int:
    return math.ceil(value / factor) * factor


def patch_rows(images: Tensor, *, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Rows of patches as Qwen2-VL takes them, and the grid of each image.

    Args:
        images: (B, 3, H, W), float, in [0, 1].
        least: Pixels at least.
        most: Pixels at most.

    Returns:
        Rows (B g_h g_w, 1176), in float32 or better, and grids (B, 3) int64 of (1, g_h, g_w).
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    batch, _, height, width = images.shape
    size = fitted_size(height, width, least=least, most=most)
    if size != (height, width):
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    images = normalised(images, mean=OPENAI_MEAN, std=OPENAI_STD)
    rows, columns = size[0] // PATCH, size[1] // PATCH
    # Patches are ordered so that the 2 x 2 that the model merges lie side by side.
    tiles = images.view(batch, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    tiles = tiles.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    grids = torch.tensor([[1, rows, columns]] * batch, device=images.device)
    return tiles.reshape(batch * rows * columns, 3 * FRAMES * PATCH**2), grids
