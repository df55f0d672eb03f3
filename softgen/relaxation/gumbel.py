"""Gumbel-softmax with straight-through gradients, the baseline that the soft embedding is compared with."""

import torch
from torch import Tensor

from softgen.relaxation.expectation import probabilities

_TINY = 1e-20


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Turn uniform draws in [0, 1) into standard Gumbel draws -log(-log u), each log clamped at 1e-20."""
    inner = uniform.clamp(min=_TINY).log().neg().clamp(min=_TINY)
    return inner.log().neg()


def gumbel_softmax_st(logits: Tensor, *, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Sample one-hot codes in the forward pass, with the gradient of the relaxed sample (arXiv 1611.01144).

    Args:
        logits: Scores, shape (..., K).
        uniform: Uniform draws in [0, 1), the shape of the logits.
        temperature: Of the relaxed sample softmax((logits + Gumbel) / temperature); above 0.

    Returns:
        Exactly one-hot vectors, shape (..., K), whose gradient is the relaxed sample's.

    Raises:
        ValueError: If the temperature is not positive or the shapes differ.
    """
    if uniform.shape != logits.shape:
        raise ValueError(f"uniform: expected shape {tuple(logits.shape)}, got {tuple(uniform.shape)}")
    soft = probabilities(logits + gumbel_noise(uniform), temperature=temperature)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    # `soft - soft` is exactly 0, so the forward value is exactly one-hot.
    return hard + (soft - soft.detach())
