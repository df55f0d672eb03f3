"""The VQGAN of Taming Transformers (arXiv 2012.09841), which MaskGIT's first PyTorch version was trained on.

Shape legend: B batch, N tokens, V codes, D code dimension, c channels, h and w of a grid.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.checkpoints import build, read_checkpoint
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.parts import CodeTable, as_weights, grid_factor, group_norm, nearest_code, without_clash

_RESOLUTION = 256  # that levels are named by


class _ResnetBlock(nn.Module):
    def __init__(self, before: int, after: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = group_norm(after)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _AttnBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.proj_out(mixed)
        return out


class _Downsample(nn.Module):
    def __init__(self, channels: int, *, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "conv"):
            return F.avg_pool2d(x, 2)
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Upsample(nn.Module):
    def __init__(self, channels: int, *, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0)
        return self.conv(x) if hasattr(self, "conv") else x


class _Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it, then resampling."""

    def __init__(self, before: int, after: int, *, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _ResnetBlock(before if index == 0 else after, after, dropout=dropout) for index in range(blocks)
        )
        self.attn = nn.ModuleList(_AttnBlock(after) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.block_1 = _ResnetBlock(channels, channels, dropout=dropout)
        self.attn_1 = _AttnBlock(channels)
        self.block_2 = _ResnetBlock(channels, channels, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class _Encoder(nn.Module):
    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool],
        in_channels: int,
        z_channels: int,
        dropout: float,
        with_conv: bool,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else ch
            down = _Level(before, width, blocks=num_res_blocks, attention=attention[level], dropout=dropout)
            if level < len(widths) - 1:
                down.downsample = _Downsample(width, with_conv=with_conv)
            self.down.append(down)
        self.mid = _Middle(widths[-1], dropout=dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class _Decoder(nn.Module):
    """`up` is numbered by level, 0 the full resolution, and runs from the last level to the first."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attention: Sequence[bool],
        out_ch: int,
        z_channels: int,
        dropout: float,
        with_conv: bool,
    ) -> None:
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], dropout=dropout)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[level + 1] if level < len(widths) - 1 else width
            up = _Level(before, width, blocks=num_res_blocks + 1, attention=attention[level], dropout=dropout)
            if level:
                up.upsample = _Upsample(width, with_conv=with_conv)
            self.up.append(up)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class TamingVQGAN(ImageTokenizer):
    """Convolutional encoder and decoder with attention at the lowest resolutions; tokens are 16 times coarser.

    Inside, images are in [-1, 1]. The defaults are those of the ImageNet model f16-1024.

    Args:
        image_size: Pixels a side of the images that it is used on; any multiple of its factor.
        n_embed: V.
        embed_dim: D.
        ch: Channels at full resolution.
        ch_mult: Multiples of `ch`, one a level; each further level halves the side.
        num_res_blocks: Blocks a level, one more in the decoder.
        attn_resolutions: Levels with attention, named by their side for images of `resolution` pixels.
        resolution: The side that those names refer to, whatever the images'.
        z_channels: Channels between encoder and quantiser.
        in_channels: Of the images.
        out_ch: Of the images.
        dropout: In [0, 1).
        resamp_with_conv: Whether resampling convolves.

    Raises:
        ValueError: If the image size does not fit the levels.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        n_embed: int = 1024,
        embed_dim: int = 256,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        z_channels: int = 256,
        in_channels: int = 3,
        out_ch: int = 3,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
    ) -> None:
        super().__init__()
        grid_factor([ch], key="ch", image_size=image_size)
        counts = {"n_embed": n_embed, "embed_dim": embed_dim, "num_res_blocks": num_res_blocks}
        factor = grid_factor([ch * multiple for multiple in ch_mult], key="ch_mult", image_size=image_size, **counts)
        self.config = {
            "image_size": image_size,
            "n_embed": n_embed,
            "embed_dim": embed_dim,
            "ch": ch,
            "ch_mult": list(ch_mult),
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": list(attn_resolutions),
            "resolution": resolution,
            "z_channels": z_channels,
            "in_channels": in_channels,
            "out_ch": out_ch,
            "dropout": dropout,
            "resamp_with_conv": resamp_with_conv,
        }
        self.image_size, self.num_codes, self.code_dim = image_size, n_embed, embed_dim
        self.grid = image_size // factor
        self.num_sites = self.grid**2
        self.distance = "l2"
        attention = [resolution // 2**level in attn_resolutions for level in range(len(ch_mult))]
        self.encoder = _Encoder(
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attention=attention,
            in_channels=in_channels,
            z_channels=z_channels,
            dropout=dropout,
            with_conv=resamp_with_conv,
        )
        self.decoder = _Decoder(
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attention=attention,
            out_ch=out_ch,
            z_channels=z_channels,
            dropout=dropout,
            with_conv=resamp_with_conv,
        )
        self.quantizer = CodeTable(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "tokenizer",
        image_size: int = 256,
        dtype: torch.dtype | None = None,
    ) -> "TamingVQGAN":
        """Open a published checkpoint; weights of its training loss (`loss.*`) are left out.

        Args:
            source: A file, or a folder or hub id that holds `last.ckpt`, `model.safetensors` or `pytorch_model.bin`. A
                Lightning checkpoint that holds more than tensors is turned into safetensors by `softgen.convert`.
            key: The config key that named it, for error messages.
            image_size: Of the images that it is to be used on.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        state = without_clash(
            read_checkpoint(source, key=key, names=("last.ckpt", "model.safetensors", "pytorch_model.bin"))
        )
        arguments = _sizes(state)
        return build(cls, {**arguments, "image_size": image_size}, state, key=key, dropped=("loss.",), dtype=dtype)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (V, D)."""
        return self.quantizer.embedding.weight

    def latents(self, images: Tensor) -> Tensor:
        """See the base class."""
        self.check_images(images)
        encoded: Tensor = self.quant_conv(self.encoder(as_weights(2 * images - 1, self.encoder)))
        return encoded.flatten(2).transpose(1, 2)

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class; the first of equals."""
        return nearest_code(latents, self.codebook)

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Decoder output, about [-1, 1], before it is brought to [0, 1] and clamped."""
        batch, _, dim = embeddings.shape
        grid = embeddings.transpose(1, 2).reshape(batch, dim, self.grid, self.grid)
        decoded: Tensor = self.decoder(self.post_quant_conv(as_weights(grid, self.post_quant_conv)))
        return decoded

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        return (self.decode_raw(embeddings) / 2 + 0.5).clamp(0, 1)


def _sizes(state: dict[str, Tensor]) -> dict[str, object]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    if not {"encoder.conv_in.weight", "quantizer.embedding.weight", "encoder.conv_out.weight"} <= state.keys():
        return {}
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    widths, level = [], 0
    while (name := f"encoder.down.{level}.block.0.conv1.weight") in state:
        widths.append(state[name].shape[0])
        level += 1
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in state:
        blocks += 1
    n_embed, embed_dim = state["quantizer.embedding.weight"].shape
    attention = [depth for depth in range(len(widths)) if f"encoder.down.{depth}.attn.0.norm.weight" in state]
    return {
        "attn_resolutions": [_RESOLUTION >> depth for depth in attention],
        "resolution": _RESOLUTION,
        "n_embed": n_embed,
        "embed_dim": embed_dim,
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": blocks,
        "z_channels": state["encoder.conv_out.weight"].shape[0],
        "in_channels": in_channels,
        "out_ch": state["decoder.conv_out.weight"].shape[0] if "decoder.conv_out.weight" in state else 3,
        "resamp_with_conv": "encoder.down.0.downsample.conv.weight" in state or len(widths) < 2,
    }
