"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

A set's manifold is the union of balls around its samples, each reaching to its sample's k-th nearest
neighbour in the set. Precision is the fraction of generated samples inside the real manifold; recall is the
reverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softgen.metrics.feature_metric import TwoSidedMetric, gathered
from softgen.metrics.features import FeatureExtractor, check_samples

_BLOCK = 1024
# Squared distances below this fraction of the largest squared norm are rounding: features are float32.
_RELATIVE_SLACK = 1e-12


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision (are generated images realistic?) and recall (are real images covered?), both in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real_features: Tensor, fake_features: Tensor, *, k: int = 5) -> PrecisionRecall:
    """Precision and recall by k nearest neighbours (arXiv 1904.06991, equations 1 to 3).

    Distances are computed in float64 and in blocks of 1024 rows, so memory grows with n and not with n^2:
    10,000 samples a side take about 350 MB. Values depend on the number of samples: compare at equal n only.

    Args:
        real_features: (n, D).
        fake_features: (m, D).
        k: Neighbours; a sample is not its own neighbour.

    Raises:
        ValueError: k is below 1, a side has k samples or fewer, the sides have different numbers of features,
            or a value is not finite.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    real = check_samples(real_features, name="real images", minimum=k + 1)
    fake = check_samples(fake_features, name="generated images", minimum=k + 1)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"generated images: expected {real.shape[1]} features, got {fake.shape[1]}")
    centre = real.mean(dim=0)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(
        precision=_fraction_inside(fake, manifold=real, k=k),
        recall=_fraction_inside(real, manifold=fake, k=k),
    )


def _fraction_inside(points: Tensor, *, manifold: Tensor, k: int) -> float:
    """Fraction of the points that lie in a ball of the manifold's samples, its border included."""
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in _squared_distances(manifold, manifold)])
    slack = _RELATIVE_SLACK * max(_largest_square(points), _largest_square(manifold))
    inside = [(block <= radii + slack).any(dim=1) for block in _squared_distances(points, manifold)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Squared distances of up to 1024 rows at a time to all the columns."""
    column_squares = columns.square().sum(dim=1)
    for block in torch.split(rows, _BLOCK):
        yield block.square().sum(dim=1, keepdim=True) + column_squares - 2 * block @ columns.T


def _largest_square(rows: Tensor) -> float:
    return float(rows.square().sum(dim=1).max())


class PrecisionRecallMetric(TwoSidedMetric):
    """Precision and recall of generated images against real ones, see `precision_recall`.

    Features are kept in float32 (4 n D bytes a side, see `TwoSidedMetric`), the rest is float64 on the CPU.

    Args:
        extractor: The network whose features are compared.
        reference_features: Features of the real images, (n, D), or None to collect real images.
        k: Neighbours.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: k is below 1 or the reference has another number of features than the extractor; in
            `compute`, too few images on a side or features that are not finite.
    """

    short_name = "pr"
    higher_is_better = True

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        reference_features: Tensor | None = None,
        k: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(extractor, collect_real=reference_features is None, **kwargs)
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if reference_features is not None and reference_features.shape[1:] != (extractor.feature_dim,):
            raise ValueError(
                f"reference_features: expected shape (n, {extractor.feature_dim}), "
                f"got {tuple(reference_features.shape)}"
            )
        self.reference_features = reference_features
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float32 scalars."""
        real = gathered(self.real_features) if self.reference_features is None else self.reference_features
        result = precision_recall(real, gathered(self.fake_features), k=self.k)
        return {"precision": torch.tensor(result.precision), "recall": torch.tensor(result.recall)}
