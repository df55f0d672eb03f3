"""Alignment of a tokenizer's latents with a frozen network's features, as a term of its training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from softgen.random import derive_seed
from softgen.tokenizers.alignment import Alignment, AlignmentHead, alignment_loss
from softgen.training.frozen_features import FrozenFeatures, open_features, patches


@dataclass(frozen=True)
class Align:
    """SoftVQ-VAE's alignment (arXiv 2412.10958, eq. 6).

    Attributes:
        features: Folder of a classifier of ours or of a ViT, see `open_features`, or the network.
        weight: At least 0.
        how: `repeat` (the number of latents divides that of the patches), `avg_1d`, `avg_1d_shuffle` or `global`; see
            `alignment_loss`.
        hidden: Width of the head between latents and features.
    """

    features: str | FrozenFeatures
    weight: float = 0.1
    how: Alignment = "repeat"
    hidden: int = 1024


class AlignmentTerm(nn.Module):
    """The head, and the loss through it.

    Args:
        config: Settings.
        image_size: Pixels a side.
        num_latents: L.
        latent_dim: D.
        key: The config key of the settings, for error messages.

    Attributes:
        head: From latents to features, trained.

    Raises:
        ValueError: If a setting is out of range, the network cannot be opened or its patches do not fit.
    """

    def __init__(self, config: Align, *, image_size: int, num_latents: int, latent_dim: int, key: str) -> None:
        super().__init__()
        if not config.weight >= 0:
            raise ValueError(f"{key}.weight: expected a number of at least 0, got {config.weight}")
        if config.hidden < 1:
            raise ValueError(f"{key}.hidden: expected at least 1, got {config.hidden}")
        if config.how not in get_args(Alignment):
            raise ValueError(f"{key}.how: expected one of {', '.join(get_args(Alignment))}, got {config.how!r}")
        self.config = config
        # In a tuple: the stage holds it frozen.
        self._features = (open_features(config.features, key=f"{key}.features").eval(),)
        channels, height, width = self.features.shapes(image_size)[-1]
        self.num_patches = height * width
        if config.how == "repeat" and self.num_patches % num_latents:
            raise ValueError(
                f"{key}.features: expected patches that are a multiple of the {num_latents} latents for repeat, got "
                f"{self.num_patches} (avg_1d takes any number)"
            )
        self.head = AlignmentHead(latent_dim=latent_dim, hidden=config.hidden, feature_dim=channels)

    @property
    def features(self) -> FrozenFeatures:
        """The frozen network."""
        return self._features[0]

    def parameters_trained(self) -> Iterable[nn.Parameter]:
        """Those of the head."""
        return self.head.parameters()

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, ...]:
        """The frozen network's maps of images (B, 3, H, W)."""
        maps: tuple[Tensor, ...] = self.features(images)
        return maps

    def forward(self, latents: Tensor, maps: Sequence[Tensor], *, seed: int, step: int) -> Tensor:
        """The weighted loss of latents (B, L, D) and the maps of their images; scalar.

        Args:
            latents: As the decoder takes them.
            maps: From `look`.
            seed: The run's; with the step, of the order of `avg_1d_shuffle`.
            step: Of the optimizer.
        """
        order = None
        if self.config.how == "avg_1d_shuffle":
            generator = torch.Generator().manual_seed(derive_seed(seed, "alignment", step))
            order = torch.randperm(self.num_patches, generator=generator).to(latents.device)
        features = patches(maps)
        return self.config.weight * alignment_loss(
            latents, features.to(latents.dtype), self.head, how=self.config.how, order=order
        )
