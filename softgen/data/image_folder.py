"""Images from a folder: one subfolder a class, or all in one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

from softgen.data.base import ImageDataModule, TrainVal
from softgen.data.image_files import IMAGE_SUFFIXES, ImageFileSource, is_readable_image
from softgen.data.split import check_val_fraction, stratified_split

_THREADS = 8


class ImageFolder(ImageDataModule):
    """Images of a folder, `root/<class>/*.png`, or `root/*.png` without classes.

    Files are png, jpg, jpeg, webp or bmp. Classes are numbered in the order of their folders' names. Each
    image is scaled so that its shorter edge has `resize` pixels (bicubic, antialiased), and its centre is cut
    out. Setup opens and verifies every file once.

    Args:
        root: The folder.
        image_size: Height and width in pixels of the square that is cut out.
        resize: Length in pixels of the shorter edge before the cut, at least `image_size`; None takes
            `image_size`.
        random_flip: Mirror half of the training images, chosen by the seed and each image's index.
        val_fraction: Fraction of each class that is held out, in (0, 1); the same images for every seed.
        strict: Refuse a corrupt file. Otherwise such files are skipped, with one warning.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes, which read and scale the images.
        seed: Seed of the order of samples and of the flips.

    Raises:
        ValueError: An argument is out of range or the folder has no images; at setup: a corrupt file if
            `strict`, or no images that can be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int,
        resize: int | None = None,
        random_flip: bool = False,
        val_fraction: float = 0.1,
        strict: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if image_size < 1:
            raise ValueError(f"data.image_size: expected at least 1, got {image_size}")
        if resize is not None and resize < image_size:
            raise ValueError(f"data.resize: expected at least data.image_size ({image_size}), got {resize}")
        check_val_fraction(val_fraction)
        self.root = Path(root)
        self.image_size = image_size
        self.resize = image_size if resize is None else resize
        self.random_flip = random_flip
        self.val_fraction = val_fraction
        self.strict = strict
        self.class_names = _class_names(self.root)
        self.num_classes = len(self.class_names)

    def load_sources(self) -> TrainVal:
        """Find and verify the files; images are read when they are fetched, held-out ones never flipped."""
        files = self._readable_files()
        labels = torch.tensor([label for _, label in files])
        split = stratified_split(labels, val_fraction=self.val_fraction)
        return TrainVal(
            train=self._source(files, split.train.tolist(), flip_seed=self.seed if self.random_flip else None),
            val=self._source(files, split.val.tolist(), flip_seed=None),
        )

    def _source(self, files: list[tuple[Path, int]], indices: list[int], *, flip_seed: int | None) -> ImageFileSource:
        chosen = [files[index] for index in indices]
        return ImageFileSource(
            [path for path, _ in chosen],
            labels=torch.tensor([label for _, label in chosen]) if self.num_classes else None,
            image_size=self.image_size,
            resize=self.resize,
            flip_seed=flip_seed,
        )

    def _readable_files(self) -> list[tuple[Path, int]]:
        """Every sound file and its class (0 where there are no classes), in the order of their names."""
        folders = [self.root / name for name in self.class_names] or [self.root]
        files = [(path, label) for label, folder in enumerate(folders) for path in _image_paths(folder)]
        with ThreadPoolExecutor(_THREADS) as pool:
            readable = list(pool.map(is_readable_image, [path for path, _ in files]))
        corrupt = [path for (path, _), is_good in zip(files, readable, strict=True) if not is_good]
        if corrupt and self.strict:
            raise ValueError(f"data.root: expected images only (data.strict is true), got a corrupt '{corrupt[0]}'")
        if len(corrupt) == len(files):
            raise ValueError(f"data.root: expected a folder with images, got only corrupt ones in '{self.root}'")
        if corrupt:
            rank_zero_warn(f"data.root: skipped {len(corrupt)} corrupt image(s), the first is '{corrupt[0]}'")
        return [file for file, is_good in zip(files, readable, strict=True) if is_good]


def _class_names(root: Path) -> list[str]:
    """Sorted names of the subfolders that hold images; empty where the images lie in the folder itself."""
    if not root.is_dir():
        raise ValueError(f"data.root: expected a folder with images, got '{root}', which is no folder")
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    names = sorted(folder.name for folder in folders if any(map(_is_image, folder.iterdir())))
    if not names and not any(map(_is_image, root.iterdir())):
        raise ValueError(f"data.root: expected a folder with images, got '{root}', which has none")
    return names


def _image_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
