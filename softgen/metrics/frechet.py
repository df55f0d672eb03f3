"""Frechet distance between the Gaussians of two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softgen.files import save_tensors
from softgen.metrics.feature_metric import TwoSidedMetric, gathered
from softgen.metrics.features import FeatureExtractor, check_samples

UNREADABLE_NPZ = (OSError, ValueError, EOFError, BadZipFile, zlib.error)
"""What numpy raises of a damaged .npz."""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The Gaussian of a set of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, divided by n - 1.
        n: Number of samples that it comes from; 0 where a file of another project does not say.
    """

    mean: Tensor
    covariance: Tensor
    n: int

    @classmethod
    def from_features(cls, features: Tensor) -> "FeatureStatistics":
        """Mean and covariance of features (n, D), in float64 on the CPU.

        Raises:
            ValueError: Fewer than 2 samples, another shape, or NaN or infinite values.
        """
        rows = check_samples(features, name="features")
        mean = rows.mean(dim=0)
        centred = rows - mean
        return cls(mean=mean, covariance=centred.T @ centred / (len(rows) - 1), n=len(rows))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, by renaming a finished one.

        Raises:
            ValueError: The path ends in .npz, which is another format.
        """
        if Path(path).suffix == ".npz":
            raise ValueError(f"path: expected another suffix than .npz for a safetensors file, got '{path}'")
        tensors = {"mean": self.mean, "covariance": self.covariance, "n": torch.tensor(self.n)}
        save_tensors(Path(path), tensors)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read what `save` wrote, or an .npz with `mu` and `sigma`, as other projects publish them.

        Raises:
            ValueError: The file is missing or is not one of these, or its numbers are not those of a Gaussian.
        """
        try:
            if Path(path).suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    statistics = cls(
                        mean=torch.from_numpy(arrays["mu"]).double(),
                        covariance=torch.from_numpy(arrays["sigma"]).double(),
                        n=0,
                    )
            else:
                tensors = load_file(path)
                statistics = cls(mean=tensors["mean"], covariance=tensors["covariance"], n=int(tensors["n"]))
        except (*UNREADABLE_NPZ, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"statistics: expected a file of feature statistics, got '{path}' ({error})") from error
        statistics._check(path)
        return statistics

    def fingerprint(self) -> str:
        """A short hash of mean and covariance, by which to tell whether two distances had the same reference."""
        digest = hashlib.blake2b(digest_size=8)
        for values in (self.mean, self.covariance):
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _check(self, path: str | Path) -> None:
        dim = self.mean.numel()
        if self.mean.shape != (dim,) or self.covariance.shape != (dim, dim):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"statistics: expected a mean (D,) and a covariance (D, D) in '{path}', got {shapes}")
        if not bool(self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError(f"statistics: expected finite numbers in '{path}', got NaN or infinity")


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), at least 0 (arXiv 1706.08500, equation 6).

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2). That matrix
    is symmetric, so that singular covariances (fewer samples than features) need no special care.

    Raises:
        ValueError: The two have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics: expected {len(a.mean)} features on both sides, got {len(b.mean)}")
    eigenvalues, vectors = torch.linalg.eigh(a.covariance)
    root_a = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ b.covariance @ root_a
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root
    return max(0.0, float(distance))


class FrechetDistance(TwoSidedMetric):
    """Frechet distance between generated images and real ones; 0 is best.

    Real images come through `update(images, real=True)`, or once and for all as `reference`. Features are
    kept in float32 (4 n D bytes a side, see `TwoSidedMetric`); the distance is computed in float64 on the
    CPU.

    Args:
        extractor: The network whose features are compared.
        reference: Statistics of the real images, or None to collect real images.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: The reference has another number of features than the extractor; in `compute`, fewer
            than 2 images on a side or features that are not finite.
    """

    short_name = "fd"
    higher_is_better = False

    def __init__(
        self, extractor: FeatureExtractor, *, reference: FeatureStatistics | None = None, **kwargs: Any
    ) -> None:
        super().__init__(extractor, collect_real=reference is None, **kwargs)
        if reference is not None and len(reference.mean) != extractor.feature_dim:
            raise ValueError(
                f"reference: expected statistics of {extractor.feature_dim} features, got {len(reference.mean)}"
            )
        self.reference = reference

    def compute(self) -> Tensor:
        """The distance, a float32 scalar."""
        reference = self.reference
        if reference is None:
            reference = FeatureStatistics.from_features(check_samples(gathered(self.real_features), name="real images"))
        fake = check_samples(gathered(self.fake_features), name="generated images")
        return torch.tensor(frechet_distance(FeatureStatistics.from_features(fake), reference))
