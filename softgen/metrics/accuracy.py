"""Class accuracy of generated images: does an independent classifier see the class that was asked for?"""

from typing import Any

import torch
from torch import Tensor

from softgen.metrics.feature_metric import ExtractorMetric, gathered
from softgen.metrics.features import FeatureExtractor, check_samples, extract_features, require_classifier


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of images whose largest logit is that of their label, in [0, 1].

    Args:
        logits: (n, C), n at least 1.
        labels: (n,) int64.

    Raises:
        ValueError: The shapes do not match, there are no images, or a logit is not finite.
    """
    rows = check_samples(logits, name="logits", minimum=1)
    if labels.shape != (len(rows),):
        raise ValueError(f"labels: expected {len(rows)}, one an image, got shape {tuple(labels.shape)}")
    return float((rows.argmax(dim=1) == labels.cpu()).double().mean())


def class_log_probability(images: Tensor, labels: Tensor, *, classifier: FeatureExtractor) -> float:
    """Mean log-probability of the class asked for, at most 0.

    Args:
        images: (n, 3, H, W) in [0, 1].
        labels: (n,) int64.
        classifier: An extractor with class logits.

    Raises:
        ValueError: The extractor has no logits, or the shapes do not match.
    """
    require_classifier(classifier)
    logits = extract_features(images, extractor=classifier).logits
    assert logits is not None
    if labels.shape != (len(logits),):
        raise ValueError(f"labels: expected {len(logits)}, one an image, got shape {tuple(labels.shape)}")
    return float(logits.double().log_softmax(dim=1).gather(1, labels.cpu()[:, None]).mean())


class ClassAccuracy(ExtractorMetric):
    """Fraction of generated images that the extractor's classifier assigns to the class asked for, in [0, 1].

    Logits are kept in float32, 4 n C bytes, and the labels beside them.

    Args:
        extractor: An extractor with a classifier.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: The extractor has no classifier; in `compute`, no images or logits that are not finite.
    """

    short_name = "accuracy"
    higher_is_better = True
    fake_logits: list[Tensor]
    fake_labels: list[Tensor]

    def __init__(self, extractor: FeatureExtractor, **kwargs: Any) -> None:
        super().__init__(extractor, **kwargs)
        require_classifier(extractor)
        assert extractor.num_classes is not None, "require_classifier has looked"
        self.add_rows("fake_logits", like=torch.zeros(0, extractor.num_classes))
        self.add_rows("fake_labels", like=torch.zeros(0, dtype=torch.int64))

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add generated images (B, 3, H, W) in [0, 1] and the classes asked for, (B,) int64."""
        if labels.shape != (len(images),):
            raise ValueError(f"labels: expected {len(images)}, one an image, got shape {tuple(labels.shape)}")
        with torch.no_grad():
            self.fake_logits.append(self.extractor.logits(images).float())
        self.fake_labels.append(labels)

    def compute(self) -> Tensor:
        """The accuracy, a float32 scalar."""
        logits = check_samples(gathered(self.fake_logits), name="generated images", minimum=1)
        return torch.tensor(class_accuracy(logits, gathered(self.fake_labels)))
