"""How and where a reward computes: one place for all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rewards.activations import recompute_activations
from rewards.conditions import Conditions
from rewards.errors import one_line
from rewards.first_order import score_with_gradient
from rewards.heads import WideHead

Precision = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Compute:
    """How and where a reward computes. What it computes stays the same, but for the rounding of a narrower `dtype`.

    Attributes:
        dtype: Of the frozen weights. Heads, logit scales and scores stay in float32 or better.
        micro_batch: Images scored at a time. The gradient of each part is taken at once, so that the activations of one
            part are all that is kept; it is first-order then. 0 takes the whole batch.
        checkpoint_activations: Recompute each layer in the backward pass instead of keeping its activations.
        device: Where the weights are and stay, whatever `.to()` asks for. Images go there, scores and gradients come
            back. None leaves the weights where `.to()` puts them.

    Raises:
        ValueError: Naming the setting, what was expected and what was got.
    """

    dtype: Precision = "float32"
    micro_batch: int = 0
    checkpoint_activations: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Precision):
            raise ValueError(f"compute.dtype: expected one of {', '.join(get_args(Precision))}, got {self.dtype!r}")
        if self.micro_batch < 0:
            raise ValueError(f"compute.micro_batch: expected at least 0, got {self.micro_batch}")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                got = f"{self.device!r} ({one_line(error, limit=60)})"
                raise ValueError(f"compute.device: expected a device of torch, got {got}") from error

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def settle(module: nn.Module, compute: Compute) -> None:
    """Freeze a module whose weights are loaded, put it in eval mode, and make it compute as asked, in place.

    Raises:
        ValueError: `checkpoint_activations` finds no layers.
    """
    module.eval().requires_grad_(False)
    if compute.torch_dtype != torch.float32:
        _cast(module, compute.torch_dtype)
    if compute.checkpoint_activations:
        layers = _layers(module)
        if not layers:
            raise ValueError(
                f"compute.checkpoint_activations: expected layers to recompute, got none in a {type(module).__name__}"
            )
        recompute_activations(layers)
    if compute.device is not None:
        module.to(present_device(compute.device, key="compute.device"))


def present_device(name: str, *, key: str) -> torch.device:
    """The device of that name.

    Args:
        name: As torch calls it.
        key: What the name was given as.

    Raises:
        ValueError: If torch does not know it, or it is not there.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        got = f"{name!r} ({one_line(error, limit=60)})"
        raise ValueError(f"{key}: expected a device of torch that is present, got {got}") from error
    return device


def score_in_parts(
    score: Callable[[Tensor, Conditions], Tensor], images: Tensor, conditions: Conditions, *, size: int
) -> Tensor:
    """Scores (B,) of `size` images at a time, with the gradient of each part computed along with it.

    Args:
        score: Scores one part.
        images: (B, 3, H, W).
        conditions: B of them.
        size: Images a part, at least 1.
    """

    def evaluate(pixels: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:  # noqa: FBT001
        scores: list[Tensor] = []
        gradients: list[Tensor] = []
        for first in range(0, len(pixels), size):
            with torch.set_grad_enabled(wanted):
                leaf = pixels[first : first + size].detach().requires_grad_(wanted)
                part = score(leaf, conditions[first : first + size])
                if part.requires_grad:
                    gradients += torch.autograd.grad(part.sum(), leaf, materialize_grads=True)
            scores.append(part.detach())
        return torch.cat(scores), torch.cat(gradients) if len(gradients) == len(scores) else None

    return score_with_gradient(images, evaluate)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights in `dtype`; narrowed without those of heads, of batch norms (they go by float32 statistics) and scalars.

    Other buffers, such as the frequencies of rotations, stay.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    heads = [part for part in module.modules() if isinstance(part, WideHead)]
    wide = {id(parameter) for part in (*heads, *norms) for parameter in part.parameters()}
    if dtype == torch.float64:
        wide.clear()
        for norm in norms:
            norm.to(dtype)
    for parameter in module.parameters():
        if parameter.ndim and id(parameter) not in wide:
            parameter.data = parameter.data.to(dtype)


def _layers(module: nn.Module) -> Sequence[nn.Module]:
    """The members of the outermost lists of layers, heads aside."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and not isinstance(child, WideHead):
            found += child
        else:
            found += _layers(child)
    return found
