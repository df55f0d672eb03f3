"""The soft embedding: e = softmax(s) @ E (Soft-Di[M]O, OpenReview 83pHDDmkXt)."""

import torch
from torch import Tensor

from softgen.relaxation.precision import full_precision, widen


def probabilities(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Softmax over the last dimension, in float32 whatever the precision of the logits.

    Args:
        logits: Scores, shape (..., K).
        temperature: Divides the logits; above 0. Below 1 sharpens the distribution.

    Returns:
        Probabilities, shape (..., K), float32 (float64 for float64 logits).

    Raises:
        ValueError: If the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    wide = widen(logits)
    return (wide / temperature).softmax(dim=-1) if temperature != 1 else wide.softmax(dim=-1)


def expected_embedding(probs: Tensor, embedding: Tensor) -> Tensor:
    """The mean row of `embedding` under `probs`: the differentiable stand-in for a sampled row.

    Args:
        probs: Distributions over K codes, shape (..., K).
        embedding: One row a code, shape (K, d).

    Returns:
        Expected rows, shape (..., d), in the embedding's dtype; summed in the wider one of the two.

    Raises:
        ValueError: If the two disagree on the number of codes.
    """
    if probs.shape[-1] != embedding.shape[0]:
        raise ValueError(f"probs: expected a last dimension of {embedding.shape[0]} codes, got {probs.shape[-1]}")
    wide = torch.promote_types(probs.dtype, embedding.dtype)
    with full_precision(embedding):
        return (probs.to(wide) @ embedding.to(wide)).to(embedding.dtype)
