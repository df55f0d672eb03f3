"""Drawing codes from logits, with injectable noise.

Shape legend: B batch, N sites, K codes.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from softgen.relaxation import gumbel_noise, probabilities

Draw = Literal["inverse_cdf", "gumbel"]


class UniformSource(Protocol):
    """Where samplers take their noise from: `softgen.random.SampleRandom`, or stored draws."""

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), shape (B, *shape)."""
        ...


class StoredNoise:
    """Replays uniform draws in the order of the calls, to reproduce another implementation's samples.

    Args:
        draws: Tensors of shape (B, ...), one a call.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        self._draws = list(draws)

    def uniform(self, *shape: int) -> Tensor:
        """The next stored draw.

        Raises:
            ValueError: If none is left, or its shape is another.
        """
        wanted = f"({', '.join(['B', *map(str, shape)])})"
        if not self._draws:
            raise ValueError(f"noise: expected one more stored draw of shape {wanted}, got none")
        draw = self._draws.pop(0)
        if draw.shape[1:] != shape:
            raise ValueError(f"noise: expected a stored draw of shape {wanted}, got {tuple(draw.shape)}")
        return draw


def check_token_range(tokens: Tensor, highest: int, *, key: str = "tokens") -> None:
    """Refuse ids outside 0..highest. On the CPU alone: elsewhere the answer would stall the device.

    Raises:
        ValueError: Naming the range and the offending id.
    """
    if tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > highest:
        raise ValueError(f"{key}: expected ids in 0..{highest}, got {low if low < 0 else high}")


def sample_categorical(
    logits: Tensor, noise: UniformSource, *, temperature: float = 1.0, draw: Draw = "inverse_cdf"
) -> Tensor:
    """Draw one code a site.

    Args:
        logits: (B, N, K).
        noise: Gives N uniforms a sample for `inverse_cdf`, N K for `gumbel` (as several published samplers do).
        temperature: Divides the logits; 0 takes the likeliest code and draws nothing.
        draw: The method.

    Returns:
        Tokens (B, N), int64.

    Raises:
        ValueError: If the method is unknown or the temperature negative.
    """
    if draw not in get_args(Draw):
        raise ValueError(f"draw: expected one of {', '.join(get_args(Draw))}, got {draw!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    if draw == "gumbel":
        scaled = logits.float() / temperature
        return (scaled + gumbel_noise(noise.uniform(*logits.shape[1:]))).argmax(dim=-1)
    return invert_cdf(probabilities(logits, temperature=temperature), noise.uniform(*logits.shape[1:-1]))


def invert_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Codes whose cumulative probability first exceeds the uniform draw.

    Args:
        probs: (B, N, K), float32; need not sum to exactly 1.
        uniform: (B, N) in [0, 1).

    Returns:
        Tokens (B, N), int64 in [0, K).
    """
    cumulative = probs.cumsum(dim=-1)
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return index.clamp_(max=probs.shape[-1] - 1)
