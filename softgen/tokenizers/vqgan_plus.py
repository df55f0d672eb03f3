"""VQGAN+, the convolutional autoencoder of MaskBit (arXiv 2409.16211), and its tokenizer with a table of codes.

Shape legend: B batch, L tokens, V codes, D code dimension, h and w of a grid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.checkpoints import build, read_checkpoint
from softgen.relaxation import expected_embedding, widen
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


class _Blocks(nn.Module):
    """The residual blocks of one resolution."""

    def __init__(self, before: int, after: int, *, count: int) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(
            OutputShortcutBlock(after if index else before, after) for index in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x)
        return x


class _Down(_Blocks):
    """Blocks, then half the side, unless `last`."""

    def __init__(self, before: int, after: int, *, count: int, last: bool, convolves: bool) -> None:
        super().__init__(before, after, count=count)
        self.last = last
        if convolves and not last:
            self.down_conv = nn.Conv2d(after, after, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.last:
            return x
        # What TensorFlow pads for a stride of 2 on an even side.
        return self.down_conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "down_conv") else F.avg_pool2d(x, 2)


class _Up(_Blocks):
    """Blocks, then twice the side, unless `last`."""

    def __init__(self, before: int, after: int, *, count: int, last: bool) -> None:
        super().__init__(before, after, count=count)
        if not last:
            self.upsample_conv = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0)) if hasattr(self, "upsample_conv") else x


class _Encoder(nn.Module):
    def __init__(self, widths: Sequence[int], *, channels: int, dim: int, blocks: int, convolves: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        before = [channels, *widths[:-1]]
        self.down = nn.ModuleList(
            _Down(before[level], width, count=blocks, last=level == len(widths) - 1, convolves=convolves)
            for level, width in enumerate(widths)
        )
        self.mid = _Blocks(widths[-1], widths[-1], count=blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


class _Decoder(nn.Module):
    """`up` runs in its order, from the lowest resolution to the highest; a legacy checkpoint numbers it backwards."""

    def __init__(self, widths: Sequence[int], *, dim: int, blocks: int, legacy: bool) -> None:
        super().__init__()
        self.legacy = legacy
        self.conv_in = nn.Conv2d(dim, widths[-1], 3, padding=1)
        self.mid = _Blocks(widths[-1], widths[-1], count=blocks)
        before = [*widths[1:], widths[-1]]
        levels = [_Up(before[level], width, count=blocks, last=level == 0) for level, width in enumerate(widths)]
        self.up = nn.ModuleList(levels if legacy else reversed(levels))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up) if self.legacy else self.up:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class ConvAutoencoder(ImageTokenizer):
    """What MaskBit's tokenizers share: encoder and decoder, images in [0, 1] inside as well.

    Subclasses quantise. The channels of every level are multiples of 32.

    Args:
        image_size: Pixels a side of the images that it is used on; any multiple of its factor.
        token_size: Channels between encoder and decoder.
        hidden_channels: Channels at full resolution.
        channel_mult: Multiples of `hidden_channels`, one a level; each further level halves the side.
        num_res_blocks: Blocks a level.
        num_res_blocks_decoder: Blocks a level of the decoder; by default as many.
        sample_with_conv: Whether the encoder halves the side by convolution, else by averaging.
        legacy_decoder: Whether the decoder's levels are stored from the highest resolution down.

    Raises:
        ValueError: If the image size does not fit the levels, or a level's channels are no multiple of 32.
    """

    def __init__(
        self,
        *,
        image_size: int,
        token_size: int,
        hidden_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        num_res_blocks_decoder: int | None,
        sample_with_conv: bool,
        legacy_decoder: bool,
    ) -> None:
        super().__init__()
        widths = [hidden_channels * multiple for multiple in channel_mult]
        grid_factor([hidden_channels], key="hidden_channels", image_size=image_size)
        counts = {"token_size": token_size, "num_res_blocks": num_res_blocks}
        factor = grid_factor(widths, key="channel_mult", image_size=image_size, **counts)
        self.config = {
            "image_size": image_size,
            "hidden_channels": hidden_channels,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "num_res_blocks_decoder": num_res_blocks_decoder,
            "sample_with_conv": sample_with_conv,
            "legacy_decoder": legacy_decoder,
        }
        self.image_size, self.grid, self.token_size = image_size, image_size // factor, token_size
        self.distance = "l2"
        self.encoder = _Encoder(
            widths, channels=hidden_channels, dim=token_size, blocks=num_res_blocks, convolves=sample_with_conv
        )
        self.decoder = _Decoder(
            widths, dim=token_size, blocks=num_res_blocks_decoder or num_res_blocks, legacy=legacy_decoder
        )

    def encode_raw(self, images: Tensor) -> Tensor:
        """Encoder outputs (B, L, token_size) of images in [0, 1], row-major over the grid."""
        self.check_images(images)
        encoded: Tensor = self.encoder(as_weights(images, self.encoder))
        return encoded.flatten(2).transpose(1, 2)

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Decoder output, about [0, 1], before it is clamped."""
        rows = embeddings.reshape(len(embeddings), self.grid**2, self.token_size)
        grid = rows.transpose(1, 2).reshape(len(rows), self.token_size, self.grid, self.grid)
        # Another memory layout would take other kernels, and round otherwise than the published code.
        decoded: Tensor = self.decoder(as_weights(grid.contiguous(), self.decoder))
        return decoded

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        return self.decode_raw(embeddings).clamp(0, 1)


