"""TiTok (arXiv 2406.07550): a handful of latent tokens an image, in one dimension.

Two kinds are published. Two-stage: the decoder predicts the codes of MaskGIT's VQGAN, whose expected code vectors a
pixel decoder turns into the image. Single-stage: the decoder predicts pixels.

Shape legend: B batch, L latent tokens, K codes, D code dimension, P patches, W width, V proxy codes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.checkpoints import build, find_checkpoint, published_settings, read_checkpoint
from softgen.relaxation import expected_embedding, probabilities, widen
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.maskgit_vqgan import PixelDecoder, check_pixel_decoder, pixel_decoder_sizes
from softgen.tokenizers.parts import CodeTable, as_weights, check_vit_sizes, nearest_code, without_clash

UNUSED = "quantizer.embed_prob"
"""A buffer of the authors' quantiser, which a checkpoint may hold."""


class _Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x, x, x, need_weights=False)[0]
        return out


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class ViTBlock(nn.Module):
    """The pre-norm block of TiTok, TA-TiTok and SFTok.

    Args:
        width: W.
        heads: Attention heads; divides W.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, W) to the same shape."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


def free_parameter(*shape: int, width: int) -> nn.Parameter:
    """A parameter that is no layer's, drawn with standard deviation width^-0.5."""
    return nn.Parameter(torch.randn(shape) * width**-0.5)


class TiTokEncoder(nn.Module):
    """Patches and latent tokens through a ViT; the latents come out.

    Args:
        image_size: Pixels a side.
        patch_size: Pixels a side of a patch.
        width: W.
        depth: Number of blocks.
        heads: Attention heads; divides W.
        latent_tokens: L.
        token_size: D.
        scrambles: Reinterpret (B, L, W) as (B, W, L) instead of transposing it, as the two-stage models were trained.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        latent_tokens: int,
        token_size: int,
        scrambles: bool,
    ) -> None:
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.scrambles = scrambles
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_embedding = free_parameter(1, width, width=width)
        self.positional_embedding = free_parameter(patches + 1, width, width=width)
        self.latent_token_positional_embedding = free_parameter(latent_tokens, width, width=width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(width, heads=heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, token_size, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Latents (B, L, D) of images (B, 3, H, W) and the learned tokens (L, W)."""
        batch, count = images.shape[0], latent_tokens.shape[0]
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), x], dim=1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = self.ln_pre(torch.cat([x, latents], dim=1))
        for block in self.transformer:
            x = block(x)
        latents = self.ln_post(x[:, -count:])
        columns = latents.reshape(batch, -1, count) if self.scrambles else latents.transpose(1, 2)
        out: Tensor = self.conv_out(columns.unsqueeze(-1)).flatten(2)
        # The two-stage models read their output as (D, L) all the same.
        return out.transpose(1, 2)


class TiTokDecoder(nn.Module):
    """Mask tokens, one a patch, and the latents through a ViT; logits over proxy codes come out, or pixels.

    Args:
        image_size: Pixels a side.
        patch_size: Pixels a side of a patch.
        width: W.
        depth: Number of blocks.
        heads: Attention heads; divides W.
        latent_tokens: L.
        token_size: D.
        proxy_codes: V, or None to predict pixels.
        text_length: T, vectors of text that the decoder looks at (TA-TiTok); 0 for none.
        text_width: Width of those.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        latent_tokens: int,
        token_size: int,
        proxy_codes: int | None,
        text_length: int = 0,
        text_width: int = 0,
    ) -> None:
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_size = patch_size
        self.decoder_embed = nn.Linear(token_size, width)
        self.class_embedding = free_parameter(1, width, width=width)
        self.positional_embedding = free_parameter(self.grid**2 + 1, width, width=width)
        self.mask_token = free_parameter(1, 1, width, width=width)
        self.latent_token_positional_embedding = free_parameter(latent_tokens, width, width=width)
        if text_length:
            self.text_guidance_proj = nn.Linear(text_width, width)
            self.text_guidance_positional_embedding = free_parameter(text_length, width, width=width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(width, heads=heads) for _ in range(depth))
        self.ln_post = nn.LayerNorm(width)
        if proxy_codes is None:
            self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, proxy_codes, 1))

    def forward(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits (B, V, h, w), or images (B, 3, H, W), of latents (B, L, D) and text (B, T, text_width)."""
        batch, patches = z.shape[0], self.grid**2
        masks = self.mask_token.expand(batch, patches, -1)
        x = torch.cat([self.class_embedding.expand(batch, 1, -1), masks], dim=1) + self.positional_embedding
        latents = self.decoder_embed(z.to(self.decoder_embed.weight.dtype)) + self.latent_token_positional_embedding
        parts = [x.to(latents.dtype), latents]
        if text is not None:
            told = self.text_guidance_proj(text.to(self.text_guidance_proj.weight.dtype))
            parts.append((told + self.text_guidance_positional_embedding).to(latents.dtype))
        x = self.ln_pre(torch.cat(parts, dim=1))
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x[:, 1 : 1 + patches])
        logits: Tensor = self.ffn(x.transpose(1, 2).reshape(batch, -1, self.grid, self.grid))
        if not hasattr(self, "conv_out"):
            return logits
        # Channels are ordered (row, column, colour) within a patch.
        patch = self.patch_size
        pixels = logits.view(batch, patch, patch, 3, self.grid, self.grid).permute(0, 3, 4, 1, 5, 2)
        out: Tensor = self.conv_out(pixels.reshape(batch, 3, self.grid * patch, self.grid * patch))
        return out


