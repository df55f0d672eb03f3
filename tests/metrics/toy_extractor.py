"""An extractor with known answers, for the tests of this folder."""

import torch
from torch import Tensor

from softgen.metrics import FeatureExtractor, ImageFeatures


class PixelExtractor(FeatureExtractor):
    """For images (B, 3, 1, D): the features are the pixels of channel 0, the logits those of channel 1."""

    def __init__(self, *, feature_dim: int, has_classifier: bool = True) -> None:
        super().__init__()
        self.name = "pixels"
        self.feature_dim = feature_dim
        self.num_classes = feature_dim if has_classifier else None
        self.passes = 0

    def features_and_logits(self, images: Tensor) -> ImageFeatures:
        self.passes += 1
        return ImageFeatures(images[:, 0, 0], None if self.num_classes is None else images[:, 1, 0])


def as_images(features: Tensor, logits: Tensor | None = None) -> Tensor:
    """Images (B, 3, 1, D) whose features and logits are these, each (B, D)."""
    other = torch.zeros_like(features) if logits is None else logits
    return torch.stack([features, other, other], dim=1).unsqueeze(2)
