"""Where tensors live."""

from functools import cache

import torch


def best_device() -> torch.device:
    """The accelerator that torch sees, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None else torch.get_default_device()


@cache
def on_accelerator(device: torch.device) -> bool:
    """Whether it is of the kind of accelerator that torch sees."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device(device.type)
