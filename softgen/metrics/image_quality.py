"""Every image metric from one pass of the extractor."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softgen.metrics.accuracy import class_accuracy
from softgen.metrics.entropy_score import entropy_score
from softgen.metrics.features import FeatureExtractor, check_samples, extract_features
from softgen.metrics.frechet import FeatureStatistics, frechet_distance
from softgen.metrics.precision_recall import PrecisionRecall, precision_recall

_SUBSET_SEED = 0


@dataclass(frozen=True)
class ImageQuality:
    """How good a set of generated images is.

    Attributes:
        fd: Frechet distance to the reference, at least 0.
        n: Number of generated images.
        accuracy: Fraction of images that are of the class asked for; None without labels or classifier.
        precision: Fraction of generated images that look real; None without reference features.
        recall: Fraction of real images that are covered; None without reference features.
        entropy_score: In [1, C]; None without a classifier.
    """

    fd: float
    n: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    entropy_score: float | None


def image_quality(
    images: Tensor | Iterable[Tensor],
    labels: Tensor | None = None,
    *,
    extractor: FeatureExtractor,
    reference: FeatureStatistics,
    reference_features: Tensor | None = None,
    max_pr: int = 5000,
    k: int = 5,
    split: int = 0,
) -> ImageQuality:
    """Measure generated images against a reference.

    Args:
        images: Generated images (n, 3, H, W) in [0, 1], or an iterable of such batches.
        labels: Classes asked for, (n,) int64, or None.
        extractor: The network that looks at the images.
        reference: Statistics of the real images, for the Frechet distance.
        reference_features: Features of real images, (m, D), for precision and recall; None leaves them out.
        max_pr: Most samples of each side that precision and recall use, a fixed random subset of them all.
        k: Neighbours of precision and recall.
        split: Consecutive images whose entropy score is taken together, before the mean; 0 takes all.

    Raises:
        ValueError: Too few images (2, or k + 1 with reference features), labels of another length, or
            features that are not finite.
    """
    seen = extract_features(images, extractor=extractor)
    fake = check_samples(seen.features, name="generated images")
    pr: PrecisionRecall | None = None
    if reference_features is not None:
        pr = precision_recall(fixed_subset(reference_features, max_pr), fixed_subset(fake, max_pr), k=k)
    return ImageQuality(
        fd=frechet_distance(FeatureStatistics.from_features(fake), reference),
        n=len(fake),
        accuracy=None if seen.logits is None or labels is None else class_accuracy(seen.logits, labels),
        precision=None if pr is None else pr.precision,
        recall=None if pr is None else pr.recall,
        entropy_score=None if seen.logits is None else _entropy_score(seen.logits, split=split),
    )


def _entropy_score(logits: Tensor, *, split: int) -> float:
    """The mean over parts of `split` images, the last of which may be smaller; one image has no score."""
    parts = torch.split(logits, split) if split else (logits,)
    return statistics.mean(entropy_score(part) for part in parts if len(part) > 1 or len(parts) == 1)


def fixed_subset(rows: Tensor, limit: int) -> Tensor:
    """At most `limit` rows, drawn by a fixed seed: generated images often come sorted by class."""
    if len(rows) <= limit:
        return rows
    generator = torch.Generator().manual_seed(_SUBSET_SEED)
    return rows.cpu()[torch.randperm(len(rows), generator=generator)[:limit]]
