"""What Meissonic has around its blocks, and the sizes that go together.

Shape legend: B batch, H and W rows and columns of tokens, K codes, D width, h and w of the grid that the blocks see.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.models.mmdit import RMSNorm, frequencies

SoftPlacement = Literal["lookup", "post_embed"]

SINUSOID = 256
MICRO = 5  # numbers that the model is told of an image


def sinusoid(values: Tensor, width: int = SINUSOID) -> Tensor:
    """Cosines, then sines, (..., width) of numbers (...), in float32 in the published order of operations.

    Arguments go up to 1e6 where a timestep is given: another order moves logits by 1e-2.
    """
    angles = values.float().unsqueeze(-1) * frequencies(width // 2, period=10000.0, device=values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotation_angles(grid: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Angles (h w, sum(axes) / 2), float64, of a grid's positions (0, row, column), one axis after the other."""
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    places = (torch.zeros_like(rows), rows, columns)
    angles = [
        place.reshape(-1, 1) * 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        for place, width in zip(places, axes, strict=True)
    ]
    return torch.cat(angles, dim=-1)


class TwoLayers(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, before: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(before, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., before) to (..., width)."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeText(nn.Module):
    """The sum of what the timestep, with `guided` the scale of a distilled guidance, and the text say, (B, D)."""

    def __init__(self, width: int, *, guided: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(SINUSOID, width)
        if guided:
            self.guidance_embedder = TwoLayers(SINUSOID, width)
        self.text_embedder = TwoLayers(width, width)

    def forward(self, time: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Of sinusoids (1 or B, 256) and vectors (B, D)."""
        told: Tensor = self.timestep_embedder(time)
        if guidance is not None:
            told = told + self.guidance_embedder(guidance)
        out: Tensor = told + self.text_embedder(text)
        return out


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of 1x1 without bias on (..., channels)."""
    return F.linear(x, conv.weight.flatten(1))


class TokenEmbedding(nn.Module):
    """A table of tokens, and the norm and projection that its rows go through."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(rows, width)
        self.layer_norm = RMSNorm(width)
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """What becomes of rows (..., D) of the table."""
        return _pointwise(self.conv, self.layer_norm(rows))


class Downsample(nn.Module):
    """2x2 tokens to one position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.Conv2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to (B, H/2, W/2, D)."""
        out: Tensor = self.conv(self.norm(x).permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class Upsample(nn.Module):
    """One position to 2x2 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H/2, W/2, D) to (B, H, W, D)."""
        out: Tensor = self.conv(self.norm(x).permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class TokenHead(nn.Module):
    """Logits over the codes."""

    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.layer_norm = RMSNorm(width)
        self.conv2 = nn.Conv2d(width, codes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., K)."""
        return _pointwise(self.conv2, self.layer_norm(_pointwise(self.conv1, x)))


def check_sizes(config: dict[str, Any], *, width: int) -> None:
    """Refuse arguments of `Meissonic` that do not fit each other, naming one."""
    grid, factor = config["grid"], 2 if config["downsample"] else 1
    if len(grid) != 2 or any(size < factor or size % factor for size in grid):
        expected = "two even numbers, since it downsamples" if factor == 2 else "two numbers of at least 1"
        raise ValueError(f"model.grid: expected {expected}, got {grid}")
    head, axes = config["attention_head_dim"], config["axes_dims_rope"]
    if len(axes) != 3 or sum(axes) != head or any(size % 2 or size < 0 for size in axes):
        raise ValueError(f"model.axes_dims_rope: expected three even numbers that sum to {head}, got {axes}")
    if config["pooled_projection_dim"] != width:
        got = config["pooled_projection_dim"]
        raise ValueError(f"model.pooled_projection_dim: expected the width {width}, got {got}")
    if config["soft_placement"] not in get_args(SoftPlacement):
        raise ValueError(f"model.soft_placement: expected lookup or post_embed, got {config['soft_placement']!r}")
    if config["vocab_size"] <= config["codebook_size"]:
        codes = config["codebook_size"]
        raise ValueError(f"model.vocab_size: expected more than the {codes} codes, got {config['vocab_size']}")
    if len(config["micro_conditions"]) != MICRO:
        raise ValueError(f"model.micro_conditions: expected {MICRO} numbers, got {config['micro_conditions']}")


def sizes_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    norm = "transformer_blocks.0.attn.norm_q.weight"
    names = ("embedder.embeddings.weight", "context_embedder.weight", "mlm_layer.conv2.weight")
    heads = norm if norm in state else "single_transformer_blocks.0.attn.norm_q.weight"
    if not all(name in state for name in (*names, heads)):
        return {}
    table, context, head = (state[name] for name in names)
    channels = state[heads].shape[0]

    def count(pattern: str) -> int:
        return next(index for index in range(len(state)) if pattern.format(index) not in state)

    return {
        "num_layers": count("transformer_blocks.{}.norm1.linear.weight"),
        "num_single_layers": count("single_transformer_blocks.{}.norm.linear.weight"),
        "attention_head_dim": channels,
        "num_attention_heads": table.shape[1] // channels,
        "joint_attention_dim": context.shape[1],
        "vocab_size": table.shape[0],
        "codebook_size": head.shape[0],
        "downsample": "down_block.downsample.conv.weight" in state,
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in state,
    }
