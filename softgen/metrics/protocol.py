"""A fixed way to score generated images: an extractor, and the features of the real images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softgen.data.base import ImageDataModule
from softgen.data.batches import source_batches
from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.classifier_training import classifier_accuracy, train_classifier
from softgen.metrics.features import FeatureExtractor, extract_features, metric_name
from softgen.metrics.frechet import FeatureStatistics
from softgen.metrics.image_quality import ImageQuality, image_quality

_MAX_REFERENCE = 5000


@dataclass(frozen=True)
class Protocol:
    """An extractor and what it sees in the real training images.

    Attributes:
        extractor: Looks at the images; part of every metric's name.
        reference: Statistics of the features of all training images.
        reference_features: Features of at most 5,000 of them, a fixed random subset, (m, D).
        accuracy: Share of held-out real images that the extractor classifies rightly.
    """

    extractor: FeatureExtractor
    reference: FeatureStatistics
    reference_features: Tensor
    accuracy: float

    def name(self, n: int) -> str:
        """The name of the Frechet distance at n samples, such as `fd_digitsnet_1797`."""
        return metric_name("fd", self.extractor, n)

    def score(self, images: Tensor | Iterable[Tensor], labels: Tensor | None = None) -> ImageQuality:
        """Score images (n, 3, H, W) in [0, 1], or batches of them, and the classes asked for."""
        return image_quality(
            images,
            labels,
            extractor=self.extractor,
            reference=self.reference,
            reference_features=self.reference_features,
        )


def small_protocol(
    data: ImageDataModule,
    *,
    name: str,
    epochs: int,
    folder: str | Path,
    width: int = 32,
    reference: ImageDataModule | None = None,
    progress: bool = True,
) -> Protocol:
    """The protocol of a small data set: a classifier trained with a fixed seed, kept in `folder`.

    Args:
        data: Labelled images. The classifier trains on the training part; its accuracy is that on the held-out part.
        name: Of the extractor, such as `digitsnet`.
        epochs: Passes over the training images.
        folder: Where the classifier is kept; opened from there if it exists.
        width: Channels of the classifier's first convolution.
        reference: Whose training images are the real ones; by default those of `data`.
        progress: Show a progress bar of the training.
    """
    path = Path(folder)
    data.prepare_data()
    if (path / "config.json").is_file():
        classifier = SmallClassifier.load(path)
        accuracy = classifier_accuracy(classifier, data.val_source())
    else:
        result = train_classifier(data, name=name, epochs=epochs, width=width, progress=progress)
        classifier, accuracy = result.classifier, result.accuracy
        classifier.save(path)
    source = (reference or data).train_source()
    images = (batch["image"] for batch in source_batches(source, batch_size=512))
    features = extract_features(images, extractor=classifier).features
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:_MAX_REFERENCE]
    return Protocol(
        extractor=classifier,
        reference=FeatureStatistics.from_features(features),
        reference_features=features[chosen],
        accuracy=accuracy,
    )
