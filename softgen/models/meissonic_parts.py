"""What Meissonic has around its blocks.

Shape legend: B batch, H and W rows and columns of tokens, K codes, D width, h and w of the grid that the blocks see.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.models.mmdit import RMSNorm, frequencies

SINUSOID = 256


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
    """The sum of what the timestep and the text say, (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(SINUSOID, width)
        self.text_embedder = TwoLayers(width, width)

    def forward(self, time: Tensor, text: Tensor) -> Tensor:
        """Of sinusoids (1 or B, 256) and vectors (B, D)."""
        out: Tensor = self.timestep_embedder(time) + self.text_embedder(text)
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
