"""Scores whose gradient is computed along with them, so that nothing else is kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Evaluate = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""`evaluate(images, wanted)`: scores (B,), and d score_i / d image_i (B, 3, H, W) if it is wanted and there is one."""


def score_with_gradient(images: Tensor, evaluate: Evaluate) -> Tensor:
    """Scores (B,) on the images' device; the backward pass only multiplies. Gradients are first-order.

    Args:
        images: (B, 3, H, W).
        evaluate: Computes both; its images are detached.
    """
    # Within the function, only the images tell whether a gradient is wanted, and not the mode of the caller.
    scores: Tensor = _Known.apply(images if torch.is_grad_enabled() else images.detach(), evaluate)
    return scores


class _Known(Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, evaluate: Evaluate) -> Tensor:
        scores, gradient = evaluate(images.detach(), bool(ctx.needs_input_grad[0]))
        scores = scores.to(images.device)
        if gradient is None:
            ctx.mark_non_differentiable(scores)
        else:
            ctx.save_for_backward(gradient.to(images))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient)[:, None, None, None], None
