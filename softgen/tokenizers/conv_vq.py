"""The native image tokenizer: a small convolutional VQ autoencoder with l2-normalised codes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.relaxation import expected_embedding, widen
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.codebook import EMACodebook
from softgen.tokenizers.parts import as_weights


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with a shortcut.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return x + h


class PatchBlock(nn.Module):
    """Layer norm over channels, 1x1 convolution, SiLU, 1x1 convolution, with a shortcut: no site sees another.

    Args:
        channels: Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        normed = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        h: Tensor = self.conv2(F.silu(self.conv1(normed)))
        return x + h


class ConvVQTokenizer(ImageTokenizer):
    """Convolutional encoder and decoder around a codebook of unit vectors.

    Args:
        image_size: Pixels a side; divisible by patch_size 2^(levels - 1).
        num_codes: K, size of the codebook.
        code_dim: D, dimension of a code; small values (8 to 16) keep the codebook in use.
        channels: Channels of each level, from the first down; each further level halves the side.
        res_blocks: Residual blocks a level.
        patch_size: Pixels a side of the patches that the first level works on, 1 for single pixels; above 1 the costly
            levels at full resolution are left out.
        patchwise: Encode every patch by itself, so that a token says nothing of its neighbours; the decoder sees all.
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_codes: int,
        code_dim: int = 16,
        channels: Sequence[int] = (32, 64, 64),
        res_blocks: int = 1,
        patch_size: int = 1,
        patchwise: bool = False,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"tokenizer.patch_size: expected at least 1, got {patch_size}")
        if not channels:
            raise ValueError("tokenizer.channels: expected at least one level, got none")
        factor = patch_size * 2 ** (len(channels) - 1)
        if image_size < 1 or image_size % factor:
            raise ValueError(f"tokenizer.image_size: expected a multiple of {factor}, got {image_size}")
        if num_codes < 2 or code_dim < 1:
            raise ValueError(
                f"tokenizer.num_codes and code_dim: expected at least 2 and 1, got {num_codes} and {code_dim}"
            )
        self.config = {
            "image_size": image_size,
            "num_codes": num_codes,
            "code_dim": code_dim,
            "channels": list(channels),
            "res_blocks": res_blocks,
            "patch_size": patch_size,
            "patchwise": patchwise,
        }
        self.image_size, self.num_codes, self.code_dim = image_size, num_codes, code_dim
        self.grid = image_size // factor
        self.num_sites = self.grid**2
        self.distance = "l2"
        self.encoder = (
            _patch_encoder(channels[-1], code_dim=code_dim, blocks=res_blocks * len(channels), patch_size=factor)
            if patchwise
            else _encoder(channels, code_dim=code_dim, res_blocks=res_blocks, patch_size=patch_size)
        )
        self.quantizer = EMACodebook(num_codes=num_codes, code_dim=code_dim)
        self.decoder = _decoder(channels, code_dim=code_dim, res_blocks=res_blocks, patch_size=patch_size)

    @property
    def codebook(self) -> Tensor:
        """Unit code vectors (K, D)."""
        return self.quantizer.codes

    @torch.no_grad()
    def on_weights_averaged(self) -> None:
        """Codes are unit vectors again."""
        self.quantizer.codes.copy_(F.normalize(self.quantizer.codes, dim=-1))

    def latents(self, images: Tensor) -> Tensor:
        """Unit latents (B, N, D), row-major over the grid."""
        self.check_images(images)
        # Convolutions are faster with the channels last.
        pixels = as_weights(2 * images - 1, self.encoder).contiguous(memory_format=torch.channels_last)
        encoded = self.encoder(pixels).flatten(2).transpose(1, 2)
        return F.normalize(widen(encoded), dim=-1)

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class."""
        return self.quantizer.nearest(latents)

    def embed_soft(self, probs: Tensor) -> Tensor:
        """Averaged, then normalised, as the decoder knows unit vectors only."""
        return F.normalize(expected_embedding(probs, self.codebook), dim=-1)

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Decoder output before clamping to [0, 1], for training."""
        batch, _, dim = embeddings.shape
        grid = embeddings.reshape(batch, self.grid, self.grid, dim).permute(0, 3, 1, 2)
        decoded: Tensor = self.decoder(as_weights(grid, self.decoder).contiguous(memory_format=torch.channels_last))
        return decoded

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        return self.decode_raw(embeddings).clamp(0, 1)


def _encoder(channels: Sequence[int], *, code_dim: int, res_blocks: int, patch_size: int) -> nn.Sequential:
    patches = [nn.PixelUnshuffle(patch_size)] if patch_size > 1 else []
    layers: list[nn.Module] = [*patches, nn.Conv2d(3 * patch_size**2, channels[0], 3, padding=1)]
    for level, width in enumerate(channels):
        if level > 0:
            layers.append(nn.Conv2d(channels[level - 1], width, 4, stride=2, padding=1))
        layers.extend(ResidualBlock(width) for _ in range(res_blocks))
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels[-1], code_dim, 1))


def _patch_encoder(width: int, *, code_dim: int, blocks: int, patch_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.PixelUnshuffle(patch_size),
        nn.Conv2d(3 * patch_size**2, width, 1),
        *(PatchBlock(width) for _ in range(blocks)),
        nn.SiLU(),
        nn.Conv2d(width, code_dim, 1),
    )


def _decoder(channels: Sequence[int], *, code_dim: int, res_blocks: int, patch_size: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(code_dim, channels[-1], 3, padding=1)]
    for level in reversed(range(len(channels))):
        layers.extend(ResidualBlock(channels[level]) for _ in range(res_blocks))
        if level > 0:
            layers.append(nn.ConvTranspose2d(channels[level], channels[level - 1], 4, stride=2, padding=1))
    patches = [nn.PixelShuffle(patch_size)] if patch_size > 1 else []
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(channels[0], 3 * patch_size**2, 3, padding=1), *patches)
