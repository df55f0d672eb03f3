import pytest
import torch
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import ImageFeatures, count_name, extract_features, metric_name
from softgen.metrics.features import check_samples


@pytest.mark.parametrize(
    ("n", "name"),
    [(1797, "1797"), (10000, "10k"), (5000, "5k"), (50000, "50k"), (999, "999"), (1000, "1k"), (0, "0")],
)
def test_count_name(n: int, name: str) -> None:
    assert count_name(n) == name


def test_metric_name() -> None:
    extractor = PixelExtractor(feature_dim=2)
    extractor.name = "digitsnet"
    assert metric_name("fd", extractor, 5000) == "fd_digitsnet_5k"


def test_features_and_logits_agree_with_their_parts() -> None:
    extractor, images = PixelExtractor(feature_dim=4), torch.rand(5, 3, 1, 4)
    torch.testing.assert_close(extractor.features(images), images[:, 0, 0])
    torch.testing.assert_close(extractor.logits(images), images[:, 1, 0])
    torch.testing.assert_close(extractor(images), images[:, 0, 0])


def test_an_extractor_without_classifier_has_no_logits() -> None:
    extractor = PixelExtractor(feature_dim=4, has_classifier=False)
    with pytest.raises(ValueError, match=r"^extractor: expected one with a classifier, got 'pixels', which has none$"):
        extractor.logits(torch.rand(5, 3, 1, 4))
    assert extract_features(torch.rand(5, 3, 1, 4), extractor=extractor).logits is None


def test_extraction_in_batches_is_extraction_at_once() -> None:
    extractor, images = PixelExtractor(feature_dim=4), torch.rand(7, 3, 1, 4)
    in_batches = extract_features(images, extractor=extractor, batch_size=3)
    assert extractor.passes == 3
    from_iterable = extract_features(iter([images[:5], images[5:]]), extractor=extractor)
    for result in (in_batches, from_iterable):
        assert torch.equal(result.features, images[:, 0, 0])
        assert result.logits is not None
        assert torch.equal(result.logits, images[:, 1, 0])


class ModeRecorder(PixelExtractor):
    def features_and_logits(self, images: torch.Tensor) -> ImageFeatures:
        assert not torch.is_grad_enabled()
        self.seen_mode = self.training
        return super().features_and_logits(images)


def test_extraction_runs_in_eval_mode_without_gradients_and_restores_the_mode() -> None:
    extractor = ModeRecorder(feature_dim=2).train()
    extract_features(as_images(torch.rand(2, 2)), extractor=extractor)
    assert extractor.seen_mode is False
    assert extractor.training


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^images: expected at least one batch, got none$"):
        extract_features([], extractor=PixelExtractor(feature_dim=2))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3), r"x: expected shape \(n, D\), got \(3,\)"),
        (torch.zeros(1, 3), "x: expected at least 2 samples, got 1"),
        (
            torch.tensor([[0.0], [float("nan")], [float("inf")]]),
            "x: .* got NaN or infinity in 2 of 3 samples",
        ),
    ],
)
def test_bad_samples_are_refused(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_samples(rows, name="x")
