"""MaskGIT's VQGAN (arXiv 2202.04200) as TiTok's authors ported it: TiTok's teacher and pixel decoder.

Shape legend: B batch, N tokens, V codes, D code dimension, h and w of a grid.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.checkpoints import build, read_checkpoint
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.parts import (
    CodeTable,
    OutputShortcutBlock,
    as_weights,
    grid_factor,
    group_norm,
    nearest_code,
    without_clash,
)


def _blocks(before: int, after: int, *, count: int) -> nn.ModuleList:
    return nn.ModuleList(OutputShortcutBlock(after if index else before, after) for index in range(count))


class _Level(nn.Module):
    def __init__(self, before: int, after: int, *, count: int, upsample: bool = False) -> None:
        super().__init__()
        self.block = _blocks(before, after, count=count)
        if upsample:
            self.upsample_conv = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0))
        return x


class _Encoder(nn.Module):
    def __init__(self, *, widths: Sequence[int], hidden: int, blocks: int, channels: int, z_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            _Level(before, after, count=blocks) for before, after in zip([hidden, *widths], widths, strict=False)
        )
        self.mid = _blocks(widths[-1], widths[-1], count=blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for index, level in enumerate(self.down):
            x = level(x if index == 0 else F.avg_pool2d(x, 2))
        for block in self.mid:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class PixelDecoder(nn.Module):
    """The decoder; `up` is numbered by level, 0 the full resolution, and runs from the last level to the first.

    Args:
        channel_mult: Multiples of `hidden_channels`, one a level; each further level halves the side.
        hidden_channels: Channels at full resolution.
        num_res_blocks: Blocks a level.
        z_channels: Channels of its input.
        num_channels: Of the images.
    """

    def __init__(
        self,
        *,
        channel_mult: Sequence[int],
        hidden_channels: int,
        num_res_blocks: int,
        z_channels: int,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [hidden_channels * factor for factor in channel_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _blocks(widths[-1], widths[-1], count=num_res_blocks)
        self.up = nn.ModuleList(
            _Level(before, after, count=num_res_blocks, upsample=level > 0)
            for level, (before, after) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], num_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [0, 1], from code vectors (B, D, h, w)."""
        x = self.conv_in(z)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class MaskGITVQGAN(ImageTokenizer):
    """A convolutional tokenizer without attention. The defaults are those of the ImageNet model f16-256.

    Args:
        image_size: Pixels a side of the images that it is used on; any multiple of its factor.
        codebook_size: V.
        channel_mult: Multiples of `hidden_channels`, one a level; each further level halves the side.
        hidden_channels: Channels at full resolution.
        num_res_blocks: Blocks a level.
        z_channels: D.
        num_channels: Of the images.

    Raises:
        ValueError: If the image size does not fit the levels.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 1024,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        hidden_channels: int = 128,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        num_channels: int = 3,
    ) -> None:
        super().__init__()
        widths = [hidden_channels * factor for factor in channel_mult]
        grid_factor([hidden_channels], key="hidden_channels", image_size=image_size)
        counts = {"codebook_size": codebook_size, "num_res_blocks": num_res_blocks, "z_channels": z_channels}
        factor = grid_factor(widths, key="channel_mult", image_size=image_size, **counts)
        self.config = {
            "image_size": image_size,
            "codebook_size": codebook_size,
            "channel_mult": list(channel_mult),
            "hidden_channels": hidden_channels,
            "num_res_blocks": num_res_blocks,
            "z_channels": z_channels,
            "num_channels": num_channels,
        }
        self.image_size, self.num_codes, self.code_dim = image_size, codebook_size, z_channels
        self.grid = image_size // factor
        self.num_sites = self.grid**2
        self.distance = "l2"
        self.encoder = _Encoder(
            widths=widths,
            hidden=hidden_channels,
            blocks=num_res_blocks,
            channels=num_channels,
            z_channels=z_channels,
        )
        self.decoder = PixelDecoder(
            channel_mult=channel_mult,
            hidden_channels=hidden_channels,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            num_channels=num_channels,
        )
        self.quantizer = CodeTable(codebook_size, z_channels)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "tokenizer",
        image_size: int = 256,
        dtype: torch.dtype | None = None,
    ) -> "MaskGITVQGAN":
        """Open a published checkpoint.

        Args:
            source: `maskgit-vqgan-imagenet-f16-256.bin`, or a folder or hub id that holds it.
            key: The config key that named it, for error messages.
            image_size: Of the images that it is to be used on.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        names = ("maskgit-vqgan-imagenet-f16-256.bin", "model.safetensors", "pytorch_model.bin")
        state = without_clash(read_checkpoint(source, key=key, names=names))
        hidden = state["encoder.conv_in.weight"].shape[0] if "encoder.conv_in.weight" in state else None
        arguments = {**pixel_decoder_sizes(state, prefix="decoder.", hidden=hidden), "image_size": image_size}
        if "quantizer.embedding.weight" in state:
            arguments["codebook_size"] = state["quantizer.embedding.weight"].shape[0]
        return build(cls, arguments, state, key=key, dtype=dtype)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (V, D)."""
        return self.quantizer.embedding.weight

    def latents(self, images: Tensor) -> Tensor:
        """See the base class."""
        self.check_images(images)
        encoded: Tensor = self.encoder(as_weights(images, self.encoder))
        return encoded.flatten(2).transpose(1, 2)

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class; by squared distance, the first of equals."""
        return nearest_code(latents, self.codebook)

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Decoder output before it is clamped to [0, 1]."""
        batch, _, dim = embeddings.shape
        grid = embeddings.transpose(1, 2).reshape(batch, dim, self.grid, self.grid)
        decoded: Tensor = self.decoder(as_weights(grid, self.decoder))
        return decoded

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        return self.decode_raw(embeddings).clamp(0, 1)


def check_pixel_decoder(arguments: Mapping[str, Any], *, patch_size: int) -> None:
    """Refuse arguments of a `PixelDecoder` that are not all there, or whose images would have another size.

    Args:
        arguments: Its constructor's.
        patch_size: Pixels a side that a code vector stands for.

    Raises:
        ValueError: Naming what is missing, or the levels.
    """
    needed = ("channel_mult", "hidden_channels", "num_res_blocks", "z_channels")
    if missing := [name for name in needed if name not in arguments]:
        raise ValueError(
            f"tokenizer.pixel_decoder: expected {', '.join(missing)}, got {', '.join(arguments) or 'nothing'}"
        )
    if 2 ** (len(arguments["channel_mult"]) - 1) != patch_size:
        raise ValueError(
            f"tokenizer.pixel_decoder.channel_mult: expected levels that make {patch_size} pixels of the decoder's "
            f"patch, each but the first twice as many, got {len(arguments['channel_mult'])} levels"
        )


def pixel_decoder_sizes(state: Mapping[str, Tensor], *, prefix: str, hidden: int | None = None) -> dict[str, object]:
    """The arguments of a `PixelDecoder` that shapes tell; none where the checkpoint is another family's.

    Args:
        state: The checkpoint's tensors.
        prefix: Of the decoder's names.
        hidden: The width that the levels' widths are multiples of. A decoder alone does not tell it, nor need it: by
            default their largest common divisor.
    """
    if f"{prefix}up.0.block.0.conv1.weight" not in state or f"{prefix}conv_in.weight" not in state:
        return {}
    widths: list[int] = []
    while (name := f"{prefix}up.{len(widths)}.block.0.conv1.weight") in state:
        widths.append(state[name].shape[0])
    blocks = 0
    while f"{prefix}up.0.block.{blocks}.conv1.weight" in state:
        blocks += 1
    unit = math.gcd(*widths)
    if hidden is not None and unit % hidden == 0:
        unit = hidden
    return {
        "channel_mult": [width // unit for width in widths],
        "hidden_channels": unit,
        "num_res_blocks": blocks,
        "z_channels": state[f"{prefix}conv_in.weight"].shape[1],
        "num_channels": state[f"{prefix}conv_out.weight"].shape[0],
    }
