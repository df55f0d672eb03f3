"""What a run will hold in memory, said before it starts."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from softgen.callbacks.ema import StudentEMA
from softgen.models.text import TextEncoder
from softgen.training.stage import Stage

_MIB = 2**20


@dataclass(frozen=True)
class PartMemory:
    """One part of a run, in bytes.

    Attributes:
        name: Of the parameter group, or of the frozen module.
        parameters: How many numbers its weights are.
        weights: Of the weights.
        gradients: Of the gradients; 0 for what is frozen.
        optimizer: Of Adam's two moments, or Muon's one.
        average: Of the averaged copy of what is trained.
    """

    name: str
    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average


def memory_plan(stage: Stage, *, averaged: bool = True) -> list[PartMemory]:
    """Memory of each parameter group, each frozen module and the text towers that they read with.

    Activations are not counted: `softgen.activation_memory` counts those of a step. Text towers are opened for it.

    Args:
        stage: What is trained.
        averaged: Whether an average of the product is kept beside it, as `StudentEMA` keeps it.

    Raises:
        ValueError: A text tower cannot be opened.
    """
    product = {id(tensor) for tensor in stage.product.state_dict(keep_vars=True).values()} if averaged else set()
    parts = []
    for group in stage.parameter_groups():
        trained = [parameter for parameter in group.parameters if parameter.requires_grad]
        by_muon = [matrix for matrix in group.matrices if matrix.requires_grad and group.config.muon_lr is not None]
        parts.append(
            PartMemory(
                name=group.name,
                parameters=_count(group.parameters),
                weights=_bytes(group.parameters),
                gradients=_bytes(trained),
                optimizer=2 * _bytes(trained) - _bytes(by_muon),
                average=_averages(parameter for parameter in trained if id(parameter) in product),
            )
        )
    for name, module in stage.frozen_modules.items():
        parts.append(_frozen(name, module))
    return [*parts, *(_frozen(name, tower) for name, tower in _towers(stage))]


def _towers(stage: Stage) -> Iterator[tuple[str, nn.Module]]:
    """Each once. Where frozen parts read the prompts, the towers of trained ones stay closed."""
    seen: set[int] = set()
    roots: dict[str, nn.Module] = dict(stage.frozen_modules)
    readers = [module for root in roots.values() for module in root.modules() if isinstance(module, TextEncoder)]
    for name, root in (roots if readers else {"product": stage.product}).items():
        for module in root.modules():
            tower = module.tower() if isinstance(module, TextEncoder) else None
            if tower is not None and id(tower) not in seen:
                seen.add(id(tower))
                yield f"text tower of {name}", tower


def _frozen(name: str, module: nn.Module) -> PartMemory:
    tensors = [*module.parameters(), *module.buffers()]
    return PartMemory(f"{name} (frozen)", _count(tensors), _bytes(tensors))


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _averages(tensors: Iterable[Tensor]) -> int:
    """In float32 at least, as `StudentEMA` keeps them."""
    return sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in tensors)


class MemoryPlan(Callback):
    """Prints `memory_plan` on stderr before training."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line a part, and the sum."""
        assert isinstance(pl_module, Stage)
        if not trainer.is_global_zero:
            return
        parts = memory_plan(pl_module, averaged=average_beside(trainer, pl_module))
        opening = "memory of one process, MiB, without activations (softgen.activation_memory counts them):"
        print(opening, file=sys.stderr)
        for part in parts:
            pieces = {"gradients": part.gradients, "optimizer": part.optimizer, "average": part.average}
            shown = "".join(f" + {name} {size / _MIB:.1f}" for name, size in pieces.items() if size)
            count = f"{part.parameters / 1e6:.2f} M parameters"
            print(f"  {part.name}: {count}: weights {part.weights / _MIB:.1f}{shown}", file=sys.stderr)
        print(f"  in all: {sum(part.total for part in parts) / _MIB:.1f}", file=sys.stderr)


def average_beside(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether there is an average, and in the same memory as the weights."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept = [callback for callback in callbacks if isinstance(callback, StudentEMA)]
    places = [torch.device(callback.device).type for callback in kept if callback.device is not None]
    return bool(kept) and all(place == pl_module.device.type for place in places)
