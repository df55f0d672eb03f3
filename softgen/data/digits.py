"""The 8x8 digits that scikit-learn carries inside: no download, seconds a run."""

import torch

from softgen.data.base import ImageDataModule, TrainVal
from softgen.data.memory import TensorSource
from softgen.data.split import check_val_fraction, stratified_split


class Digits(ImageDataModule):
    """Scikit-learn's 1797 grey images of digits, 8x8 pixels, 10 classes.

    Args:
        val_fraction: Fraction of each class that is held out, in (0, 1); the same images for every seed.
        train_on_all: Train on all 1797 images. Validation is still the held-out part, and then measures
            memory and not generalisation.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 is best here.
        seed: Seed of the order of samples.

    Raises:
        ValueError: An argument is out of range.
    """

    image_size = 8
    num_classes = 10

    def __init__(
        self,
        *,
        val_fraction: float = 0.2,
        train_on_all: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_val_fraction(val_fraction)
        self.val_fraction = val_fraction
        self.train_on_all = train_on_all

    def load_sources(self) -> TrainVal:
        """The 1797 images, or the part of them that is not held out, and the held-out part."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float() / 16
        labels = torch.from_numpy(digits.target).long()
        split = stratified_split(labels, val_fraction=self.val_fraction)
        kept = torch.arange(len(labels)) if self.train_on_all else split.train
        return TrainVal(
            train=TensorSource(images[kept], labels[kept]),
            val=TensorSource(images[split.val], labels[split.val]),
        )
