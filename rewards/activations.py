"""Activations that are recomputed in the backward pass, in eval mode too."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(layers: Iterable[nn.Module]) -> None:
    """Make layers keep their inputs alone and run again in the backward pass.

    The switches of transformers and open_clip act in training mode only, which would turn dropout on.

    Args:
        layers: Changed in place; where no gradient is wanted they run as before.
    """
    for layer in layers:
        # A bound method, and not a closure: a copy of the layer is to use its own weights.
        layer.forward = MethodType(_recomputed, layer)


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled():
        return forward(layer, *args, **kwargs)
    return checkpoint(forward, layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
