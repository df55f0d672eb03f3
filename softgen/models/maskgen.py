"""MaskGen-VQ (arXiv 2501.07730): masked text-to-image transformers over TA-TiTok's tokens.

Shape legend: B batch, N tokens, K codes, d width, T text tokens, c width of their states and of the pooled text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softgen.categorical import check_token_range
from softgen.checkpoints import build, find_checkpoint, published_settings, read_checkpoint
from softgen.devices import float_numbers
from softgen.models.base import ModelOutput
from softgen.models.blocks import modulate
from softgen.models.conditions import Condition
from softgen.models.mmdit import AdaptiveChunks, JointBlock, frequencies, layer_norm
from softgen.models.pretrained_text import openai_clip_text
from softgen.models.prompted import PromptedModel
from softgen.models.text import TextEncoder
from softgen.relaxation import expected_embedding

PUBLISHED_TEXT_ENCODER = "openai/clip-vit-large-patch14-336"
_PUBLISHED_TEXT: dict[str, Any] = {"length": 77, "width": 768, "pooled_width": 768}
_SCORE_SCALE, _MAX_PERIOD = 100.0, 1000.0


def score_sinusoid(scores: Tensor, width: int) -> Tensor:
    """Sines, then cosines, (B, width) of 100 times the scores (B,), in float32; the longest period is near 1000."""
    scaled = (_SCORE_SCALE * scores.float()).unsqueeze(-1)
    angles = scaled * frequencies(width // 2, period=_MAX_PERIOD, device=scores.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class MaskGen(PromptedModel):
    """A multi-modal transformer over text states and one-dimensional image tokens. The defaults are those of MaskGen-L.

    One table holds the codes, the mask, and rows that are left over from classes. XL has d 1280, 20 blocks, 16 heads.

    Args:
        codebook_size: K.
        num_latent_tokens: N.
        decoder_embed_dim: d.
        decoder_depth: Number of blocks.
        decoder_num_heads: Attention heads; divides d.
        text_embed_dim: c.
        micro_condition: Whether the model is told an aesthetic score.
        micro_condition_embed_dim: Width of the score's sinusoid, even.
        condition_num_classes: Left-over rows of the table, less one.
        weight_tying: Whether the output layer is the table; else it is one of its own, with a bias.
        aesthetic_score: That it is told by default; 6.5 in the published samples.
        text_encoder: Reads the prompts; its states are those before the last layer.
        negative_prompt: The unconditional prompt; empty, as it was trained.
        negative_length: Text tokens of a stored negative prompt; 0 for none.
        checkpoint_activations: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 8192,
        num_latent_tokens: int = 128,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        text_embed_dim: int = 768,
        micro_condition: bool = True,
        micro_condition_embed_dim: int = 256,
        condition_num_classes: int = 1000,
        weight_tying: bool = True,
        aesthetic_score: float = 6.0,
        text_encoder: TextEncoder | None = None,
        negative_prompt: str = "",
        negative_length: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        if decoder_num_heads < 1 or decoder_embed_dim % decoder_num_heads:
            raise ValueError(
                f"model.decoder_num_heads: expected a divisor of the width {decoder_embed_dim}, got {decoder_num_heads}"
            )
        if micro_condition_embed_dim < 2 or micro_condition_embed_dim % 2:
            raise ValueError(
                f"model.micro_condition_embed_dim: expected an even number above 0, got {micro_condition_embed_dim}"
            )
        super().__init__(
            text_encoder=text_encoder,
            negative_prompt=negative_prompt,
            negative_length=negative_length,
            states_width=text_embed_dim,
            pooled_width=text_embed_dim,
        )
        self.config = {
            "codebook_size": codebook_size,
            "num_latent_tokens": num_latent_tokens,
            "decoder_embed_dim": decoder_embed_dim,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "text_embed_dim": text_embed_dim,
            "micro_condition": micro_condition,
            "micro_condition_embed_dim": micro_condition_embed_dim,
            "condition_num_classes": condition_num_classes,
            "weight_tying": weight_tying,
            "aesthetic_score": aesthetic_score,
            "text_encoder": text_encoder,
            "negative_prompt": negative_prompt,
            "negative_length": negative_length,
            "checkpoint_activations": checkpoint_activations,
        }
        self.num_codes = self.mask_id = codebook_size
        self.num_sites = self.num_tokens = num_latent_tokens
        self.embedding_dim, self.num_layers = decoder_embed_dim, decoder_depth
        self.micro_condition, self.micro_width = micro_condition, micro_condition_embed_dim
        self.aesthetic_score = float(aesthetic_score)
        self.checkpoint_activations = checkpoint_activations

        width = decoder_embed_dim
        self.text_embed_proj = nn.Linear(text_embed_dim, width)
        told = text_embed_dim + (micro_condition_embed_dim if micro_condition else 0)
        self.cond_pooled_proj = nn.Linear(told, width)
        self.embeddings = nn.Embedding(codebook_size + 1 + condition_num_classes + 1, width)
        self.pos_embed = nn.Parameter(torch.empty(1, num_latent_tokens, width))
        self.blocks = nn.ModuleList(
            JointBlock(width, heads=decoder_num_heads, last=index == decoder_depth - 1)
            for index in range(decoder_depth)
        )
        self.norm = AdaptiveChunks(width, chunks=2)
        if not weight_tying:
            self.lm_head = nn.Linear(width, codebook_size)
        for weight in (self.embeddings.weight, self.pos_embed):
            nn.init.trunc_normal_(weight, std=0.02)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "model",
        decoder_num_heads: int | None = None,
        condition_num_classes: int = 1000,
        aesthetic_score: float | None = None,
        text_encoder: TextEncoder | str | None = None,
        negative_prompt: str = "",
        checkpoint_activations: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "MaskGen":
        """Open a published checkpoint of any size.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`. The table may be in it under its own
                name, that of the output layer, or both.
            key: The config key that named it, for error messages.
            decoder_num_heads: Shapes do not tell it; by default what config.json beside the checkpoint says, else the
                published 16.
            condition_num_classes: As of the class; the other rows of the table are the codes and the mask.
            aesthetic_score: By default what config.json beside the checkpoint says, else 6.
            text_encoder: Its folder or hub id, of transformers, or of open_clip with its prefix; by default, for sizes
                of the published ones, theirs, opened when it is first needed.
            negative_prompt: As of the class.
            checkpoint_activations: As of the class.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family, or the options contradict it.
        """
        path = find_checkpoint(source, key=key)
        told = published_settings(path, "maskgen")
        state = _one_table(read_checkpoint(path, key=key))
        arguments = _sizes(state, condition_num_classes=condition_num_classes, key=key)
        arguments |= {
            "decoder_num_heads": told.get("decoder_num_heads", 16) if decoder_num_heads is None else decoder_num_heads,
            "aesthetic_score": told.get("sample_aesthetic_score", 6.0) if aesthetic_score is None else aesthetic_score,
            "text_encoder": _open_text(text_encoder, arguments.get("text_embed_dim")),
            "negative_prompt": negative_prompt,
            "checkpoint_activations": checkpoint_activations,
        }
        return build(cls, arguments, state, key=key, dtype=dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class."""
        check_token_range(tokens, self.mask_id)
        embedded: Tensor = self.embeddings(tokens)
        return embedded

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the base class."""
        table = self.embeddings.weight
        soft = expected_embedding(probs, table[: self.num_codes])
        return soft if mask is None else torch.where(mask.unsqueeze(-1), table[self.mask_id], soft)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """The table, which with tied weights is the output layer too."""
        return self.embeddings.parameters()

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """See the base class."""
        return self.predict(embeddings, condition, taps=taps)

    def predict(
        self,
        embeddings: Tensor,
        condition: Condition,
        *,
        aesthetic_score: Tensor | float | None = None,
        taps: Sequence[int] = (),
    ) -> ModelOutput:
        """As `forward`, with what else the network can be told.

        Args:
            embeddings: (B, N, d).
            condition: B samples.
            aesthetic_score: A number, or (B,); by default the constructor's. Ignored without `micro_condition`.
            taps: Layers.
        """
        states, pooled = self.read(condition)
        dtype = self.text_embed_proj.weight.dtype
        told = self._told(pooled.to(dtype), aesthetic_score)
        context = self.text_embed_proj(states.to(dtype))
        x, hidden = embeddings + self.pos_embed, {}
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, told, use_reentrant=False)
            else:
                x, context = block(x, context, told)
            if layer in taps:
                hidden[layer] = x
        scale, shift = self.norm(told)
        x = modulate(layer_norm(x), shift=shift, scale=scale)
        logits = (
            nn.functional.linear(x, self.embeddings.weight[: self.num_codes])
            if self.config["weight_tying"]
            else self.lm_head(x)
        )
        return ModelOutput(logits=logits, hidden=tuple(hidden[tap] for tap in taps))

    def _told(self, pooled: Tensor, aesthetic_score: Tensor | float | None) -> Tensor:
        """What modulates the blocks, (B, d)."""
        if self.micro_condition:
            given = self.aesthetic_score if aesthetic_score is None else aesthetic_score
            scores = float_numbers(given, pooled.device).expand(len(pooled))
            pooled = torch.cat([pooled, score_sinusoid(scores, self.micro_width).to(pooled.dtype)], dim=-1)
        told: Tensor = self.cond_pooled_proj(pooled)
        return told


