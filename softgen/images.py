"""Writing images and grids of images."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded to the nearest level."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def grid(images: Tensor, *, columns: int, min_side: int = 32, padding: int = 2) -> Tensor:
    """Tile images (n, 3, H, W) row by row.

    Args:
        images: In [0, 1].
        columns: Images a row.
        min_side: Small images are enlarged by whole factors, without smoothing, to at least this side.
        padding: White pixels between images.

    Returns:
        (3, H', W') in [0, 1].
    """
    factor = max(1, math.ceil(min_side / images.shape[-1]))
    images = F.interpolate(images.detach().float().cpu(), scale_factor=factor, mode="nearest")
    rows = math.ceil(len(images) / columns)
    blank = images.new_ones(rows * columns - len(images), *images.shape[1:])
    padded = F.pad(torch.cat([images, blank]), (padding, padding, padding, padding), value=1.0)
    _, channels, height, width = padded.shape
    tiled = padded.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiled.reshape(channels, rows * height, columns * width)


def save_image(image: Tensor, path: str | Path) -> None:
    """Write one image (3, H, W) in [0, 1] as PNG, whole or not at all."""
    from PIL import Image

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial")
    Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy()).save(scratch, format="PNG")
    os.replace(scratch, target)


def remove_numbered(folder: Path) -> None:
    """Remove the images 00000.png, 00001.png, ... of an earlier run, which would pass for those of this one."""
    for path in folder.glob("[0-9]" * 5 + "*.png"):
        if path.stem.isdigit():
            path.unlink()


def save_grid(images: Tensor, path: str | Path, *, columns: int = 16, min_side: int = 32) -> None:
    """Write a grid of images (n, 3, H, W) in [0, 1] as PNG."""
    save_image(grid(images, columns=columns, min_side=min_side), path)
