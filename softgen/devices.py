"""Where tensors live."""

from functools import cache

import torch
from torch import Tensor


def best_device() -> torch.device:
    """The accelerator that torch sees, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None else torch.get_default_device()


@cache
def on_accelerator(device: torch.device) -> bool:
    """Whether it is of the kind of accelerator that torch sees."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device(device.type)


def float_numbers(given: Tensor | float, device: torch.device) -> Tensor:
    """A number, (1,), or numbers, (B,), in float32 on a device; a number is written there, since a copy would wait."""
    if isinstance(given, Tensor):
        return given.to(device, torch.float32).reshape(-1)
    return torch.full((1,), given, dtype=torch.float32, device=device)
