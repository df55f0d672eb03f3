"""Base of the metrics that collect an extractor's features: states, modes and names in one place."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from softgen.metrics.features import FeatureExtractor, metric_name


class ExtractorMetric(Metric):
    """A metric computed by a frozen extractor.

    A subclass names its metric in `short_name`. The extractor is frozen and stays in eval mode, also when the module
    that owns the metric is put into training mode, and no gradient flows.

    Args:
        extractor: The network that looks at the images.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    short_name: str
    is_differentiable = False
    full_state_update = False

    def __init__(self, extractor: FeatureExtractor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._without_rows: dict[str, Tensor] = {}
        self.extractor = extractor
        self.extractor.eval().requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "ExtractorMetric":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """As `nn.Module.train`, but the extractor stays in eval mode."""
        super().train(mode)
        self.extractor.eval()
        return self

    def add_rows(self, name: str, *, like: Tensor) -> None:
        """A list state whose tensors are gathered row by row from every process.

        Args:
            name: Of the attribute.
            like: A tensor without rows, of their shape and type: what a process contributes that saw no image.
        """
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._without_rows[name] = like

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As `Metric.sync`; processes without an image meet the others with tensors of the same rank and type."""
        for name, like in self._without_rows.items():
            state = getattr(self, name)
            if isinstance(state, list) and not state:
                state.append(like.to(self.device))
        super().sync(*args, **kwargs)

    def protocol_name(self, n: int) -> str:
        """The name under which a value over n generated images is reported, such as "fd_digitsnet_5k"."""
        return metric_name(self.short_name, self.extractor, n)


class TwoSidedMetric(ExtractorMetric):
    """A metric that compares generated images with real ones.

    Both sides are kept as float32 features in list states: 4 n D bytes each, 2.6 MB for 10,000 images of 64
    features and 82 MB for 2048 features; gathered across processes, every process holds them all.

    Args:
        extractor: The network whose features are compared.
        collect_real: Whether `update` may be given real images.
        kwargs: Passed to `torchmetrics.Metric`.
    """

    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, extractor: FeatureExtractor, *, collect_real: bool, **kwargs: Any) -> None:
        super().__init__(extractor, **kwargs)
        self._collect_real = collect_real
        none = torch.zeros(0, extractor.feature_dim)
        if collect_real:
            self.add_rows("real_features", like=none)
        self.add_rows("fake_features", like=none)

    def update(self, images: Tensor, *, real: bool) -> None:
        """Add images (B, 3, H, W) in [0, 1] to the real or to the generated side.

        Raises:
            ValueError: Real images, where the metric was made with a reference.
        """
        if real and not self._collect_real:
            raise ValueError("real: expected False, because the metric was made with a reference, got True")
        with torch.no_grad():
            features = self.extractor.features(images).float()
        (self.real_features if real else self.fake_features).append(features)


def gathered(state: list[Tensor] | Tensor) -> Tensor:
    """A list state as one tensor (n, D): torchmetrics turns it into one when it syncs. Empty gives (0, 1)."""
    if isinstance(state, list) and not state:
        return torch.zeros(0, 1)
    return dim_zero_cat(state)