class TiTok(ImageTokenizer):
    """TiTok with vector-quantised tokens, two-stage or single-stage. The defaults are those of L-32.

    Args:
        image_size: Pixels a side; a multiple of both patch sizes.
        codebook_size: K.
        token_size: D.
        num_latent_tokens: L.
        use_l2_norm: Whether latents and codes are unit vectors; expected codes are then averaged first.
        encoder: `width`, `depth`, `heads` and `patch_size` of the encoder.
        decoder: The same of the decoder.
        is_legacy: As the two-stage models were trained: the encoder's scrambled output, logits over proxy codes.
        pixel_decoder: Arguments of `PixelDecoder`; None for single-stage models, and for a stage-1 checkpoint, which
            cannot decode.
        proxy_codebook_size: V, of the pixel decoder's codes.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 4096,
        token_size: int = 12,
        num_latent_tokens: int = 32,
        use_l2_norm: bool = True,
        encoder: Mapping[str, int] | None = None,
        decoder: Mapping[str, int] | None = None,
        is_legacy: bool = True,
        pixel_decoder: Mapping[str, Any] | None = None,
        proxy_codebook_size: int = 1024,
    ) -> None:
        super().__init__()
        large = {"width": 1024, "depth": 24, "heads": 16, "patch_size": 16}
        sizes = {"encoder": {**large, **(encoder or {})}, "decoder": {**large, **(decoder or {})}}
        check_vit_sizes(
            sizes,
            image_size=image_size,
            codebook_size=codebook_size,
            token_size=token_size,
            num_latent_tokens=num_latent_tokens,
            proxy_codebook_size=proxy_codebook_size,
        )
        self.config = {
            "image_size": image_size,
            "codebook_size": codebook_size,
            "token_size": token_size,
            "num_latent_tokens": num_latent_tokens,
            "use_l2_norm": use_l2_norm,
            **sizes,
            "is_legacy": is_legacy,
            "pixel_decoder": None if pixel_decoder is None else dict(pixel_decoder),
            "proxy_codebook_size": proxy_codebook_size,
        }
        self.image_size, self.num_codes, self.code_dim = image_size, codebook_size, token_size
        self.num_sites, self.use_l2_norm = num_latent_tokens, use_l2_norm
        self.distance, self.is_legacy = "l2", is_legacy
        common = {"image_size": image_size, "latent_tokens": num_latent_tokens, "token_size": token_size}
        self.latent_tokens = free_parameter(
            num_latent_tokens, sizes["encoder"]["width"], width=sizes["encoder"]["width"]
        )
        self.encoder = TiTokEncoder(**common, **sizes["encoder"], scrambles=is_legacy)
        self.decoder = TiTokDecoder(
            **common, **sizes["decoder"], proxy_codes=proxy_codebook_size if is_legacy else None
        )
        self.quantizer = CodeTable(codebook_size, token_size)
        if pixel_decoder is not None:
            if not is_legacy:
                raise ValueError("tokenizer.pixel_decoder: expected none in a single-stage model, got one")
            check_pixel_decoder(pixel_decoder, patch_size=sizes["decoder"]["patch_size"])
            self.pixel_quantize = CodeTable(proxy_codebook_size, pixel_decoder["z_channels"])
            self.pixel_decoder = PixelDecoder(**pixel_decoder)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "tokenizer",
        use_l2_norm: bool | None = None,
        encoder_heads: int | None = None,
        decoder_heads: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "TiTok":
        """Open a published checkpoint of any size.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`.
            key: The config key that named it, for error messages.
            use_l2_norm: Shapes do not tell it; by default what config.json beside the checkpoint says, else what is
                published: in two-stage models alone.
            encoder_heads: Shapes do not tell them; by default the published 64 channels a head.
            decoder_heads: As `encoder_heads`.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        path = find_checkpoint(source, key=key)
        state = without_clash(read_checkpoint(path, key=key))
        arguments = titok_sizes(state, encoder_heads=encoder_heads, decoder_heads=decoder_heads)
        arguments |= published_norm(path, use_l2_norm=use_l2_norm)
        return build(cls, arguments, state, key=key, dropped=(UNUSED,), dtype=dtype)

    @property
    def codebook(self) -> Tensor:
        """Code vectors (K, D), unit vectors where `use_l2_norm`."""
        return self._normalised(self.quantizer.embedding.weight)

    def codebook_weight(self) -> Tensor:
        """See the base class: before it is normalised."""
        weight: Tensor = self.quantizer.embedding.weight
        return weight

    def _normalised(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.use_l2_norm else vectors

    def raw_latents(self, images: Tensor) -> Tensor:
        """Encoder outputs (B, L, D) before they are normalised."""
        self.check_images(images)
        encoded: Tensor = self.encoder(as_weights(images, self.encoder), self.latent_tokens)
        return encoded

    def latents(self, images: Tensor) -> Tensor:
        """See the base class; unit vectors where `use_l2_norm`, float32."""
        return self._normalised(widen(self.raw_latents(images)))

    def quantize(self, latents: Tensor) -> Tensor:
        """See the base class; by squared distance, the first of equals."""
        return nearest_code(latents, self.codebook)

    def embed_soft(self, probs: Tensor) -> Tensor:
        """The rows of the table are averaged as they are, then normalised where `use_l2_norm`: the published order."""
        return self._normalised(expected_embedding(probs, self.quantizer.embedding.weight))

    def proxy_logits(self, embeddings: Tensor) -> Tensor:
        """Two-stage models: logits over the codes of MaskGIT's VQGAN, (B, V, h, w), from code vectors (B, L, D)."""
        if not self.is_legacy:
            raise ValueError("tokenizer: expected a two-stage TiTok, got a single-stage one, which has no proxy codes")
        logits: Tensor = self.decoder(embeddings)
        return logits

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Images from code vectors before they are clamped to [0, 1].

        Raises:
            ValueError: If the model is of stage 1, which has no pixel decoder.
        """
        if not self.is_legacy:
            pixels: Tensor = self.decoder(embeddings)
            return pixels
        if self.config["pixel_decoder"] is None:
            raise ValueError("tokenizer: expected a TiTok with a pixel decoder, got one of stage 1, which has none")
        probs = probabilities(self.proxy_logits(embeddings).permute(0, 2, 3, 1))
        proxy = expected_embedding(probs, self.pixel_quantize.embedding.weight)
        images: Tensor = self.pixel_decoder(proxy.permute(0, 3, 1, 2))
        return images

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """See the base class."""
        return self.decode_raw(embeddings).clamp(0, 1)


def titok_sizes(state: Mapping[str, Tensor], *, encoder_heads: int | None, decoder_heads: int | None) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    needed = ("encoder.patch_embed.weight", "encoder.positional_embedding", "decoder.positional_embedding")
    if not all(name in state for name in (*needed, "quantizer.embedding.weight", "latent_tokens")):
        return {}
    patch = state["encoder.patch_embed.weight"].shape[-1]
    image_size = patch * math.isqrt(state["encoder.positional_embedding"].shape[0] - 1)
    decoder_grid = math.isqrt(state["decoder.positional_embedding"].shape[0] - 1)
    two_stage = "decoder.ffn.2.weight" in state
    pixels = pixel_decoder_sizes(state, prefix="pixel_decoder.") or None
    codes, dim = state["quantizer.embedding.weight"].shape
    return {
        "image_size": image_size,
        "codebook_size": codes,
        "token_size": dim,
        "num_latent_tokens": state["latent_tokens"].shape[0],
        "use_l2_norm": two_stage,
        "encoder": vit_sizes(state, "encoder.", heads=encoder_heads, patch_size=patch),
        "decoder": vit_sizes(state, "decoder.", heads=decoder_heads, patch_size=image_size // decoder_grid),
        "is_legacy": two_stage,
        "pixel_decoder": pixels,
        "proxy_codebook_size": state["decoder.ffn.2.weight"].shape[0] if two_stage else 1024,
    }


def published_norm(path: Path, *, use_l2_norm: bool | None) -> dict[str, bool]:
    """The constructor's `use_l2_norm` as it is given, or as config.json beside the checkpoint has it, or nothing."""
    given = published_settings(path, "vq_model").get("use_l2_norm") if use_l2_norm is None else use_l2_norm
    return {} if given is None else {"use_l2_norm": given}


def vit_sizes(state: Mapping[str, Tensor], prefix: str, *, heads: int | None, patch_size: int) -> dict[str, int]:
    """`width`, `depth`, `heads` and `patch_size` of the ViT whose tensors have this prefix; heads of 64 if None."""
    width = state[f"{prefix}ln_pre.weight"].shape[0]
    depth = 0
    while f"{prefix}transformer.{depth}.ln_1.weight" in state:
        depth += 1
    return {"width": width, "depth": depth, "heads": heads or max(1, width // 64), "patch_size": patch_size}
