"""Activations that are recomputed in the backward pass, in eval mode too."""

from collections.abc import Iterable
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
        layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
