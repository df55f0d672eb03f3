"""Meissonic (arXiv 2410.08261), and Monetico, its sibling at 512 pixels: masked text-to-image transformers.

Shape legend: B batch, H and W rows and columns of tokens, N = H W, K codes, D width, T text tokens, J width of their
states, P image positions in the blocks: N / 4 where they are downsampled, else N.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softgen.categorical import check_token_range
from softgen.checkpoints import build, diffusers_names, find_checkpoint, read_checkpoint, settings_beside
from softgen.devices import float_numbers
from softgen.models.base import ModelOutput
from softgen.models.conditions import Condition
from softgen.models.meissonic_parts import (
    MICRO,
    SINUSOID,
    Downsample,
    SoftPlacement,
    TimeText,
    TokenEmbedding,
    TokenHead,
    TwoLayers,
    Upsample,
    check_sizes,
    rotation_angles,
    sinusoid,
    sizes_of,
)
from softgen.models.mmdit import JointBlock, RMSNorm, Rotation, SingleBlock
from softgen.models.pretrained_text import PretrainedTextEncoder
from softgen.models.prompted import PromptedModel
from softgen.models.text import TextEncoder
from softgen.relaxation import expected_embedding

PUBLISHED_NEGATIVE_PROMPT = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg artifacts, "
    "signature, sketch, duplicate, ugly, identifying mark"
)

_PUBLISHED = "MeissonFlow/Meissonic"
_PUBLISHED_TEXT: dict[str, Any] = {"length": 77, "width": 1024, "pooled_width": 1024}
_PIXELS = 16  # a side of a token, of its tokenizer


class Meissonic(PromptedModel):
    """A multi-modal transformer over text states and image tokens. The defaults are those of the 1024-pixel model.

    The vectors that it takes are those that leave its embedding, a normalised and projected row of the table; noise on
    embeddings enters there, as Di[M]O's authors have it. With `downsample` the blocks see 2x2 tokens as one position;
    tapped hidden states are repeated, so that each token has that of its position.

    Args:
        grid: Rows and columns of tokens, even with `downsample`.
        num_layers: Blocks with a stream each for text and image.
        num_single_layers: Blocks with one stream, after those.
        attention_head_dim: Channels of a head.
        num_attention_heads: Heads; D is their product.
        joint_attention_dim: J, of the text states.
        pooled_projection_dim: Width of the pooled text; D, by default and in all published models.
        axes_dims_rope: Channels of a head that turn with a constant, the row and the column; their sum is the head's.
        vocab_size: Rows of the table; the last one is the mask.
        codebook_size: K, the first rows of the table.
        downsample: Whether the blocks see every 2x2 tokens as one position, as at 1024 pixels.
        guidance_embeds: Whether the model is told a scale of guidance, which no published one is.
        soft_placement: Where expected embeddings are taken: at the `lookup`, before its norm, or `post_embed`, of the
            vectors that leave the embedding.
        timestep: That the model is told by default, multiplied by 1000 inside; Di[M]O's authors pass 0.
        guidance_scale: That it is told by default with `guidance_embeds`, multiplied by 1000 inside.
        micro_conditions: Width, height, crop top, crop left in pixels, aesthetic score, that it is told by default;
            without them those of uncropped images of this size, score 6.
        text_encoder: Reads the prompts; its states are those before the last layer.
        negative_prompt: The unconditional prompt.
        negative_length: Text tokens of a stored negative prompt; 0 for none.
        checkpoint_activations: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        grid: Sequence[int] = (64, 64),
        num_layers: int = 14,
        num_single_layers: int = 28,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        pooled_projection_dim: int | None = None,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        vocab_size: int = 8256,
        codebook_size: int = 8192,
        downsample: bool = True,
        guidance_embeds: bool = False,
        soft_placement: SoftPlacement = "lookup",
        timestep: float = 0.0,
        guidance_scale: float = 1.0,
        micro_conditions: Sequence[float] | None = None,
        text_encoder: TextEncoder | None = None,
        negative_prompt: str = "",
        negative_length: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        width = attention_head_dim * num_attention_heads
        micro = [grid[-1] * _PIXELS, grid[0] * _PIXELS, 0, 0, 6] if micro_conditions is None else list(micro_conditions)
        config = {
            "grid": list(grid),
            "num_layers": num_layers,
            "num_single_layers": num_single_layers,
            "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads,
            "joint_attention_dim": joint_attention_dim,
            "pooled_projection_dim": width if pooled_projection_dim is None else pooled_projection_dim,
            "axes_dims_rope": list(axes_dims_rope),
            "vocab_size": vocab_size,
            "codebook_size": codebook_size,
            "downsample": downsample,
            "guidance_embeds": guidance_embeds,
            "soft_placement": soft_placement,
            "timestep": timestep,
            "guidance_scale": guidance_scale,
            "micro_conditions": micro,
            "text_encoder": text_encoder,
            "negative_prompt": negative_prompt,
            "negative_length": negative_length,
            "checkpoint_activations": checkpoint_activations,
        }
        check_sizes(config, width=width)
        super().__init__(
            text_encoder=text_encoder,
            negative_prompt=negative_prompt,
            negative_length=negative_length,
            states_width=joint_attention_dim,
            pooled_width=width,
        )
        self.config = config
        self.grid = (grid[0], grid[1])
        self.num_codes, self.mask_id = codebook_size, vocab_size - 1
        self.num_sites = self.num_tokens = grid[0] * grid[1]
        self.embedding_dim, self.num_layers = width, num_layers + num_single_layers
        self.downsample, self.soft_placement = downsample, soft_placement
        self.timestep, self.micro_conditions = float(timestep), tuple(float(value) for value in micro)
        self.guidance_embeds, self.guidance_scale = guidance_embeds, float(guidance_scale)
        self.checkpoint_activations = checkpoint_activations
        self._rotations: dict[tuple[int, torch.device], Rotation] = {}

        # To embed is what the model does: its module has another name than in the checkpoints.
        self.embedder = TokenEmbedding(vocab_size, width)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.encoder_proj_layer_norm = RMSNorm(width)
        self.cond_embed = TwoLayers(MICRO * SINUSOID + width, width, bias=False)
        self.time_text_embed = TimeText(width, guided=guidance_embeds)
        if downsample:
            self.down_block = nn.ModuleDict({"downsample": Downsample(width)})
            self.up_block = nn.ModuleDict({"upsample": Upsample(width)})
        self.project_to_hidden_norm = RMSNorm(width)
        self.project_to_hidden = nn.Linear(width, width, bias=False)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(width, heads=num_attention_heads, qk_norm=True) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads=num_attention_heads) for _ in range(num_single_layers)
        )
        self.project_from_hidden_norm = RMSNorm(width)
        self.project_from_hidden = nn.Linear(width, width, bias=False)
        self.mlm_layer = TokenHead(width, codebook_size)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "model",
        grid: Sequence[int] | None = None,
        axes_dims_rope: Sequence[int] | None = None,
        codebook_size: int | None = None,
        soft_placement: SoftPlacement = "lookup",
        timestep: float = 0.0,
        guidance_scale: float = 1.0,
        micro_conditions: Sequence[float] | None = None,
        text_encoder: TextEncoder | str | None = None,
        negative_prompt: str = PUBLISHED_NEGATIVE_PROMPT,
        checkpoint_activations: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "Meissonic":
        """Open a published checkpoint, or a student of Di[M]O's authors, which has the same layout.

        Args:
            source: A diffusers folder or hub id, its subfolder `transformer`, or a file.
            key: The config key that named it, for error messages.
            grid: Rows and columns of tokens: by default 64 x 64 where the model downsamples, else 32 x 32.
            axes_dims_rope: Shapes do not tell them; by default those of the config.json beside the weights, else 16,
                56, 56.
            codebook_size: Checked against the checkpoint, which tells it.
            soft_placement: As of the class.
            timestep: As of the class.
            guidance_scale: As of the class.
            micro_conditions: As of the class.
            text_encoder: Its folder or hub id; by default that of the source, in `text_encoder` and `tokenizer`, else
                for sizes of the published model the one in its hub repository, opened when it is first needed.
            negative_prompt: As of the class; by default the published one.
            checkpoint_activations: As of the class.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family, or the options contradict it.
        """
        path = find_checkpoint(source, key=key, names=diffusers_names("transformer"))
        state = _renamed(read_checkpoint(path, key=key))
        arguments = sizes_of(state)
        if codebook_size is not None and arguments.get("codebook_size", codebook_size) != codebook_size:
            expected = arguments["codebook_size"]
            raise ValueError(f"{key}.codebook_size: expected {expected} as the checkpoint, got {codebook_size}")
        axes = axes_dims_rope or settings_beside(path).get("axes_dims_rope")
        side = 64 if arguments.get("downsample", True) else 32
        arguments |= {
            "grid": [side, side] if grid is None else list(grid),
            "soft_placement": soft_placement,
            "timestep": timestep,
            "guidance_scale": guidance_scale,
            "micro_conditions": micro_conditions,
            "text_encoder": _open_text(source, path, text_encoder, state),
            "negative_prompt": negative_prompt,
            "checkpoint_activations": checkpoint_activations,
        }
        if axes is not None:
            arguments["axes_dims_rope"] = list(axes)
        return build(cls, arguments, state, key=key, dtype=dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class; rows between the codes and the mask are unused."""
        check_token_range(tokens, self.mask_id)
        embedded: Tensor = self.embedder(self.embedder.embeddings(tokens))
        return embedded

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the base class; the placement is that of the constructor."""
        table = self.embedder.embeddings.weight
        codes, masked = table[: self.num_codes], table[self.mask_id]
        if self.soft_placement == "post_embed":
            codes, masked = self.embedder(codes), self.embedder(masked)
        soft = expected_embedding(probs, codes)
        if mask is not None:
            soft = torch.where(mask.unsqueeze(-1), masked, soft)
        placed: Tensor = soft if self.soft_placement == "post_embed" else self.embedder(soft)
        return placed

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """What Di[M]O's authors keep frozen: the embedding and the output layer."""
        return [*self.embedder.parameters(), *self.mlm_layer.parameters()]

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """See the base class."""
        return self.predict(embeddings, condition, taps=taps)

    def predict(
        self,
        embeddings: Tensor,
        condition: Condition,
        *,
        timestep: Tensor | float | None = None,
        guidance_scale: Tensor | float | None = None,
        micro_conditions: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> ModelOutput:
        """As `forward`, with what else the network can be told.

        Args:
            embeddings: (B, N, D).
            condition: B samples.
            timestep: Multiplied by 1000 inside: a number, or (1,), or (B,). The published sampler passes the steps that
                are left, training passed 1000 times the share of masks.
            guidance_scale: As the timestep; ignored without `guidance_embeds`.
            micro_conditions: Width, height, crop top, crop left, aesthetic score, (B, 5).
            taps: Layers, those with two streams first.
        """
        states, pooled = self.read(condition)
        dtype = self.project_to_hidden.weight.dtype
        told = self._told(
            pooled.to(dtype), timestep=timestep, guidance_scale=guidance_scale, micro_conditions=micro_conditions
        )
        context = self.encoder_proj_layer_norm(self.context_embedder(states.to(dtype)))
        x = embeddings.unflatten(1, self.grid)  # type: ignore[no-untyped-call]
        if self.downsample:
            x = self.down_block["downsample"](x)
        side = x.shape[1:3]
        x = self.project_to_hidden(self.project_to_hidden_norm(x.flatten(1, 2)))
        x, hidden = self._blocks(x, context, told, taps)
        x = self.project_from_hidden(self.project_from_hidden_norm(x)).unflatten(1, side)
        if self.downsample:
            x = self.up_block["upsample"](x)
        spread = tuple(self._spread(hidden[tap], side) for tap in taps)
        return ModelOutput(logits=self.mlm_layer(x.flatten(1, 2)), hidden=spread)

    def rotation(self, text_length: int, device: torch.device) -> Rotation:
        """Of text, which does not turn, and the image positions after it."""
        found = self._rotations.get((text_length, device))
        if found is None:
            grid = [size // 2 for size in self.grid] if self.downsample else self.grid
            # Kept for training too, where tensors made in inference mode cannot enter.
            with torch.inference_mode(mode=False), torch.device("cpu"):
                angles = F.pad(rotation_angles(grid, self.config["axes_dims_rope"]), (0, 0, text_length, 0))
                angles = angles.repeat_interleave(2, dim=-1)
                found = Rotation(angles.cos().float().to(device), angles.sin().float().to(device))
            self._rotations[text_length, device] = found
        return found

    def _told(
        self,
        pooled: Tensor,
        *,
        timestep: Tensor | float | None,
        guidance_scale: Tensor | float | None,
        micro_conditions: Tensor | None,
    ) -> Tensor:
        """What modulates the blocks, (B, D)."""
        if micro_conditions is None:
            told_by_default = [float_numbers(number, pooled.device) for number in self.micro_conditions]
            micro_conditions = torch.cat(told_by_default).expand(len(pooled), -1)
        micro = sinusoid(micro_conditions).flatten(1).to(pooled.dtype)
        time = _numbers(self.timestep if timestep is None else timestep, pooled)
        scale = None
        if self.guidance_embeds:
            scale = _numbers(self.guidance_scale if guidance_scale is None else guidance_scale, pooled)
        told: Tensor = self.time_text_embed(time, self.cond_embed(torch.cat([pooled, micro], dim=-1)), scale)
        return told

    def _blocks(
        self, x: Tensor, context: Tensor, told: Tensor, taps: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Last and tapped states (B, P, D)."""
        length, hidden = context.shape[1], {}
        rotation = self.rotation(length, x.device)
        for layer, block in enumerate(self.transformer_blocks):
            x, context = self._step(block, x, context, told, rotation)
            if layer in taps:
                hidden[layer] = x
        joined = torch.cat([context, x], dim=1)
        for layer, block in enumerate(self.single_transformer_blocks, start=len(self.transformer_blocks)):
            joined = self._step(block, joined, told, rotation)
            if layer in taps:
                hidden[layer] = joined[:, length:]
        return joined[:, length:], hidden

    def _step(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _spread(self, hidden: Tensor, side: Sequence[int]) -> Tensor:
        """States (B, N, D), one a token, of states (B, P, D), one a position."""
        if not self.downsample:
            return hidden
        grid = hidden.reshape(len(hidden), *side, -1)
        return grid.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)


def _numbers(given: Tensor | float, like: Tensor) -> Tensor:
    """Sinusoids (1 or B, 256) of 1000 times a number, (1,), or (B,)."""
    scaled = float_numbers(given, like.device) * 1000
    return sinusoid(scaled).to(like.dtype)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("embed.", "embedder.", 1) if name.startswith("embed.") else name: value
        for name, value in state.items()
    }


def _open_text(
    source: str | Path, path: Path, text_encoder: TextEncoder | str | None, state: dict[str, Tensor]
) -> TextEncoder | None:
    """The text encoder that is asked for, else the one beside the transformer, else the published one where it fits."""
    if isinstance(text_encoder, TextEncoder):
        return text_encoder
    common: dict[str, Any] = {"layer": -2, "attend_padding": True}
    if text_encoder is not None:
        return PretrainedTextEncoder(text_encoder, **common)
    root = path.parent.parent
    if path.parent.name == "transformer" and (root / "text_encoder" / "config.json").is_file():
        # Of a hub repository, only what was asked for is in its local folder.
        opened = str(root.resolve()) if Path(source).exists() else str(source)
        return PretrainedTextEncoder(opened, subfolder="text_encoder", **common)
    context = state.get("context_embedder.weight")
    if context is None or context.shape != (_PUBLISHED_TEXT["width"], _PUBLISHED_TEXT["pooled_width"]):
        return None
    return PretrainedTextEncoder(_PUBLISHED, subfolder="text_encoder", **common, **_PUBLISHED_TEXT)
