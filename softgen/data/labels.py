"""Labels without images, for distillation that needs no data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softgen.data.base import ImageDataModule, TrainVal
from softgen.random import derive_seed


class LabelSource:
    """Class labels held in memory.

    Args:
        labels: (n,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`label` (B,) int64."""
        return {"label": self.labels[torch.as_tensor(indices, dtype=torch.int64)]}


class Labels(ImageDataModule):
    """Nothing but class labels, drawn uniformly; validation takes every class in turn.

    Args:
        num_classes: Number of classes, at least 1.
        image_size: Height and width of the images that the labels stand for, in pixels; 0 where nobody asks.
        samples_per_epoch: Labels in one epoch.
        val_samples: Labels of validation.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 is best here.
        seed: Seed of the labels and of their order.

    Raises:
        ValueError: An argument is out of range.
    """

    has_images = False

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int = 0,
        samples_per_epoch: int = 65536,
        val_samples: int = 1000,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        counts = {
            "num_classes": num_classes,
            "samples_per_epoch": samples_per_epoch,
            "val_samples": val_samples,
        }
        for key, count in counts.items():
            if count < 1:
                raise ValueError(f"data.{key}: expected at least 1, got {count}")
        if image_size < 0:
            raise ValueError(f"data.image_size: expected at least 0, got {image_size}")
        self.num_classes = num_classes
        self.image_size = image_size
        self.samples_per_epoch = samples_per_epoch
        self.val_samples = val_samples

    def load_sources(self) -> TrainVal:
        """`samples_per_epoch` labels, of which label i depends on the seed and on i alone; 0, 1, 2, ... held out."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "labels"))
        labels = torch.randint(self.num_classes, (self.samples_per_epoch,), generator=generator)
        held_out = torch.arange(self.val_samples) % self.num_classes
        return TrainVal(train=LabelSource(labels), val=LabelSource(held_out))
