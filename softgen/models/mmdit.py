"""Blocks that look at text and image jointly (MM-DiT, arXiv 2403.03206), under the names of published checkpoints.

Shape legend: B batch, T text tokens, L image vectors, W width, h heads, c channels a head.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.models.blocks import modulate
from softgen.relaxation import widen

_EPS = 1e-6


class Rotation(NamedTuple):
    """Cosines and sines, (T + L, c) each, float32: neighbouring channels are a pair that is turned by one angle."""

    cos: Tensor
    sin: Tensor


@cache
def frequencies(half: int, *, period: float, device: torch.device) -> Tensor:
    """Of `half` pairs of a sinusoid, float32: from 1 down to nearly 1 / period.

    The float32 exponents are those of published models. Their exponential is rounded correctly, since that of libraries
    differs in the last bit from machine to machine, and arguments can be so large that it shows.
    """
    with torch.inference_mode(mode=False), torch.device("cpu"):
        exponent = -math.log(period) * torch.arange(half, dtype=torch.float32) / half
        return exponent.double().exp().float().to(device)


class RMSNorm(nn.Module):
    """x / rms(x) times a weight, computed in float32, over the last dimension.

    Args:
        width: Of the last dimension.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape and dtype."""
        wide = widen(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), _EPS).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """Without weights, over the last dimension, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


class AdaptiveChunks(nn.Module):
    """Shifts, scales and gates from the condition.

    Args:
        width: W.
        chunks: How many vectors of width W.
    """

    def __init__(self, width: int, *, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map (B, W) to `chunks` tensors (B, 1, W)."""
        made: Tensor = self.linear(F.silu(condition)).unsqueeze(1)
        return made.chunk(self.chunks, dim=-1)


class _Expand(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear; four times as wide inside.

    Args:
        width: W.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Expand(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, W) to the same shape."""
        out: Tensor = self.net(x)
        return out


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    wide = widen(x)
    pairs = wide.reshape(*wide.shape[:-1], -1, 2)
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (wide * rotation.cos + turned * rotation.sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> Tensor:
    """Attention of (B, h, S, c) to the same, as (B, S, h c); queries and keys turned first."""
    if rotation is not None:
        query, key = _rotated(query, rotation), _rotated(key, rotation)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class JointAttention(nn.Module):
    """Attention over [text, image], each with projections of its own.

    Args:
        width: W.
        heads: h; divides W.
        qk_norm: Whether queries and keys are normalised by head.
        context_out: Whether the text gets an output; the last block needs none.
    """

    def __init__(self, width: int, *, heads: int, qk_norm: bool, context_out: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))
        if context_out:
            self.to_add_out = nn.Linear(width, width)
        norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k") if qk_norm else ()
        for name in norms:
            setattr(self, name, RMSNorm(width // heads))

    def _heads(self, x: Tensor, projection: str, norm: str | None) -> Tensor:
        split: Tensor = getattr(self, projection)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return getattr(self, norm)(split) if norm is not None and hasattr(self, norm) else split

    def forward(self, x: Tensor, context: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor | None]:
        """Image (B, L, W) and text (B, T, W) to the same; no text where it gets no output."""
        query = torch.cat([self._heads(context, "add_q_proj", "norm_added_q"), self._heads(x, "to_q", "norm_q")], dim=2)
        key = torch.cat([self._heads(context, "add_k_proj", "norm_added_k"), self._heads(x, "to_k", "norm_k")], dim=2)
        value = torch.cat([self._heads(context, "add_v_proj", None), self._heads(x, "to_v", None)], dim=2)
        mixed = attend(query, key, value, rotation)
        length = context.shape[1]
        told = self.to_add_out(mixed[:, :length]) if hasattr(self, "to_add_out") else None
        return self.to_out(mixed[:, length:]), told


class JointBlock(nn.Module):
    """Attention over both streams and a feed-forward in each, all modulated by the condition.

    Args:
        width: W.
        heads: h; divides W.
        qk_norm: As of `JointAttention`.
        last: Whether the text ends here: it is looked at, and not updated.
    """

    def __init__(self, width: int, *, heads: int, qk_norm: bool = False, last: bool = False) -> None:
        super().__init__()
        self.norm1 = AdaptiveChunks(width, chunks=6)
        self.norm1_context = AdaptiveChunks(width, chunks=2 if last else 6)
        self.attn = JointAttention(width, heads=heads, qk_norm=qk_norm, context_out=not last)
        self.ff = FeedForward(width)
        if not last:
            self.ff_context = FeedForward(width)

    def forward(
        self, x: Tensor, context: Tensor, condition: Tensor, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Image (B, L, W) and text (B, T, W) under the condition (B, W) to the same."""
        chunks, text_chunks = self.norm1(condition), self.norm1_context(condition)
        if len(text_chunks) == 2:
            scale, shift = text_chunks
        else:
            shift, scale = text_chunks[:2]
        attended, told = self.attn(
            modulate(layer_norm(x), shift=chunks[0], scale=chunks[1]),
            modulate(layer_norm(context), shift=shift, scale=scale),
            rotation,
        )
        x = _updated(x, attended, chunks, self.ff)
        if told is not None:
            context = _updated(context, told, text_chunks, self.ff_context)
        return x, context


def _updated(x: Tensor, attended: Tensor, chunks: tuple[Tensor, ...], feed_forward: nn.Module) -> Tensor:
    _, _, gate_a, shift_m, scale_m, gate_m = chunks
    x = torch.addcmul(x, gate_a, attended)
    return torch.addcmul(x, gate_m, feed_forward(modulate(layer_norm(x), shift=shift_m, scale=scale_m)))


class _HeadAttention(nn.Module):
    """Attention whose output is not projected."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v)
        )
        return attend(self.norm_q(query), self.norm_k(key), value, rotation)


class SingleBlock(nn.Module):
    """One stream [text, image]: attention and feed-forward side by side, projected together.

    Args:
        width: W.
        heads: h; divides W.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.norm = AdaptiveChunks(width, chunks=3)
        self.attn = _HeadAttention(width, heads=heads)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Map (B, T + L, W) under the condition (B, W) to the same."""
        shift, scale, gate = self.norm(condition)
        normed = modulate(layer_norm(x), shift=shift, scale=scale)
        inner = F.gelu(self.proj_mlp(normed), approximate="tanh")
        return torch.addcmul(x, gate, self.proj_out(torch.cat([self.attn(normed, rotation), inner], dim=-1)))
