"""Networks that are looked through and never trained: feature maps for perceptual, adversarial and alignment losses.

Shape legend: B batch, C channels, h and w of a map, P patches.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.metrics.classifier import SmallClassifier
from softgen.pretrained import Pretrained, read_config
from softgen.tokenizers.alignment import imagenet_range


class FrozenFeatures(nn.Module, ABC):
    """Feature maps of images (B, 3, H, W) in [0, 1], differentiable in the images."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, C, h, w), from the first layer to the last."""

    @torch.no_grad()
    def shapes(self, image_size: int) -> list[torch.Size]:
        """Shapes (C, h, w) of the maps of images of that size, by one pass of a black image."""
        device = next((parameter.device for parameter in self.parameters()), None)
        return [found.shape[1:] for found in self(torch.zeros(1, 3, image_size, image_size, device=device))]


class ClassifierFeatures(FrozenFeatures):
    """A classifier of ours: what its convolutions see, after each ReLU.

    Args:
        classifier: The classifier.
    """

    def __init__(self, classifier: SmallClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        maps, x = [], 2 * images - 1
        for layer in self.classifier.body:
            if isinstance(layer, nn.Flatten):
                break
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        return tuple(maps)


class TransformersFeatures(FrozenFeatures):
    """A ViT of transformers, such as DINOv2: the patches after its blocks, the last ones after its norm.

    Args:
        folder: Written by `save_pretrained`; nothing is downloaded.
        layers: How many of the blocks are given, spread evenly up to the last.
        key: The config key that named the folder, for error messages.

    Images take ImageNet's range and are resized to the size that the model was trained at.
    """

    def __init__(self, folder: str, *, layers: int = 4, key: str = "features") -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = _opened(lambda: AutoModel.from_pretrained(folder, local_files_only=True), folder, key=key)
        config: Any = self.model.config
        for name in ("image_size", "patch_size", "num_hidden_layers"):
            if not isinstance(getattr(config, name, None), int):
                raise ValueError(f"{key}: expected a vision transformer, got a {config.model_type} without {name}")
        self.image_size, self.grid = config.image_size, config.image_size // config.patch_size
        self.blocks = _evenly(config.num_hidden_layers, layers)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        pixels = imagenet_range(resized(images, self.image_size))
        output = self.model(pixel_values=pixels, output_hidden_states=True)
        # hidden_states begins with the embeddings.
        states = [output.hidden_states[block + 1] for block in self.blocks[:-1]] + [output.last_hidden_state]
        return tuple(_as_map(state[:, -(self.grid**2) :], self.grid) for state in states)


class TimmFeatures(FrozenFeatures):
    """A vision transformer of timm: the patches after its blocks, after its norm.

    Args:
        folder: With `config.json` (timm's `architecture`) and the weights; nothing is downloaded.
        layers: As `TransformersFeatures`.
        key: As `TransformersFeatures`.

    Images are normalised and resized as the model's settings say.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str, *, layers: int = 4, key: str = "features") -> None:
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise ValueError(f"{key}: expected timm to be installed for {folder}: pip install timm") from error
        self.model = _opened(
            lambda: timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0), folder, key=key
        )
        if not hasattr(self.model, "blocks") or not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{key}: expected a vision transformer, got a {type(self.model).__name__}")
        settings: Any = self.model.pretrained_cfg
        self.image_size = int(settings["input_size"][-1])
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"]).view(3, 1, 1), persistent=False)
        self.blocks = _evenly(len(self.model.blocks), layers)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        pixels = (resized(images, self.image_size) - self.mean) / self.std
        maps: Sequence[Tensor] = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=self.blocks, norm=True, intermediates_only=True, output_fmt="NCHW"
        )
        return tuple(maps)


def open_features(source: str | FrozenFeatures, *, key: str) -> FrozenFeatures:
    """Open a folder with a classifier of ours, a ViT of transformers or one of timm; by its config.json.

    Raises:
        ValueError: If it is none of them, or cannot be opened.
    """
    if isinstance(source, FrozenFeatures):
        return source
    path = Path(source) / "config.json"
    if not path.is_file():
        raise ValueError(f"{key}: expected a folder with config.json, got {source!r}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{key}: expected valid JSON in {path}, got {error}") from error
    if "class_path" in config:
        read_config(Path(source), key=key)
        opened = Pretrained.from_pretrained(source, key=key)
        if not isinstance(opened, SmallClassifier):
            raise ValueError(f"{key}: expected a SmallClassifier in {source}, got a {type(opened).__name__}")
        return ClassifierFeatures(opened)
    if "model_type" in config:
        return TransformersFeatures(source, key=key)
    if "architecture" in config:
        return TimmFeatures(source, key=key)
    raise ValueError(f"{key}: expected a classifier of ours, or a ViT of transformers or timm, got {path} of neither")


def patches(maps: Sequence[Tensor]) -> Tensor:
    """The last map as patches (B, P, C), row by row."""
    return maps[-1].flatten(2).transpose(1, 2)


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, side, side), by bicubic interpolation; as they are where the side fits."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def _as_map(states: Tensor, grid: int) -> Tensor:
    return states.transpose(1, 2).unflatten(2, (grid, grid))  # type: ignore[no-untyped-call, no-any-return]


def _evenly(blocks: int, layers: int) -> list[int]:
    count = min(blocks, layers)
    return [round((index + 1) * blocks / count) - 1 for index in range(count)]


def _opened(load: Any, folder: str, *, key: str) -> nn.Module:
    try:
        model: nn.Module = load()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{key}: expected a model that can be opened in {folder}, got: {reason}") from error
    return model
