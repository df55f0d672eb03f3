"""Image features of a CLIP model, to compare sets of captioned images by."""

from torch import Tensor

from softgen.metrics.features import FeatureExtractor, ImageFeatures
from softgen.models.open_clip_models import OpenCLIP


class CLIPFeatures(FeatureExtractor):
    """The unit image features of a CLIP.

    Args:
        clip: The model; not the one that served as a reward, whose tricks it would not see.
        name: Part of each metric's name.
    """

    num_classes = None

    def __init__(self, clip: OpenCLIP, *, name: str = "clip") -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(requires_grad=False)
        self.name, self.feature_dim = name, clip.embed_dim

    def features_and_logits(self, images: Tensor) -> ImageFeatures:
        """Features alone."""
        return ImageFeatures(features=self.clip.encode_images(images), logits=None)
