"""Images held in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TensorSource:
    """An in-memory set of samples. Grey images are kept as one channel and repeated to three when fetched.

    Args:
        images: (n, H, W), (n, 1, H, W) or (n, 3, H, W); uint8 in [0, 255], or floating point in [0, 1].
        labels: Class of each image, (n,) integers, or None where there are no classes.

    Raises:
        ValueError: Shape, dtype or length is none of these.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        if images.ndim == 3:
            images = images.unsqueeze(1)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images: expected (n, H, W) or (n, 1 or 3, H, W), got {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images: expected uint8 or floating point, got {images.dtype}")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"labels: expected {len(images)}, one an image, got shape {tuple(labels.shape)}")
        self.images = images if images.dtype == torch.uint8 else images.float()
        self.labels = None if labels is None else labels.long()

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`image` (B, 3, H, W) float32 in [0, 1] and, where there are classes, `label` (B,) int64."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        batch = {"image": images.repeat(1, 3 // images.shape[1], 1, 1)}
        if self.labels is not None:
            batch["label"] = self.labels[index]
        return batch
