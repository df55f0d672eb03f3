"""The interface of image tokenizers.

Shape legend: B batch, N sites, K codes, D code dimension.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softgen.categorical import check_token_range
from softgen.pretrained import Pretrained
from softgen.relaxation import Distance, expected_embedding

if TYPE_CHECKING:
    from softgen.models.conditions import Asked


class ImageTokenizer(Pretrained, ABC):
    """Maps images to codes and back. Images are float tensors (B, 3, H, W) in [0, 1].

    Attributes:
        image_size: H = W in pixels.
        num_sites: N, codes an image.
        num_codes: K, rows of the codebook.
        code_dim: D.
        distance: By which latents are assigned to codes.
    """

    image_size: int
    num_sites: int
    num_codes: int
    code_dim: int
    distance: Distance

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """Code vectors, one a row: (K, D)."""

    def codebook_weight(self) -> Tensor:
        """The parameter or buffer that holds the codebook; another one where `codebook` is computed from it."""
        return self.codebook

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Encoder outputs before quantisation, (B, N, D)."""

    @abstractmethod
    def quantize(self, latents: Tensor) -> Tensor:
        """The nearest codes, (B, N) int64, of latents (B, N, D)."""

    @abstractmethod
    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """Images from code vectors (B, N, D), differentiable.

        Decoding tokens t is the same as decoding the rows `codebook[t]`.
        """

    def encode(self, images: Tensor) -> Tensor:
        """The codes of images (B, 3, H, W) in [0, 1]: (B, N) int64."""
        return self.quantize(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] from codes (B, N).

        Raises:
            ValueError: On the CPU, if a token is no code, such as a mask.
        """
        check_token_range(tokens, self.num_codes - 1)
        return self.decode_embeddings(self.codebook[tokens])

    def embed_soft(self, probs: Tensor) -> Tensor:
        """Expected code vectors (B, N, D) under probs (B, N, K); exact rows of the codebook for one-hot probs."""
        return expected_embedding(probs, self.codebook)

    def under(self, asked: "Asked") -> "ImageTokenizer":
        """The tokenizer as it decodes for these labels (B,) or B prompts.

        Itself, unless its decoder looks at the text (TA-TiTok); whoever decodes for somebody asks for this first.
        """
        return self

    def check_images(self, images: Tensor) -> None:
        """Refuse images of another shape.

        Raises:
            ValueError: Stating the expected and the given shape.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != torch.Size(expected):
            raise ValueError(f"images: expected shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
