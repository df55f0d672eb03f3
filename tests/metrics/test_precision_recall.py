import pytest
import torch
from torch import Tensor
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import PrecisionRecallMetric, precision_recall


def brute_force_fraction(points: Tensor, manifold: Tensor, k: int) -> float:
    inside = 0
    for point in points.double():
        found = False
        for i, centre in enumerate(manifold.double()):
            others = sorted(float((centre - other).norm()) for j, other in enumerate(manifold.double()) if j != i)
            found = found or float((point - centre).norm()) <= others[k - 1]
        inside += found
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_agrees_with_brute_force(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(23, 4, generator=generator)
    fake = 0.7 * torch.randn(17, 4, generator=generator) + 0.8
    result = precision_recall(real, fake, k=k)
    assert result.precision == brute_force_fraction(fake, real, k)
    assert result.recall == brute_force_fraction(real, fake, k)
    assert 0 < result.precision < 1 or 0 < result.recall < 1


def test_more_rows_than_a_block_are_compared_with_all() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1100, 3, generator=generator).double()
    fake = torch.randn(1050, 3, generator=generator).double() + 0.5
    radii = [torch.cdist(rows, rows).kthvalue(6, dim=1).values for rows in (real, fake)]
    fake_inside = (torch.cdist(fake, real) <= radii[0]).any(dim=1)
    real_inside = (torch.cdist(real, fake) <= radii[1]).any(dim=1)
    result = precision_recall(real, fake)
    assert result.precision == float(fake_inside.double().mean())
    assert result.recall == float(real_inside.double().mean())


def test_a_line_has_the_known_answer() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    fake = torch.tensor([[1.5], [1.6], [9.0]])
    # Real balls reach 1 to each side: [-1, 4]. Fake balls: 1.5 +- 0.1, 1.6 +- 0.1, 9 +- 7.4 = [1.6, 16.4].
    result = precision_recall(real, fake, k=1)
    assert (result.precision, result.recall) == (pytest.approx(2 / 3), 0.5)


def test_equal_sets_are_perfect_and_far_sets_are_not() -> None:
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    same = precision_recall(features, features.flip(0))
    assert (same.precision, same.recall) == (1, 1)
    far = precision_recall(features, features + 100)
    assert (far.precision, far.recall) == (0, 0)


def test_collapse_has_precision_without_recall() -> None:
    real = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    result = precision_recall(real, real[3:4].repeat(50, 1))
    assert (result.precision, result.recall) == (1, 1 / 50)


def test_the_metric_is_the_function_and_merges() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(20, 4, generator=generator), torch.rand(18, 4, generator=generator) + 0.3
    expected = precision_recall(real, fake, k=2)
    left, right = (PrecisionRecallMetric(PixelExtractor(feature_dim=4), k=2) for _ in range(2))
    for metric, part in ((left, slice(0, 7)), (right, slice(7, None))):
        metric.update(as_images(real[part]), real=True)
        metric.update(as_images(fake[part]), real=False)
    left.merge_state(right)
    with_reference = PrecisionRecallMetric(PixelExtractor(feature_dim=4), reference_features=real, k=2)
    with_reference.update(as_images(fake), real=False)
    for metric in (left, with_reference):
        values = metric.compute()
        assert float(values["precision"]) == pytest.approx(expected.precision)
        assert float(values["recall"]) == pytest.approx(expected.recall)
    assert left.protocol_name(1797) == "pr_pixels_1797"


def test_errors() -> None:
    features = torch.rand(6, 2)
    with pytest.raises(ValueError, match=r"^k: expected at least 1, got 0$"):
        precision_recall(features, features, k=0)
    with pytest.raises(ValueError, match=r"^real images: expected at least 7 samples, got 6$"):
        precision_recall(features, features, k=6)
    with pytest.raises(ValueError, match=r"^generated images: expected at least 6 samples, got 5$"):
        precision_recall(features, features[:5])
    with pytest.raises(ValueError, match=r"^generated images: expected finite values, got NaN or infinity in 6 of 6"):
        precision_recall(features, features * float("nan"))
    with pytest.raises(ValueError, match=r"^generated images: expected 2 features, got 3$"):
        precision_recall(features, torch.rand(6, 3))
    with pytest.raises(ValueError, match=r"^reference_features: expected shape \(n, 4\), got \(6, 2\)$"):
        PrecisionRecallMetric(PixelExtractor(feature_dim=4), reference_features=features)
    with pytest.raises(ValueError, match=r"^k: expected at least 1, got 0$"):
        PrecisionRecallMetric(PixelExtractor(feature_dim=4), k=0)
