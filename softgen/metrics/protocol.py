"""A fixed way to score generated images: an extractor, and the features of the real images."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softgen.data.base import ImageDataModule
from softgen.data.batches import source_batches
from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.classifier_training import classifier_accuracy, train_classifier
from softgen.metrics.features import FeatureExtractor, extract_features, metric_name
from softgen.metrics.frechet import UNREADABLE_NPZ, FeatureStatistics
from softgen.metrics.image_quality import ImageQuality, fixed_subset, image_quality

_MAX_REFERENCE = 5000
_ADM_REFERENCE = 10_000
_INCEPTION_BATCH = 64


@dataclass(frozen=True)
class Protocol:
    """An extractor and what it sees in the real images.

    Attributes:
        extractor: Looks at the images; part of every metric's name.
        reference: Statistics of the features of all real images.
        reference_features: Features of some of them, (m, D), for precision and recall; None leaves these out.
        accuracy: Share of held-out real images that the extractor classifies rightly; None where its classes are not
            those of the images.
        metric: What the Frechet distance is called.
        neighbours: Of precision and recall.
        largest: Most samples a side that precision and recall use.
        split: Images whose entropy score is taken together; 0 takes all.
        facts: What else a figure must say to be compared.
    """

    extractor: FeatureExtractor
    reference: FeatureStatistics
    reference_features: Tensor | None
    accuracy: float | None
    metric: str = "fd"
    neighbours: int = 5
    largest: int = 5000
    split: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)

    def name(self, n: int) -> str:
        """The name of the Frechet distance at n samples, such as `fd_digitsnet_1797`."""
        return metric_name(self.metric, self.extractor, n)

    def score(self, images: Tensor | Iterable[Tensor], labels: Tensor | None = None) -> ImageQuality:
        """Score images (n, 3, H, W) in [0, 1], or batches of them, and the classes asked for."""
        return image_quality(
            images,
            labels if self.accuracy is not None else None,
            extractor=self.extractor,
            reference=self.reference,
            reference_features=self.reference_features,
            k=self.neighbours,
            max_pr=self.largest,
            split=self.split,
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
    return Protocol(
        extractor=classifier,
        reference=FeatureStatistics.from_features(features),
        reference_features=fixed_subset(features, _MAX_REFERENCE),
        accuracy=accuracy,
    )


def adm_protocol(
    *,
    statistics: str | Path | None = None,
    data: ImageDataModule | None = None,
    weights: str | Path | None = None,
    device: torch.device | None = None,
) -> Protocol:
    """The FID of ADM's evaluator (arXiv 2105.05233), and precision, recall and inception score by its settings.

    Args:
        statistics: An .npz with `mu` and `sigma` of the real images, such as ADM's VIRTUAL_imagenet256_labeled.npz; the
            images in it, if any (`arr_0`), serve precision and recall. Or what `FeatureStatistics.save` wrote.
        data: In place of it, a data module, whose training images are the real ones.
        weights: As `InceptionFeatures` takes them.
        device: Where Inception runs; by default the CPU.

    Raises:
        ValueError: Neither or both are given, or a file cannot be read.
    """
    from softgen.metrics.inception import InceptionFeatures

    if (statistics is None) == (data is None):
        got = "neither" if data is None else "both"
        raise ValueError(f"statistics: expected a file of statistics or data, one of them, got {got}")
    known = None if statistics is None else FeatureStatistics.load(statistics)
    extractor = InceptionFeatures(weights).to(device)
    if known is not None and len(known.mean) != extractor.feature_dim:
        raise ValueError(
            f"statistics: expected those of {extractor.feature_dim} features in {statistics}, got {len(known.mean)}"
        )
    if data is None:
        assert statistics is not None
        images = _images_beside(Path(statistics))
    else:
        data.prepare_data()
        images = (batch["image"] for batch in source_batches(data.train_source(), batch_size=_INCEPTION_BATCH))
    features = None if images is None else extract_features(images, extractor=extractor).features
    if known is None:
        assert features is not None
        known = FeatureStatistics.from_features(features)
    return Protocol(
        extractor=extractor,
        reference=known,
        reference_features=None if features is None else fixed_subset(features, _ADM_REFERENCE),
        accuracy=None,
        metric="fid",
        neighbours=3,
        largest=50_000,
        split=5000,
        facts={
            "inception": extractor.fingerprint,
            "statistics": known.fingerprint(),
            "images": "rounded to 8 bits, stretched as by TensorFlow 1",
        },
    )


def _images_beside(path: Path) -> Iterator[Tensor] | None:
    """Batches of the real images (n, H, W, 3) uint8 that ADM's files hold beside the statistics; None without any."""
    if path.suffix != ".npz":
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "arr_0" not in arrays.files:
                return None
            images = torch.from_numpy(arrays["arr_0"])
    except UNREADABLE_NPZ as error:
        raise ValueError(f"statistics: expected images that can be read in {path}, got an error ({error})") from error
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"statistics: expected images (n, H, W, 3) of uint8 in {path}, got {tuple(images.shape)} of {images.dtype}"
        )
    return (part.permute(0, 3, 1, 2).float() / 255 for part in torch.split(images, _INCEPTION_BATCH))