def _one_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied table under one name: published files have it twice, and safetensors under either."""
    if "lm_head.bias" in state or "lm_head.weight" not in state:
        return state
    head = state["lm_head.weight"]
    return {"embeddings.weight": head, **{name: value for name, value in state.items() if name != "lm_head.weight"}}


def _open_text(text_encoder: TextEncoder | str | None, width: int | None) -> TextEncoder | None:
    if isinstance(text_encoder, str):
        return openai_clip_text(text_encoder, layer=-2)
    if text_encoder is None and width == _PUBLISHED_TEXT["width"]:
        return openai_clip_text(PUBLISHED_TEXT_ENCODER, layer=-2, **_PUBLISHED_TEXT)
    return text_encoder


def _sizes(state: dict[str, Tensor], *, condition_num_classes: int, key: str) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    names = ("embeddings.weight", "pos_embed", "text_embed_proj.weight", "cond_pooled_proj.weight")
    if not all(name in state for name in names):
        return {"condition_num_classes": condition_num_classes}
    table, positions, text, pooled = (state[name] for name in names)
    codes = table.shape[0] - condition_num_classes - 2
    if codes < 1:
        raise ValueError(
            f"{key}.condition_num_classes: expected fewer than the {table.shape[0]} rows of the table, "
            f"got {condition_num_classes}"
        )
    micro = pooled.shape[1] - text.shape[1]
    sizes = {
        "codebook_size": codes,
        "num_latent_tokens": positions.shape[1],
        "decoder_embed_dim": table.shape[1],
        "decoder_depth": next(n for n in range(len(state)) if f"blocks.{n}.norm1.linear.weight" not in state),
        "text_embed_dim": text.shape[1],
        "micro_condition": micro > 0,
        "condition_num_classes": condition_num_classes,
        "weight_tying": "lm_head.bias" not in state,
    }
    return sizes | ({"micro_condition_embed_dim": micro} if micro > 0 else {})
