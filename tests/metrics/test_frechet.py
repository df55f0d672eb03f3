from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import FeatureStatistics, FrechetDistance, frechet_distance


def random_statistics(seed: int, dim: int = 6) -> FeatureStatistics:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return FeatureStatistics(
        mean=torch.randn(dim, generator=generator, dtype=torch.float64), covariance=root @ root.T, n=100
    )


def test_commuting_gaussians_have_the_closed_form() -> None:
    a = FeatureStatistics(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), n=9)
    b = FeatureStatistics(torch.tensor([0.0, 4.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double(), n=9)
    # |(1, -2)|^2 + (2 - 1)^2 + (3 - 4)^2
    assert frechet_distance(a, b) == pytest.approx(7.0, abs=1e-12)


def test_two_by_two_gaussians_have_the_closed_form() -> None:
    mean = torch.zeros(2, dtype=torch.float64)
    s = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    t = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64)
    # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    trace_of_root = ((s @ t).trace() + 2 * (s.det() * t.det()).sqrt()).sqrt()
    expected = float(s.trace() + t.trace() - 2 * trace_of_root)
    assert frechet_distance(FeatureStatistics(mean, s, n=9), FeatureStatistics(mean, t, n=9)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_the_matrix_root_formula(seed: int) -> None:
    a, b = random_statistics(seed), random_statistics(seed + 100)
    root = sqrtm((a.covariance @ b.covariance).numpy())
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * float(np.trace(root).real), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_singular_covariances_and_equal_sets_are_fine() -> None:
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    statistics = FeatureStatistics.from_features(features)
    assert 0 <= frechet_distance(statistics, statistics) < 1e-5
    shifted = FeatureStatistics.from_features(features + 1)
    assert frechet_distance(statistics, shifted) == pytest.approx(32, rel=1e-6)
    collapsed = FeatureStatistics.from_features(torch.zeros(4, 32))
    assert frechet_distance(collapsed, collapsed) == 0


def test_statistics_are_those_of_numpy() -> None:
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) + 1000
    statistics = FeatureStatistics.from_features(features)
    assert statistics.n == 20
    assert statistics.covariance.dtype == torch.float64
    np.testing.assert_allclose(statistics.mean, features.double().mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy().T), rtol=1e-9)


def test_statistics_are_saved_and_loaded(tmp_path: Path) -> None:
    statistics = random_statistics(0)
    statistics.save(tmp_path / "sub" / "fd.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "sub" / "fd.safetensors")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.n == 100
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["fd.safetensors"]


def test_missing_and_foreign_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fd.safetensors"
    with pytest.raises(ValueError, match=f"^statistics: expected a file of feature statistics, got '{path}'"):
        FeatureStatistics.load(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=f"^statistics: expected a file of feature statistics, got '{path}'"):
        FeatureStatistics.load(path)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, mu=np.random.default_rng(0).normal(size=500), sigma=np.eye(500))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^statistics: expected a file of feature statistics, got '{path}' \("):
        FeatureStatistics.load(path)


def test_statistics_are_not_written_under_the_suffix_of_another_format(tmp_path: Path) -> None:
    statistics = FeatureStatistics.from_features(torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"^path: expected another suffix than \.npz for a safetensors file, got "):
        statistics.save(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


def test_other_numbers_of_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^statistics: expected 6 features on both sides, got 5$"):
        frechet_distance(random_statistics(0), random_statistics(0, dim=5))
    with pytest.raises(ValueError, match=r"^reference: expected statistics of 4 features, got 6$"):
        FrechetDistance(PixelExtractor(feature_dim=4), reference=random_statistics(0))


@pytest.fixture
def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(40, 4, generator=generator), torch.rand(30, 4, generator=generator) ** 2


def test_the_metric_is_the_function(two_sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = two_sets
    reference = FeatureStatistics.from_features(real)
    expected = frechet_distance(FeatureStatistics.from_features(fake), reference)
    collecting = FrechetDistance(PixelExtractor(feature_dim=4))
    for batch in torch.split(real, 16):
        collecting.update(as_images(batch), real=True)
    with_reference = FrechetDistance(PixelExtractor(feature_dim=4), reference=reference)
    for metric in (collecting, with_reference):
        for batch in torch.split(fake, 16):
            metric.update(as_images(batch), real=False)
        assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)
        assert metric.protocol_name(5000) == "fd_pixels_5k"
        assert all(rows.dtype == torch.float32 for rows in metric.fake_features)


def test_merged_states_are_one_metric(two_sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = two_sets
    whole, left, right = (FrechetDistance(PixelExtractor(feature_dim=4)) for _ in range(3))
    parts = ((whole, slice(None)), (left, slice(0, 13)), (right, slice(13, None)))
    for metric, part in parts:
        metric.update(as_images(real[part]), real=True)
        metric.update(as_images(fake[part]), real=False)
    left.merge_state(right)
    assert float(left.compute()) == pytest.approx(float(whole.compute()), rel=1e-6)


def test_reset_forgets(two_sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = FrechetDistance(PixelExtractor(feature_dim=4))
    metric.update(as_images(two_sets[0]), real=True)
    metric.reset()
    with pytest.raises(ValueError, match=r"^real images: expected at least 2 samples, got 0$"):
        metric.compute()


def test_too_few_or_broken_images_are_refused(two_sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = FrechetDistance(PixelExtractor(feature_dim=4), reference=FeatureStatistics.from_features(two_sets[0]))
    metric.update(as_images(torch.rand(1, 4)), real=False)
    with pytest.raises(ValueError, match=r"^generated images: expected at least 2 samples, got 1$"):
        metric.compute()
    metric.update(as_images(torch.full((1, 4), float("nan"))), real=False)
    with pytest.raises(ValueError, match=r"^generated images: expected finite values, got NaN or infinity in 1 of 2"):
        metric.compute()


def test_a_metric_with_reference_takes_no_real_images(two_sets: tuple[torch.Tensor, torch.Tensor]) -> None:
    metric = FrechetDistance(PixelExtractor(feature_dim=4), reference=FeatureStatistics.from_features(two_sets[0]))
    message = "^real: expected False, because the metric was made with a reference, got True$"
    with pytest.raises(ValueError, match=message):
        metric.update(as_images(two_sets[0]), real=True)


def test_the_extractor_stays_in_eval_mode() -> None:
    metric = FrechetDistance(PixelExtractor(feature_dim=4))
    torch.nn.ModuleList([metric]).train()
    assert metric.training
    assert not metric.extractor.training
