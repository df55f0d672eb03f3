"""What image metrics are computed on: a network's features, and names that say which network and how many."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What an extractor sees in B images.

    Attributes:
        features: (B, D) float32.
        logits: (B, C) float32, or None where the extractor has no classifier.
    """

    features: Tensor
    logits: Tensor | None


class FeatureExtractor(nn.Module, ABC):
    """A network that turns images into features, and perhaps class logits, to compare sets of images by.

    A subclass sets the attributes in its constructor and implements `features_and_logits`.

    Attributes:
        name: Short name, which becomes a part of each metric's name, such as "digitsnet".
        feature_dim: Number of features D.
        num_classes: Number of classes C of the logits, or None where there are none.
    """

    name: str
    feature_dim: int
    num_classes: int | None

    @abstractmethod
    def features_and_logits(self, images: Tensor) -> ImageFeatures:
        """Both results in one pass.

        Args:
            images: (B, 3, H, W) floats in [0, 1].
        """

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) float32 of images (B, 3, H, W) in [0, 1]."""
        return self.features_and_logits(images).features

    def logits(self, images: Tensor) -> Tensor:
        """Class logits (B, C) float32 of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: The extractor has no classifier.
        """
        require_classifier(self)
        logits = self.features_and_logits(images).logits
        assert logits is not None, "num_classes says that there are logits"
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """The features, as `features` gives them."""
        return self.features(images)


def require_classifier(extractor: FeatureExtractor) -> None:
    """Raise ValueError unless the extractor gives class logits."""
    if extractor.num_classes is None:
        raise ValueError(f"extractor: expected one with a classifier, got '{extractor.name}', which has none")


def extract_features(
    images: Tensor | Iterable[Tensor], *, extractor: FeatureExtractor, batch_size: int = 256
) -> ImageFeatures:
    """Features and logits of many images, in eval mode, without gradients.

    Args:
        images: (n, 3, H, W) in [0, 1], or an iterable of such batches.
        extractor: The network. Batches are moved to its device.
        batch_size: Images a pass when `images` is one tensor.

    Returns:
        Features (n, D) and logits (n, C), float32 on the CPU.

    Raises:
        ValueError: There are no images.
    """
    batches = torch.split(images, batch_size) if isinstance(images, Tensor) else images
    parameter = next(extractor.parameters(), None)
    was_training = extractor.training
    extractor.eval()
    try:
        with torch.no_grad():
            results = [
                _on_cpu(extractor.features_and_logits(batch if parameter is None else batch.to(parameter.device)))
                for batch in batches
            ]
    finally:
        extractor.train(was_training)
    if not results:
        raise ValueError("images: expected at least one batch, got none")
    logits = [result.logits for result in results if result.logits is not None]
    return ImageFeatures(
        features=torch.cat([result.features for result in results]),
        logits=torch.cat(logits) if logits else None,
    )


def _on_cpu(result: ImageFeatures) -> ImageFeatures:
    """In float32: what many images give need not stay on the extractor's device."""
    logits = None if result.logits is None else result.logits.float().cpu()
    return ImageFeatures(features=result.features.float().cpu(), logits=logits)


def check_samples(rows: Tensor, *, name: str, minimum: int = 2) -> Tensor:
    """Checked rows, as float64 on the CPU (MPS has no float64).

    Args:
        rows: Features or logits, (n, D).
        name: What to call them in the error.
        minimum: Fewest rows that the metric is defined for.

    Raises:
        ValueError: The shape is another, there are too few rows, or a value is NaN or infinite.
    """
    if rows.ndim != 2:
        raise ValueError(f"{name}: expected shape (n, D), got {tuple(rows.shape)}")
    if len(rows) < minimum:
        raise ValueError(f"{name}: expected at least {minimum} samples, got {len(rows)}")
    rows = rows.detach().cpu().double()
    bad = len(rows) - int(rows.isfinite().all(dim=1).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in {bad} of {len(rows)} samples")
    return rows


def count_name(n: int) -> str:
    """A count as it stands in a metric's name: 1797 -> "1797", 5000 -> "5k", 50000 -> "50k"."""
    return f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)


def metric_name(metric: str, extractor: FeatureExtractor, n: int) -> str:
    """A metric's full name: what, on which features, over how many images, such as "fd_digitsnet_5k"."""
    return f"{metric}_{extractor.name}_{count_name(n)}"
