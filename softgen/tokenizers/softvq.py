"""SoftVQ-VAE (arXiv 2412.10958): a few latent tokens an image, each the mean of many codes.

Shape legend: B batch, P patches, L latent tokens, W width, G groups, K codes, D latent dimension.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from softgen.checkpoints import build, find_checkpoint, read_checkpoint, settings_beside
from softgen.tokenizers.baseline_quantizers import HardQuantizer, NoQuantizer
from softgen.tokenizers.continuous import ContinuousTokenizer
from softgen.tokenizers.parts import as_weights, check_vit_sizes, without_clash
from softgen.tokenizers.scaled_vit import LAYER_SCALE, ScaledViT
from softgen.tokenizers.soft_quantizer import SoftDistance, SoftQuantizer, Temperature

Quantization = Literal["soft", "vq", "none"]

_LARGE = {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16}
# What a released file holds beyond the tokenizer: a loss's teacher and head, counts, and a part that nothing reads.
_DROPPED = ("repa_model.", "projection.", "quantizer.codebook_used", "decoder.model.patch_embed.")


class _Encoder(nn.Module):
    def __init__(
        self,
        *,
        latent_tokens: int,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.model = ScaledViT(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            layer_scale=layer_scale,
        )
        self.latent_tokens = nn.Parameter(torch.randn(1, latent_tokens, width) * 0.02)
        self.latent_pos_embed = nn.Parameter(torch.randn(1, latent_tokens, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        latents = (self.latent_tokens + self.latent_pos_embed).expand(len(images), -1, -1)
        states: Tensor = self.model(self.model.patch_embed(images), latents)
        return states[:, -latents.shape[1] :]


class _Pixels(nn.Module):
    """Patches to an image; the channels of a patch are ordered (row, column, colour)."""

    def __init__(self, width: int, *, patch_size: int, grid: int) -> None:
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.model = nn.Linear(width, 3 * patch_size**2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.model(x).view(len(x), self.grid, self.grid, self.patch_size, self.patch_size, 3)
        side = self.grid * self.patch_size
        images: Tensor = pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, side, side)
        return images


class _Decoder(nn.Module):
    def __init__(
        self,
        *,
        latent_tokens: int,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.model = ScaledViT(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            layer_scale=layer_scale,
            embeds=False,
        )
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.latent_pos_embed = nn.Parameter(torch.randn(1, latent_tokens, width) * 0.02)
        self.to_pixel = _Pixels(width, patch_size=patch_size, grid=image_size // patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        masks = self.mask_token.expand(len(latents), self.model.num_patches, -1)
        states = self.model(masks, latents + self.latent_pos_embed)
        pixels: Tensor = self.to_pixel(states[:, 1 : 1 + self.model.num_patches])
        return pixels


class SoftVQ(ContinuousTokenizer):
    """SoftVQ-VAE. The defaults are those of the released L-64, with the paper's variants as options.

    Args:
        image_size: Pixels a side; a multiple of both patch sizes.
        num_latents: L; a multiple of `groups`.
        codebook_size: K, of every codebook.
        latent_dim: D.
        encoder: `width`, `depth`, `heads` and `patch_size` of the encoder.
        decoder: The same of the decoder.
        groups: G, runs of tokens with a codebook each.
        levels: Of residual quantisation; see `SoftQuantizer`, as for the three that follow.
        distance: `cosine` as released, `l2` as in the paper, or `dot`.
        tau: Above 0.
        temperature: `fixed`, `learnable` or `predicted` (GMMVQ).
        quantization: `soft`; or, to compare with, `vq`: the nearest of K unit codes, or `none`: a plain autoencoder.
            Those two have no groups, levels, distance, tau and temperature.
        layer_scale: What the factors of the transformers' residual branches start at; the released 1e-5 learns slowly,
            0.1 suits short runs.
        latent_mean: See `ContinuousTokenizer`.
        latent_std: See `ContinuousTokenizer`; above 0.

    Raises:
        ValueError: If sizes do not fit each other, or an argument is out of range.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        num_latents: int = 64,
        codebook_size: int = 8192,
        latent_dim: int = 32,
        encoder: Mapping[str, int] | None = None,
        decoder: Mapping[str, int] | None = None,
        groups: int = 4,
        levels: int = 1,
        distance: SoftDistance = "cosine",
        tau: float = 0.07,
        temperature: Temperature = "fixed",
        quantization: Quantization = "soft",
        layer_scale: float = LAYER_SCALE,
        latent_mean: float = 0.0,
        latent_std: float = 1.0,
    ) -> None:
        super().__init__()
        if quantization not in get_args(Quantization):
            raise ValueError(
                f"tokenizer.quantization: expected one of {', '.join(get_args(Quantization))}, got {quantization!r}"
            )
        if quantization != "soft" and (levels, temperature) != (1, "fixed"):
            raise ValueError(
                f"tokenizer.quantization: expected soft for {levels} levels and a {temperature} temperature, got "
                f"{quantization}"
            )
        sizes = {"encoder": {**_LARGE, **(encoder or {})}, "decoder": {**_LARGE, **(decoder or {})}}
        check_vit_sizes(
            sizes, image_size=image_size, num_latents=num_latents, codebook_size=codebook_size, latent_dim=latent_dim
        )
        if quantization == "soft" and (groups < 1 or num_latents % groups):
            raise ValueError(f"tokenizer.groups: expected a divisor of the {num_latents} tokens, got {groups}")
        if not 0 <= layer_scale < math.inf:
            raise ValueError(f"tokenizer.layer_scale: expected a finite number of at least 0, got {layer_scale}")
        self.config = {
            "image_size": image_size,
            "num_latents": num_latents,
            "codebook_size": codebook_size,
            "latent_dim": latent_dim,
            **sizes,
            "groups": groups,
            "levels": levels,
            "distance": distance,
            "tau": tau,
            "temperature": temperature,
            "quantization": quantization,
            "layer_scale": layer_scale,
        }
        self.image_size, self.num_latents, self.latent_dim = image_size, num_latents, latent_dim
        self.set_statistics(mean=latent_mean, std=latent_std)
        common: dict[str, Any] = {
            "latent_tokens": num_latents,
            "image_size": image_size,
            "layer_scale": layer_scale,
        }
        self.encoder = _Encoder(**common, **sizes["encoder"])
        self.decoder = _Decoder(**common, **sizes["decoder"])
        self.quant_conv = nn.Linear(sizes["encoder"]["width"], latent_dim)
        self.post_quant_conv = nn.Linear(latent_dim, sizes["decoder"]["width"])
        self.quantization: Quantization = quantization
        self.quantizer: SoftQuantizer | HardQuantizer | NoQuantizer
        if quantization == "soft":
            self.quantizer = SoftQuantizer(
                num_codes=codebook_size,
                code_dim=latent_dim,
                groups=groups,
                levels=levels,
                distance=distance,
                tau=tau,
                temperature=temperature,
                key="tokenizer",
            )
        elif quantization == "vq":
            self.quantizer = HardQuantizer(num_codes=codebook_size, code_dim=latent_dim)
        else:
            self.quantizer = NoQuantizer()

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "tokenizer",
        encoder_heads: int | None = None,
        decoder_heads: int | None = None,
        distance: SoftDistance | None = None,
        tau: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SoftVQ":
        """Open a released checkpoint of any size.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`.
            key: The config key that named it, for error messages.
            encoder_heads: Shapes do not tell them; by default the released 64 channels a head.
            decoder_heads: As `encoder_heads`.
            distance: By default what config.json beside the checkpoint says of `codebook_l2_norm`, else `cosine`.
            tau: By default what config.json says, else 0.07.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        path = find_checkpoint(source, key=key)
        state = without_clash(read_checkpoint(path, key=key))
        told = settings_beside(path)
        arguments = _sizes(state, encoder_heads=encoder_heads, decoder_heads=decoder_heads)
        _check_settings(told, arguments, key=key)
        arguments |= {
            "distance": distance or ("cosine" if told.get("codebook_l2_norm", True) else "dot"),
            "tau": told.get("tau", 0.07) if tau is None else tau,
            "latent_mean": told.get("vq_mean", 0.0),
            "latent_std": told.get("vq_std", 1.0),
        }
        return build(cls, arguments, state, key=key, dropped=_DROPPED, dtype=dtype)

    def on_weights_averaged(self) -> None:
        """Hard codes are unit vectors again."""
        if isinstance(self.quantizer, HardQuantizer):
            self.quantizer.codebook.normalise()

    def raw_latents(self, images: Tensor) -> Tensor:
        """Encoder outputs (B, L, D) before they are quantised."""
        self.check_images(images)
        latents: Tensor = self.quant_conv(self.encoder(as_weights(2 * images - 1, self.encoder)))
        return latents

    def encode(self, images: Tensor) -> Tensor:
        """See the base class: expected codes, or what `quantization` says."""
        latents: Tensor = self.quantizer(self.raw_latents(images))
        return latents

    def decode_raw(self, latents: Tensor) -> Tensor:
        """See the base class."""
        self.check_latents(latents)
        pixels: Tensor = self.decoder(self.post_quant_conv(as_weights(latents, self.post_quant_conv)))
        return (pixels + 1) / 2


def _check_settings(told: Mapping[str, Any], arguments: Mapping[str, Any], *, key: str) -> None:
    """Refuse a config.json that is not the checkpoint's, or that names what no tensor shows and we do not have."""
    names = {"codebook_size": "codebook_size", "latent_dim": "codebook_embed_dim", "groups": "num_codebooks"}
    for ours, theirs in names.items():
        if ours in arguments and told.get(theirs, arguments[ours]) != arguments[ours]:
            raise ValueError(f"{key}: expected {theirs} {told[theirs]} as config.json says, got {arguments[ours]}")
    for name, value in told.items():
        if name.endswith("use_rope") and value is True:
            raise ValueError(f"{key}: expected learned positions as in every released SoftVQ-VAE, got {name}")


