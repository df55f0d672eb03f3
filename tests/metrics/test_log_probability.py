"""Mean log-probability of the class asked for."""

import pytest
import torch
from torch.nn import functional as F

from softgen.metrics import SmallClassifier, class_log_probability


def test_the_mean_over_images_of_the_labels_log_probability() -> None:
    classifier = SmallClassifier(name="toy", image_size=8, num_classes=3, width=2).eval()
    images, labels = torch.rand(7, 3, 8, 8), torch.arange(7) % 3
    expected = -F.cross_entropy(classifier.logits(images), labels).item()
    assert class_log_probability(images, labels, classifier=classifier) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"labels: expected 7, one an image, got shape \(3,\)"):
        class_log_probability(images, labels[:3], classifier=classifier)
