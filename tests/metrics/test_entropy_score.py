import pytest
import torch
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import EntropyScore, entropy_score


def test_balanced_certain_images_score_the_number_of_classes() -> None:
    assert entropy_score(1000 * torch.eye(4).repeat(5, 1)) == pytest.approx(4)


def test_equal_images_score_one() -> None:
    assert entropy_score(torch.tensor([[1.0, 3.0, -2.0]]).repeat(7, 1)) == pytest.approx(1)


def test_two_images_have_the_closed_form() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    marginal = torch.tensor([0.6, 0.4], dtype=torch.float64)
    expected = float((probs * (probs / marginal).log()).sum(dim=1).mean().exp())
    assert entropy_score(probs.log() + 5) == pytest.approx(expected, rel=1e-12)


def test_splits_are_scored_on_their_own() -> None:
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    parts = [entropy_score(logits[:5]), entropy_score(logits[5:])]
    assert entropy_score(logits, splits=2) == pytest.approx(sum(parts) / 2)


def test_the_metric_is_the_function_and_merges() -> None:
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    left, right = (EntropyScore(PixelExtractor(feature_dim=3)) for _ in range(2))
    left.update(as_images(torch.zeros(4, 3), logits[:4]))
    right.update(as_images(torch.zeros(6, 3), logits[4:]))
    left.merge_state(right)
    assert float(left.compute()) == pytest.approx(entropy_score(logits), rel=1e-6)
    assert left.protocol_name(10) == "entropy_score_pixels_10"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^logits: expected at least 4 samples, got 3$"):
        entropy_score(torch.zeros(3, 2), splits=2)
    with pytest.raises(ValueError, match=r"^logits: expected finite values, got NaN or infinity in 3 of 3 samples$"):
        entropy_score(torch.full((3, 2), float("nan")))
    with pytest.raises(ValueError, match=r"^splits: expected at least 1, got 0$"):
        entropy_score(torch.zeros(3, 2), splits=0)
    with pytest.raises(ValueError, match=r"^splits: expected at least 1, got 0$"):
        EntropyScore(PixelExtractor(feature_dim=2), splits=0)
    with pytest.raises(ValueError, match=r"^extractor: expected one with a classifier, got 'pixels'"):
        EntropyScore(PixelExtractor(feature_dim=2, has_classifier=False))