def _sizes(state: Mapping[str, Tensor], *, encoder_heads: int | None, decoder_heads: int | None) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    before = ("encoder.model.pos_embed", "encoder.model.patch_embed.proj.weight", "encoder.latent_pos_embed")
    after = ("decoder.model.pos_embed", "decoder.to_pixel.model.weight", "quantizer.embedding")
    if not all(name in state for name in (*before, *after)):
        return {}
    patch = state["encoder.model.patch_embed.proj.weight"].shape[-1]
    groups, codes, dim = state["quantizer.embedding"].shape
    return {
        "image_size": patch * math.isqrt(state["encoder.model.pos_embed"].shape[1] - 1),
        "num_latents": state["encoder.latent_pos_embed"].shape[1],
        "codebook_size": codes,
        "latent_dim": dim,
        "groups": groups,
        "encoder": _vit_sizes(state, "encoder.model.", heads=encoder_heads, patch_size=patch),
        "decoder": _vit_sizes(
            state,
            "decoder.model.",
            heads=decoder_heads,
            patch_size=math.isqrt(state["decoder.to_pixel.model.weight"].shape[0] // 3),
        ),
    }


def _vit_sizes(state: Mapping[str, Tensor], prefix: str, *, heads: int | None, patch_size: int) -> dict[str, int]:
    width, depth = state[f"{prefix}pos_embed"].shape[2], 0
    while f"{prefix}blocks.{depth}.norm1.weight" in state:
        depth += 1
    return {"width": width, "depth": depth, "heads": heads or max(1, width // 64), "patch_size": patch_size}
