"""The interface of tokenizers whose latents are continuous.

Shape legend: B batch, L latent tokens, D latent dimension.
"""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softgen.pretrained import Pretrained

if TYPE_CHECKING:
    from softgen.models.conditions import Asked


class ContinuousTokenizer(Pretrained, ABC):
    """Maps images to real vectors and back. Images are float tensors (B, 3, H, W) in [0, 1].

    It stands beside `ImageTokenizer` and is none: that one's latents are rows of a codebook, so that
    `decode(t) == decode_embeddings(codebook[t])`, and masked models, samplers and losses are written for its codes.
    Here a latent is a mean of many codes, its nearest code is not what the decoder was trained on, and with several
    codebooks a number alone names no vector. Whatever asks for codes therefore refuses it when it is opened.

    Attributes:
        image_size: H = W in pixels.
        num_latents: L, vectors an image.
        latent_dim: D.
        latent_mean: What generators subtract from a latent.
        latent_std: What they divide it by.
    """

    image_size: int
    num_latents: int
    latent_dim: int
    latent_mean: float
    latent_std: float

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, L, D), float32, as the decoder takes them."""

    @abstractmethod
    def decode_raw(self, latents: Tensor) -> Tensor:
        """Images before they are clamped to [0, 1], from latents (B, L, D), differentiable."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from latents (B, L, D)."""
        return self.decode_raw(latents).clamp(0, 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents as generators model them, about mean 0 and deviation 1."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents * self.latent_std + self.latent_mean

    def set_statistics(self, *, mean: float, std: float) -> None:
        """What generators subtract from latents and divide them by; saved with the tokenizer.

        Raises:
            ValueError: If the mean is not finite, or the deviation not finite and above 0.
        """
        if not math.isfinite(mean):
            raise ValueError(f"tokenizer.latent_mean: expected a finite number, got {mean}")
        if not 0 < std < math.inf:
            raise ValueError(f"tokenizer.latent_std: expected a finite number above 0, got {std}")
        self.latent_mean, self.latent_std = mean, std
        self.config |= {"latent_mean": mean, "latent_std": std}

    def under(self, asked: "Asked") -> "ContinuousTokenizer":
        """Itself: no continuous tokenizer's decoder looks at labels or prompts."""
        return self

    def check_images(self, images: Tensor) -> None:
        """Refuse images of another shape.

        Raises:
            ValueError: Stating the expected and the given shape.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != torch.Size(expected):
            raise ValueError(f"images: expected shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")

    def check_latents(self, latents: Tensor) -> None:
        """Refuse latents of another shape.

        Raises:
            ValueError: Stating the expected and the given shape.
        """
        if latents.ndim != 3 or latents.shape[1:] != torch.Size((self.num_latents, self.latent_dim)):
            expected = f"(B, {self.num_latents}, {self.latent_dim})"
            raise ValueError(f"latents: expected shape {expected}, got {tuple(latents.shape)}")
