"""Fashion-MNIST: 28x28 grey images of clothes (Xiao et al. 2017, arXiv 1708.07747)."""

from pathlib import Path

from softgen.data.base import ImageDataModule, TrainVal
from softgen.data.idx import read_idx
from softgen.data.memory import TensorSource

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class FashionMNIST(ImageDataModule):
    """Fashion-MNIST: 60,000 training images and 10,000 test images for validation, 28x28 pixels, 10 classes.

    Args:
        root: Folder of the four idx files, gzipped or plain, in itself or in `FashionMNIST/raw` below it.
        download: Download the files into `root` when they are not there.
        limit: Train on the first so many images only; None takes all.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 is best here.
        seed: Seed of the order of samples.

    Raises:
        ValueError: An argument is out of range; later, at setup: the files are missing, truncated or foreign.
    """

    image_size = 28
    num_classes = 10

    def __init__(
        self,
        root: str | Path = "data/fashion_mnist",
        *,
        download: bool = True,
        limit: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if limit is not None and limit < 1:
            raise ValueError(f"data.limit: expected at least 1, got {limit}")
        self.root = Path(root)
        self.download = download
        self.limit = limit

    def prepare_data(self) -> None:
        """Download the files if they are missing and that is allowed; the trainer calls it on one process."""
        if self.download and self._find() is None:
            from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

            try:
                TorchvisionFashionMNIST(str(self.root), download=True)
            except (RuntimeError, OSError) as error:
                message = f"data.root: expected the four files of Fashion-MNIST in '{self.root}', or a download"
                raise ValueError(f"{message}, got neither ({error})") from error

    def _find(self) -> list[Path] | None:
        """The four files in the order of `_FILES`, from the first folder that has them all."""
        for folder in (self.root, self.root / "FashionMNIST" / "raw"):
            paths = [_plain_or_zipped(folder / name) for name in _FILES]
            found = [path for path in paths if path is not None]
            if len(found) == len(_FILES):
                return found
        return None

    def load_sources(self) -> TrainVal:
        """The 60,000 training images, or the first `limit` of them, and the 10,000 test images."""
        paths = self._find()
        if paths is None:
            raise ValueError(
                f"data.root: expected a folder with {_FILES[0]}[.gz] and its three companions, in itself "
                f"or in FashionMNIST/raw, got '{self.root}'"
            )
        train_images, train_labels, val_images, val_labels = paths
        return TrainVal(
            train=_read_source(train_images, train_labels, limit=self.limit),
            val=_read_source(val_images, val_labels, limit=None),
        )


def _plain_or_zipped(path: Path) -> Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_source(images_path: Path, labels_path: Path, *, limit: int | None) -> TensorSource:
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: expected images of 28x28 pixels, got {images.shape[1]}x{images.shape[2]}")
    if len(labels) != len(images):
        raise ValueError(f"{labels_path}: expected {len(images)} labels, one an image, got {len(labels)}")
    if len(labels) and int(labels.max()) >= FashionMNIST.num_classes:
        raise ValueError(f"{labels_path}: expected labels from 0 to 9, got {int(labels.max())}")
    return TensorSource(images[:limit], labels[:limit])
