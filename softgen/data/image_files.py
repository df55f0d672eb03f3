"""Image files that are read, scaled and cut when they are fetched."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softgen.random import derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


class ImageFileSource:
    """Samples that live in image files.

    Args:
        paths: The files.
        labels: Class of each file, (n,) int64, or None.
        image_size: Height and width in pixels of the square cut from the centre.
        resize: Length in pixels of the shorter edge before the cut.
        flip_seed: Seed of the choice of images that are mirrored, or None to mirror none.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        labels: Tensor | None,
        image_size: int,
        resize: int,
        flip_seed: int | None = None,
    ) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.image_size = image_size
        self.resize = resize
        self.flip_seed = flip_seed

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`image` (B, 3, H, W) float32 in [0, 1] and, where there are classes, `label` (B,) int64.

        Raises:
            ValueError: A file cannot be read.
        """
        batch = {"image": torch.stack([self._image(index) for index in indices])}
        if self.labels is not None:
            batch["label"] = self.labels[torch.as_tensor(indices, dtype=torch.int64)]
        return batch

    def _image(self, index: int) -> Tensor:
        image = read_image(self.paths[index], image_size=self.image_size, resize=self.resize)
        is_flipped = self.flip_seed is not None and derive_seed(self.flip_seed, "flip", index) % 2 == 1
        return image.flip(-1) if is_flipped else image


def is_readable_image(path: Path) -> bool:
    """Whether `read_image` can: the file opens, and all of it can be decoded (a truncated jpeg is found only so)."""
    try:
        _open(path)
    except ValueError:
        return False
    return True


def read_image(path: Path, *, image_size: int, resize: int) -> Tensor:
    """Read an image, turn it as its EXIF says, scale its shorter edge and cut out its centre.

    Args:
        path: The file.
        image_size: Height and width of the result in pixels.
        resize: Length of the shorter edge in pixels after the scaling (bicubic, antialiased).

    Returns:
        (3, image_size, image_size) float32 in [0, 1].

    Raises:
        ValueError: The file cannot be read.
    """
    from PIL import Image

    image = _open(path)
    scale = resize / min(image.size)
    width, height = (max(resize, round(edge * scale)) for edge in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    pixels = np.array(image.crop((left, top, left + image_size, top + image_size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def eight_bits(image: "Image") -> "Image":
    """Grey of 16 bits scaled to 8, which PIL would cut off at 255; any other image as it is."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    return Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))


def _open(path: Path) -> "Image":
    """The whole image, turned as its EXIF says."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            return eight_bits(ImageOps.exif_transpose(opened)).convert("RGB")
    # PIL reports a broken png by SyntaxError, a broken EXIF block by struct.error.
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"data.root: expected an image, got '{path}', which cannot be read ({error})") from error
