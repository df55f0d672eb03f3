"""The network of the published FIDs: Inception of 2015-12-05, as TensorFlow ran it (arXiv 1512.00567, 1706.08500).

The layers and their names are torchvision's, whose network differs in three things: average pooling that counts the
border's zeros, average pooling in the last block, and the classes.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import Inception3, InceptionE

from softgen.checkpoints import read_checkpoint
from softgen.images import to_uint8
from softgen.metrics.features import FeatureExtractor, ImageFeatures
from softgen.pretrained import check_keys, fingerprint

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
NUM_CLASSES = 1008
"""Outputs of that network; they are not ImageNet's classes in their usual order."""
INPUT_SIZE = 299
_COUNTER = "num_batches_tracked"
_KEY = "inception_weights"


class InceptionFeatures(FeatureExtractor):
    """What ADM's evaluator, and most papers since, compare images by.

    Images are rounded to 8 bits, as an image file holds them, and stretched to 299 x 299 as TensorFlow 1 does it:
    bilinear, from the upper left corner, without antialiasing. Features are the 2,048 of the last pooling, logits those
    of the 1,008 outputs without their bias, which the inception score is computed on.

    Args:
        weights: File of the weights in PyTorch's format, as pytorch-fid and torch-fidelity have it; by default it is
            downloaded once, to torch's cache.

    Attributes:
        fingerprint: Short hash of the weights.

    Raises:
        ValueError: The file is missing, is no file of tensors or holds others, or cannot be downloaded.
    """

    name = "adm"
    feature_dim = 2048
    num_classes = NUM_CLASSES

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        network = Inception3(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
        network.Mixed_7c = _MaxPooled(2048)
        for name, block in network.named_children():
            if name.startswith("Mixed") and hasattr(block, "branch_pool") and not isinstance(block, _MaxPooled):
                block.branch_pool.register_forward_pre_hook(_without_border)
        _load(network, weights)
        self.classifier = network.fc
        self.classifier.bias = None
        network.fc = nn.Identity()
        self.network = network
        self.fingerprint = fingerprint(self)
        self.eval().requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "InceptionFeatures":  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Stays in eval mode: its batch norms must not follow the images."""
        del mode
        return super().train(mode=False)

    def features_and_logits(self, images: Tensor) -> ImageFeatures:
        """Features (B, 2048) and logits (B, 1008), float32.

        Args:
            images: (B, 3, H, W) in [0, 1], of any size.

        Raises:
            ValueError: The images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected (B, 3, H, W), got {tuple(images.shape)}")
        levels = to_uint8(images).float()
        for dim in (2, 3):
            levels = _stretched(levels, size=INPUT_SIZE, dim=dim)
        features = self.network((levels - 128) / 128)
        return ImageFeatures(features=features, logits=self.classifier(features))


class _MaxPooled(InceptionE):  # type: ignore[misc] # it has no types
    """The last block, whose pooling takes the largest instead of the mean."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *others, _ = super()._forward(x)  # the mean's branch is thrown away: 25 M of the network's 5.7 G products
        return [*others, self.branch_pool(F.max_pool2d(x, kernel_size=3, stride=1, padding=1))]


def _without_border(block: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    """Undo that torchvision's 3 x 3 mean counts the zeros around the image, before a block sees it."""
    del block
    (means,) = given
    share_inside = F.avg_pool2d(torch.ones_like(means[:1, :1]), kernel_size=3, stride=1, padding=1)
    return (means / share_inside,)


def _stretched(images: Tensor, *, size: int, dim: int) -> Tensor:
    """Linear interpolation along `dim` to `size` pixels, the first of which is the first of the image."""
    length = images.shape[dim]
    place = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
    low = place.long()
    share = (place - low).view([size if axis == dim else 1 for axis in range(images.ndim)])
    high = (low + 1).clamp(max=length - 1)
    return torch.lerp(images.index_select(dim, low), images.index_select(dim, high), share)


def _load(network: nn.Module, weights: str | Path | None) -> None:
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"{_KEY}: expected a file, got {str(weights)!r}, which does not exist")
    state = _download() if weights is None else read_checkpoint(weights, key=_KEY)
    # Files differ in whether they count the batches of the batch norms, which nothing reads.
    expected = {name: value for name, value in network.state_dict().items() if not name.endswith(_COUNTER)}
    given = {name: value for name, value in state.items() if not name.endswith(_COUNTER)}
    check_keys(expected, given, key=_KEY)
    network.load_state_dict(given, strict=False)


def _download() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{_KEY}: expected a file, since {WEIGHTS_URL} could not be downloaded, got none ({error})"
        ) from error
