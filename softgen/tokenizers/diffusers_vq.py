"""The VQModel of diffusers, as aMUSEd trained it and Meissonic uses it: a convolutional tokenizer, 16 times coarser.

Shape legend: B batch, N tokens, K codes, D code dimension, c channels, h and w of a grid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.checkpoints import build, diffusers_names, find_checkpoint, read_checkpoint, settings_beside
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.parts import CodeTable, as_weights, grid_factor, nearest_code, without_clash

_EPS = 1e-6


class _Resnet(nn.Module):
    def __init__(self, before: int, after: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=_EPS)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, after, eps=_EPS)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.conv_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class _Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part(h).unsqueeze(1) for part in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        out: Tensor = x + mixed.transpose(1, 2).reshape(x.shape)
        return out


class _Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0))
        return out


class _Level(nn.Module):
    """Residual blocks of one resolution, then resampling, but for the last level."""

    def __init__(self, before: int, after: int, *, count: int, groups: int, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _Resnet(after if index else before, after, groups=groups) for index in range(count)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([_Down(after)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([_Up(after)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            assert isinstance(part, nn.ModuleList)
            for layer in part:
                x = layer(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(channels, channels, groups=groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups=groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        out: Tensor = self.resnets[1](x)
        return out


class _Encoder(nn.Module):
    def __init__(
        self, *, widths: Sequence[int], count: int, groups: int, attention: bool, before: int, after: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(before, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(
                widths[max(0, level - 1)],
                width,
                count=count,
                groups=groups,
                resample="down" if level < len(widths) - 1 else None,
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = _Middle(widths[-1], groups=groups, attention=attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class _Decoder(nn.Module):
    """`up_blocks` are in the order in which they run."""

    def __init__(
        self, *, widths: Sequence[int], count: int, groups: int, attention: bool, before: int, after: int
    ) -> None:
        super().__init__()
        turned = list(reversed(widths))
        self.conv_in = nn.Conv2d(before, turned[0], 3, padding=1)
        self.mid_block = _Middle(turned[0], groups=groups, attention=attention)
        self.up_blocks = nn.ModuleList(
            _Level(
                turned[max(0, level - 1)],
                width,
                count=count + 1,
                groups=groups,
                resample="up" if level < len(turned) - 1 else None,
            )
            for level, width in enumerate(turned)
        )
        self.conv_norm_out = nn.GroupNorm(groups, turned[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(turned[-1], after, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class DiffusersVQ(ImageTokenizer):
    """Convolutional encoder and decoder around a codebook. The defaults are those of aMUSEd, which Meissonic uses.

    Images are in [0, 1] inside too.

    Args:
        image_size: Pixels a side of the images that it is used on; any multiple of its factor.
        block_out_channels: Channels of the levels, from full resolution; each further level halves the side.
        layers_per_block: Residual blocks a level, one more in the decoder.
        latent_channels: Channels between encoder and quantiser.
        vq_embed_dim: D; by default `latent_channels`.
        num_vq_embeddings: K.
        norm_num_groups: Of every group norm; divides the channels.
        mid_block_add_attention: Whether there is attention between the two middle blocks.
        in_channels: Of the images.
        out_channels: Of the images.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int = 1024,
        block_out_channels: Sequence[int] = (128, 256, 256, 512, 768),
        layers_per_block: int = 2,
        latent_channels: int = 64,
        vq_embed_dim: int | None = None,
        num_vq_embeddings: int = 8192,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        counts = {
            "norm_num_groups": norm_num_groups,
            "num_vq_embeddings": num_vq_embeddings,
            "layers_per_block": layers_per_block,
        }
        factor = grid_factor(
            block_out_channels, key="block_out_channels", image_size=image_size, groups=norm_num_groups, **counts
        )
        self.config = {
            "image_size": image_size,
            "block_out_channels": list(block_out_channels),
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "vq_embed_dim": vq_embed_dim,
            "num_vq_embeddings": num_vq_embeddings,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
            "in_channels": in_channels,
            "out_channels": out_channels,
        }
        self.image_size, self.num_codes = image_size, num_vq_embeddings
        self.code_dim = latent_channels if vq_embed_dim is None else vq_embed_dim
        self.grid = image_size // factor
        self.num_sites = self.grid**2
        self.distance = "l2"
        common: dict[str, Any] = {
            "widths": block_out_channels,
            "count": layers_per_block,
            "groups": norm_num_groups,
            "attention": mid_block_add_attention,
        }
        self.encoder = _Encoder(**common, before=in_channels, after=latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, self.code_dim, 1)
        self.quantizer = CodeTable(num_vq_embeddings, self.code_dim)
        self.post_quant_conv = nn.Conv2d(self.code_dim, latent_channels, 1)
        self.decoder = _Decoder(**common, before=latent_channels, after=out_channels)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "tokenizer",
        image_size: int = 1024,
        norm_num_groups: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "DiffusersVQ":
        """Open a published checkpoint.

        Args:
            source: A diffusers folder or hub id, its subfolder `vqvae`, or a file.
            key: The config key that named it, for error messages.
            image_size: Of the images that it is to be used on: 1024 with Meissonic, 512 with Monetico.
            norm_num_groups: Shapes do not tell it; by default that of the config.json beside the weights, else 32.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        path = find_checkpoint(source, key=key, names=diffusers_names("vqvae"))
        state = without_clash(read_checkpoint(path, key=key))
        groups = norm_num_groups or settings_beside(path).get("norm_num_groups")
        arguments = {**_sizes(state), "image_size": image_size}
        if groups is not None and len(arguments) > 1:
            arguments["norm_num_groups"] = groups
        return build(cls, arguments, state, key=key, dtype=dtype)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (K, D)."""
        return self.quantizer.embedding.weight

    def latent_grid(self, images: Tensor) -> Tensor:
        """Encoder outputs (B, D, h, w) before quantisation, of images of any multiple of the factor."""
        encoded: Tensor = self.quant_conv(self.encoder(as_weights(images, self.encoder)))
        return encoded

    def latents(self, images: Tensor) -> Tensor:
        """See the base class."""
        self.check_images(images)
        return self.latent_grid(images).flatten(2).transpose(1, 2)

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class; the first of equals."""
        return nearest_code(latents, self.codebook)

    def decode_grid(self, grid: Tensor) -> Tensor:
        """Decoder output, about [0, 1], of code vectors (B, D, h, w), before it is clamped."""
        decoded: Tensor = self.decoder(self.post_quant_conv(as_weights(grid, self.post_quant_conv)))
        return decoded

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        batch, _, dim = embeddings.shape
        grid = embeddings.transpose(1, 2).reshape(batch, dim, self.grid, self.grid)
        return self.decode_grid(grid).clamp(0, 1)


def _sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    names = (
        "encoder.conv_in.weight",
        "encoder.conv_out.weight",
        "decoder.conv_out.weight",
        "quantizer.embedding.weight",
    )
    level = "encoder.down_blocks.{}.resnets.0.conv1.weight"
    if not all(name in state for name in (*names, level.format(0))):
        return {}
    conv_in, conv_out, last, table = (state[name] for name in names)
    widths: list[int] = []
    while (name := level.format(len(widths))) in state:
        widths.append(state[name].shape[0])
    count = 0
    while f"encoder.down_blocks.0.resnets.{count}.conv1.weight" in state:
        count += 1
    latent, dim = conv_out.shape[0], table.shape[1]
    return {
        "block_out_channels": widths,
        "layers_per_block": count,
        "latent_channels": latent,
        "vq_embed_dim": None if dim == latent else dim,
        "num_vq_embeddings": table.shape[0],
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        "in_channels": conv_in.shape[1],
        "out_channels": last.shape[0],
    }
