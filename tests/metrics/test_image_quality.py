import pytest
import torch
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import (
    FeatureStatistics,
    class_accuracy,
    entropy_score,
    frechet_distance,
    image_quality,
    precision_recall,
)

GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.rand(40, 4, generator=GENERATOR)
FAKE = torch.rand(30, 4, generator=GENERATOR) + 0.3
LOGITS = torch.randn(30, 4, generator=GENERATOR)
LABELS = torch.arange(30) % 4
REFERENCE = FeatureStatistics.from_features(REAL)


def test_one_pass_gives_every_metric() -> None:
    extractor = PixelExtractor(feature_dim=4)
    images = as_images(FAKE, LOGITS)
    quality = image_quality(
        [images[:11], images[11:]], LABELS, extractor=extractor, reference=REFERENCE, reference_features=REAL
    )
    assert extractor.passes == 2
    assert quality.n == 30
    assert quality.fd == pytest.approx(frechet_distance(FeatureStatistics.from_features(FAKE), REFERENCE))
    assert quality.accuracy == class_accuracy(LOGITS, LABELS)
    assert quality.entropy_score == pytest.approx(entropy_score(LOGITS))
    expected = precision_recall(REAL, FAKE)
    assert (quality.precision, quality.recall) == (expected.precision, expected.recall)


def test_the_entropy_score_is_the_mean_over_parts() -> None:
    quality = image_quality(
        as_images(FAKE, LOGITS), extractor=PixelExtractor(feature_dim=4), reference=REFERENCE, split=12
    )
    parts = [entropy_score(part) for part in (LOGITS[:12], LOGITS[12:24], LOGITS[24:])]
    assert quality.entropy_score == pytest.approx(sum(parts) / 3)


def test_what_cannot_be_measured_is_none() -> None:
    extractor = PixelExtractor(feature_dim=4, has_classifier=False)
    quality = image_quality(as_images(FAKE), LABELS, extractor=extractor, reference=REFERENCE)
    assert (quality.accuracy, quality.entropy_score, quality.precision, quality.recall) == (None,) * 4
    with_logits = image_quality(as_images(FAKE), extractor=PixelExtractor(feature_dim=4), reference=REFERENCE)
    assert with_logits.accuracy is None
    assert with_logits.entropy_score == pytest.approx(1)


def test_precision_and_recall_use_a_subset_whatever_the_order_of_classes() -> None:
    clusters = 100 * (torch.arange(400) % 2).unsqueeze(1) + torch.rand(400, 4, generator=GENERATOR)
    quality = image_quality(
        as_images(clusters),
        extractor=PixelExtractor(feature_dim=4),
        reference=FeatureStatistics.from_features(clusters),
        reference_features=clusters,
        max_pr=200,
    )
    assert quality.n == 400
    assert quality.fd == pytest.approx(0, abs=1e-6)
    assert (quality.precision, quality.recall) == (1, 1)  # the same rows of both sides are drawn
    half = image_quality(
        as_images(clusters[::2]),
        extractor=PixelExtractor(feature_dim=4),
        reference=FeatureStatistics.from_features(clusters),
        reference_features=clusters,
        max_pr=200,
    )
    assert half.recall == pytest.approx(0.5, abs=0.12)


def test_errors() -> None:
    extractor = PixelExtractor(feature_dim=4)
    with pytest.raises(ValueError, match=r"^generated images: expected at least 2 samples, got 1$"):
        image_quality(as_images(FAKE[:1]), extractor=extractor, reference=REFERENCE)
    with pytest.raises(ValueError, match=r"^labels: expected 30, one an image, got shape \(29,\)$"):
        image_quality(as_images(FAKE), LABELS[1:], extractor=extractor, reference=REFERENCE)
    with pytest.raises(ValueError, match=r"^generated images: expected finite values, got NaN or infinity in 30 of 30"):
        image_quality(as_images(FAKE * float("nan")), extractor=extractor, reference=REFERENCE)