class VQGANPlusTokenizer(ConvAutoencoder):
    """VQGAN+ with a table of codes; MaskBit's own tokenizer is `MaskBitTokenizer`.

    The defaults are those of the published 12-bit checkpoint.

    Args:
        image_size: As the arguments not named here, one of `ConvAutoencoder`.
        codebook_size: V.
        token_size: D.
        use_l2_normalisation: Whether latents and codes are unit vectors.

    Raises:
        ValueError: As `ConvAutoencoder`.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 4096,
        token_size: int = 64,
        hidden_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_res_blocks_decoder: int | None = None,
        sample_with_conv: bool = True,
        legacy_decoder: bool = False,
        use_l2_normalisation: bool = False,
    ) -> None:
        super().__init__(
            image_size=image_size,
            token_size=token_size,
            hidden_channels=hidden_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            num_res_blocks_decoder=num_res_blocks_decoder,
            sample_with_conv=sample_with_conv,
            legacy_decoder=legacy_decoder,
        )
        self.config |= {
            "codebook_size": codebook_size,
            "token_size": token_size,
            "use_l2_normalisation": use_l2_normalisation,
        }
        if codebook_size < 1:
            raise ValueError(f"tokenizer.codebook_size: expected at least 1, got {codebook_size}")
        self.num_sites, self.num_codes, self.code_dim = self.grid**2, codebook_size, token_size
        self.unit = use_l2_normalisation
        self.quantizer = CodeTable(codebook_size, token_size)

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, *, key: str = "tokenizer", dtype: torch.dtype | None = None, **options: Any
    ) -> "VQGANPlusTokenizer":
        """Open a published checkpoint; its sizes are read from it.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors` or `pytorch_model.bin`.
            key: The config key that named it, for error messages.
            dtype: Of the weights; None keeps the checkpoint's.
            **options: Arguments of the class. `image_size` and `use_l2_normalisation` show in no shape; those that do
                are checked against the checkpoint.

        Raises:
            ValueError: If the file is missing or of another family, or the options contradict it.
        """
        state = without_clash(read_checkpoint(source, key=key))
        arguments = autoencoder_sizes(state)
        if "quantizer.embedding.weight" in state:
            arguments["codebook_size"] = state["quantizer.embedding.weight"].shape[0]
        arguments = merge_options(arguments, options, key=key)
        return build(cls, arguments, state, key=key, dtype=dtype)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (V, D)."""
        codes: Tensor = self.quantizer.embedding.weight
        return F.normalize(codes, dim=-1) if self.unit else codes

    def codebook_weight(self) -> Tensor:
        """See the base class: before it is normalised."""
        weight: Tensor = self.quantizer.embedding.weight
        return weight

    def latents(self, images: Tensor) -> Tensor:
        """See the base class."""
        encoded = widen(self.encode_raw(images))
        return F.normalize(encoded, dim=-1) if self.unit else encoded

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class; the first of equals."""
        return nearest_code(latents, self.codebook)

    def embed_soft(self, probs: Tensor) -> Tensor:
        """See the base class; with `use_l2_normalisation`, codes are averaged as they are stored, then normalised."""
        soft = expected_embedding(probs, self.quantizer.embedding.weight)
        return F.normalize(soft, dim=-1) if self.unit else soft


def merge_options(arguments: Mapping[str, Any], options: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """The arguments that a checkpoint tells, and those that were asked for.

    Raises:
        ValueError: If they contradict each other.
    """
    asked = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    for name, value in asked.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"{key}.{name}: expected {arguments[name]} as the checkpoint has, got {value}")
    return {**arguments, **asked}


def autoencoder_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `ConvAutoencoder` that a checkpoint tells; none where it is another family's."""

    def count(name: str) -> int:
        return next(index for index in range(len(state) + 1) if name.format(index) not in state)

    levels = count("encoder.down.{}.res_blocks.0.conv1.weight")
    if levels == 0 or not {"encoder.conv_in.weight", "encoder.conv_out.weight"} <= state.keys():
        return {}
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{level}.res_blocks.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "token_size": state["encoder.conv_out.weight"].shape[0],
        "hidden_channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": count("encoder.down.0.res_blocks.{}.conv1.weight"),
        "num_res_blocks_decoder": count("decoder.up.0.res_blocks.{}.conv1.weight"),
        "sample_with_conv": levels == 1 or "encoder.down.0.down_conv.weight" in state,
        "legacy_decoder": levels > 1 and "decoder.up.0.upsample_conv.weight" not in state,
    }
