import pytest
import torch
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import ClassAccuracy, class_accuracy

LOGITS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 2.0], [0.0, 0.0, 0.1], [5.0, 0.0, 9.0]])
LABELS = torch.tensor([0, 2, 2, 2])


def test_the_function_and_the_metric() -> None:
    assert class_accuracy(LOGITS, LABELS) == 0.75
    left, right = (ClassAccuracy(PixelExtractor(feature_dim=3)) for _ in range(2))
    left.update(as_images(torch.zeros(1, 3), LOGITS[:1]), LABELS[:1])
    right.update(as_images(torch.zeros(3, 3), LOGITS[1:]), LABELS[1:])
    left.merge_state(right)
    assert float(left.compute()) == 0.75
    assert left.protocol_name(4) == "accuracy_pixels_4"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^labels: expected 4, one an image, got shape \(3,\)$"):
        class_accuracy(LOGITS, LABELS[:3])
    metric = ClassAccuracy(PixelExtractor(feature_dim=3))
    with pytest.raises(ValueError, match=r"^generated images: expected at least 1 samples, got 0$"):
        metric.compute()
    with pytest.raises(ValueError, match=r"^labels: expected 4, one an image, got shape \(3,\)$"):
        metric.update(as_images(LOGITS), LABELS[:3])
    with pytest.raises(ValueError, match=r"^logits: expected finite values"):
        class_accuracy(LOGITS * float("nan"), LABELS)
