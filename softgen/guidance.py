"""Classifier-free guidance (arXiv 2207.12598)."""

import math

import torch
from torch import Tensor

from softgen.models.base import ImageCodeModel, MaskedDiffusionModel
from softgen.models.conditions import Condition


def check_guidance(model: ImageCodeModel, scale: float, *, key: str = "guidance") -> None:
    """Refuse guidance that the model cannot give.

    Raises:
        ValueError: If the scale is negative, or other than 1 for a model without a null condition.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"{key}: expected a scale of at least 0 (1 turns guidance off), got {scale}")
    if scale != 1 and not model.has_null_condition:
        raise ValueError(f"{key}: expected 1, since this model has no null condition, got {scale}")


def guided_logits(
    model: MaskedDiffusionModel, embeddings: Tensor, condition: Condition, *, scale: float | Tensor
) -> Tensor:
    """U + s (c - u) from conditional c and unconditional u, both in one call of the model.

    Args:
        model: The teacher.
        embeddings: (B, L, d).
        condition: B samples.
        scale: s; 1 is no guidance and costs one pass, not two. Or a tensor that broadcasts to (B, 1, 1).

    Returns:
        Logits (B, N, K).
    """
    if isinstance(scale, (int, float)) and scale == 1:
        guided: Tensor = model(embeddings, condition)
        return guided
    both = model(torch.cat([embeddings, embeddings]), type(condition).cat([condition, condition.drop()]))
    conditional, unconditional = both.chunk(2)
    weight = scale.to(conditional.dtype) if isinstance(scale, Tensor) else scale
    return torch.lerp(unconditional, conditional, weight)
