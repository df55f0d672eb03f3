"""Perceptual losses: how far two images are for a frozen network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softgen.relaxation import widen
from softgen.training.frozen_features import FrozenFeatures, open_features

LPIPSNet = Literal["alex", "vgg", "squeeze"]


@dataclass(frozen=True)
class Perceptual:
    """A perceptual loss and the network that it looks through.

    Attributes:
        network: Folder of a classifier of ours or of a ViT (see `open_features`), whose features are compared; or a
            file of torchvision's VGG16, AlexNet or SqueezeNet 1.1 on ImageNet, for LPIPS (arXiv 1801.03924).
        weight: At least 0; 1 in SoftVQ-VAE.
        warmup_steps: Steps of a linear rise of the weight from 0.
    """

    network: str | FrozenFeatures
    weight: float = 1.0
    warmup_steps: int = 0

    def check(self, *, key: str) -> None:
        """Refuse impossible settings.

        Raises:
            ValueError: Naming the key, what was expected and what was got.
        """
        if not self.weight >= 0:
            raise ValueError(f"{key}.weight: expected a number of at least 0, got {self.weight}")
        if self.warmup_steps < 0:
            raise ValueError(f"{key}.warmup_steps: expected at least 0, got {self.warmup_steps}")

    def at(self, step: int) -> float:
        """The weight at a step."""
        return self.weight * min(1.0, (step + 1) / (self.warmup_steps + 1))


class FeatureDistance(nn.Module):
    """LPIPS without its learned weights, on any network: unit vectors of features, squared difference.

    Args:
        features: The network.
    """

    def __init__(self, features: FrozenFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor, real: Tensor, expected: Sequence[Tensor] | None = None) -> Tensor:
        """Mean over images, positions and layers of |f(images) - f(real)|^2, in [0, 4]; scalar.

        Args:
            images: (B, 3, H, W), about [0, 1]; gets the gradient.
            real: As `images`.
            expected: The maps of `real`, where they are known already.
        """
        if expected is None:
            with torch.no_grad():
                expected = self.features(real)
        return map_distance(self.features(images), expected)


def map_distance(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """The mean over layers of the squared distance of unit feature vectors, from maps (B, C, h, w)."""
    layers = [
        (_unit(got) - _unit(wanted)).square().sum(dim=1).mean() for got, wanted in zip(maps, expected, strict=True)
    ]
    return torch.stack(layers).mean()


def _unit(x: Tensor) -> Tensor:
    wide = widen(x)
    # Not F.normalize: where all of a ReLU's channels are 0, its gradient is large.
    return wide / (wide.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


class LPIPSDistance(nn.Module):
    """LPIPS with torchmetrics' learned weights on a network of torchvision, from a file.

    Args:
        path: A state dict (.pth, .pt or .safetensors) of torchvision's vgg16, alexnet or squeezenet1_1.
        key: The config key that named it, for error messages.

    Raises:
        ValueError: If the file is missing or of another network.
    """

    def __init__(self, path: str, *, key: str = "perceptual.network") -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        state = _read_state(Path(path), key=key)
        self.net: LPIPSNet = _which(state, path=path, key=key)
        self.lpips = _LPIPS(pretrained=True, net=self.net, pnet_rand=True)
        backbone = {name.partition("features.")[2]: value for name, value in state.items() if "features." in name}
        for name, target in self.lpips.net.state_dict().items():
            # slice2.5.weight is features.5.weight; slices.1.3.squeeze.weight is features.3.squeeze.weight.
            own = name.split(".", 2)[2] if name.startswith("slices.") else name.split(".", 1)[1]
            if own not in backbone or backbone[own].shape != target.shape:
                raise ValueError(f"{key}: expected torchvision's {self.net} in {path}, got no fitting features.{own}")
            target.copy_(backbone[own])

    def forward(self, images: Tensor, real: Tensor) -> Tensor:
        """Mean LPIPS; scalar; arguments as `FeatureDistance`."""
        values: Tensor = self.lpips(images, real, normalize=True)
        return values.mean()


def open_perceptual(network: str | FrozenFeatures, *, key: str) -> nn.Module:
    """`LPIPSDistance` of a file, `FeatureDistance` of a folder or network.

    Raises:
        ValueError: If it cannot be opened.
    """
    if isinstance(network, str) and Path(network).suffix in (".pth", ".pt", ".safetensors"):
        return LPIPSDistance(network, key=key)
    return FeatureDistance(open_features(network, key=key))


def _read_state(path: Path, *, key: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{key}: expected a file of weights, got {str(path)!r}, which is none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{key}: expected a readable file of weights, got {path} ({type(error).__name__})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{key}: expected a state dict in {path}, got a {type(state).__name__}")
    return state


def _which(state: Mapping[str, Tensor], *, path: str, key: str) -> LPIPSNet:
    if "features.3.squeeze.weight" in state:
        return "squeeze"
    if "features.28.weight" in state:
        return "vgg"
    if "features.10.weight" in state and state["features.10.weight"].shape[:2] == (256, 256):
        return "alex"
    raise ValueError(f"{key}: expected torchvision's vgg16, alexnet or squeezenet1_1 in {path}, got another network")
