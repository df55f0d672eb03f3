"""TA-TiTok (arXiv 2501.07730): a single-stage TiTok whose decoder looks at the text.

Shape legend: B batch, L latent tokens, D code dimension, T text tokens, c width of their states.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softgen.checkpoints import build, find_checkpoint, read_checkpoint
from softgen.models.conditions import check_prompts
from softgen.models.pretrained_text import openai_clip_text
from softgen.models.text import TextEncoder
from softgen.tokenizers.parts import without_clash
from softgen.tokenizers.titok import UNUSED, TiTok, published_norm, titok_sizes

if TYPE_CHECKING:
    from softgen.models.conditions import Asked

PUBLISHED_TEXT_ENCODER = "openai/clip-vit-large-patch14-336"
_PUBLISHED_LENGTH, _PUBLISHED_WIDTH = 77, 768


class TATiTok(TiTok):
    """To decode, ask for `under(prompts)` first: the tokenizer as it decodes for them. The encoder sees no text.

    The defaults are those of BL-128.

    Args:
        image_size: Pixels a side; a multiple of both patch sizes.
        codebook_size: K.
        token_size: D.
        num_latent_tokens: L.
        use_l2_norm: Whether latents and codes are unit vectors.
        encoder: `width`, `depth`, `heads` and `patch_size` of the encoder.
        decoder: The same of the decoder.
        text_context_length: T.
        text_embed_dim: c.
        text_encoder: Reads the prompts; its states are those after the last layer and its norm.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        codebook_size: int = 8192,
        token_size: int = 64,
        num_latent_tokens: int = 128,
        use_l2_norm: bool = False,
        encoder: Mapping[str, int] | None = None,
        decoder: Mapping[str, int] | None = None,
        text_context_length: int = _PUBLISHED_LENGTH,
        text_embed_dim: int = _PUBLISHED_WIDTH,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        base = {"width": 768, "depth": 12, "heads": 12, "patch_size": 16}
        super().__init__(
            image_size=image_size,
            codebook_size=codebook_size,
            token_size=token_size,
            num_latent_tokens=num_latent_tokens,
            use_l2_norm=use_l2_norm,
            encoder={**base, **(encoder or {})},
            decoder={**(decoder or {}), "text_length": text_context_length, "text_width": text_embed_dim},
            is_legacy=False,
        )
        if text_encoder is not None:
            for name, expected in (("length", text_context_length), ("width", text_embed_dim)):
                got = getattr(text_encoder, name)
                if got != expected:
                    raise ValueError(
                        f"tokenizer.text_encoder.{name}: expected {expected} as the decoder has, got {got}"
                    )
        vit = ("width", "depth", "heads", "patch_size")
        self.config = {
            "image_size": image_size,
            "codebook_size": codebook_size,
            "token_size": token_size,
            "num_latent_tokens": num_latent_tokens,
            "use_l2_norm": use_l2_norm,
            "encoder": self.config["encoder"],
            "decoder": {name: self.config["decoder"][name] for name in vit},
            "text_context_length": text_context_length,
            "text_embed_dim": text_embed_dim,
            "text_encoder": text_encoder,
        }
        self.text = text_encoder
        self._states: Tensor | None = None

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
        text_encoder: TextEncoder | str | None = None,
    ) -> "TATiTok":
        """Open a published checkpoint of any size.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`.
            key: The config key that named it, for error messages.
            use_l2_norm: Shapes do not tell it; by default what config.json beside the checkpoint says, else False.
            encoder_heads: Shapes do not tell them; by default the published 64 channels a head.
            decoder_heads: As `encoder_heads`.
            dtype: Of the weights; None keeps the checkpoint's.
            text_encoder: Its folder or hub id, of transformers, or of open_clip with its prefix; by default, for sizes
                of the published ones, theirs, opened when it is first needed.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        path = find_checkpoint(source, key=key)
        state = without_clash(read_checkpoint(path, key=key))
        arguments = titok_sizes(state, encoder_heads=encoder_heads, decoder_heads=decoder_heads)
        for name in ("is_legacy", "pixel_decoder", "proxy_codebook_size"):
            arguments.pop(name, None)
        arguments |= published_norm(path, use_l2_norm=use_l2_norm)
        positions = state.get("decoder.text_guidance_positional_embedding")
        projection = state.get("decoder.text_guidance_proj.weight")
        if positions is not None and projection is not None:
            length, width = positions.shape[0], projection.shape[1]
            arguments |= {"text_context_length": length, "text_embed_dim": width}
            if text_encoder is None and (length, width) == (_PUBLISHED_LENGTH, _PUBLISHED_WIDTH):
                text_encoder = openai_clip_text(
                    PUBLISHED_TEXT_ENCODER, layer=-1, length=length, width=width, pooled_width=_PUBLISHED_WIDTH
                )
            elif isinstance(text_encoder, str):
                text_encoder = openai_clip_text(text_encoder, layer=-1)
            arguments["text_encoder"] = text_encoder
        return build(cls, arguments, state, key=key, dropped=(UNUSED,), dtype=dtype)

    def under(self, asked: "Asked") -> "TATiTok":
        """The tokenizer as it decodes for B prompts; it shares the weights.

        Raises:
            ValueError: Labels, a single text or none, or a tokenizer without a text encoder.
        """
        if isinstance(asked, Tensor):
            raise ValueError("tokenizer: expected prompts, since its decoder looks at the text, got class labels")
        if self.text is None:
            raise ValueError("tokenizer: expected one with a text encoder, got one whose decoder takes encoded prompts")
        check_prompts(asked, key="tokenizer")
        with torch.no_grad():
            return self.under_states(self.text(asked).states)

    def under_states(self, states: Tensor) -> "TATiTok":
        """The tokenizer as it decodes for encoded prompts (B, T, c).

        Raises:
            ValueError: If the states have another shape.
        """
        expected = (self.config["text_context_length"], self.config["text_embed_dim"])
        if states.ndim != 3 or states.shape[1:] != expected:
            raise ValueError(f"states: expected shape (B, {expected[0]}, {expected[1]}), got {tuple(states.shape)}")
        view = copy.copy(self)
        view._states = states
        return view

    def decode_raw(self, embeddings: Tensor) -> Tensor:
        """Images from code vectors before they are clamped to [0, 1].

        Raises:
            ValueError: If there is no text, or that of another number of images.
        """
        if self._states is None:
            raise ValueError("tokenizer: expected text to decode for, from tokenizer.under(prompts), got none")
        if len(self._states) != len(embeddings):
            raise ValueError(
                f"tokenizer: expected {len(self._states)} images as there are prompts, got {len(embeddings)}"
            )
        pixels: Tensor = self.decoder(embeddings, self._states)
        return pixels
