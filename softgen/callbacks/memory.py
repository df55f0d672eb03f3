"""What a run will hold in memory, said before it starts."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

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
        optimizer: Of Adam's two moments.
        average: Of the averaged copy.
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


def memory_plan(stage: Stage) -> list[PartMemory]:
    """Memory of each parameter group and each frozen module, activations not counted.

    The average is that of the product, as `StudentEMA` keeps it.
    """
    averaged = {id(tensor) for tensor in stage.product.state_dict(keep_vars=True).values()}
    parts = []
    for group in stage.parameter_groups():
        trained = _bytes(parameter for parameter in group.parameters if parameter.requires_grad)
        parts.append(
            PartMemory(
                name=group.name,
                parameters=sum(parameter.numel() for parameter in group.parameters),
                weights=_bytes(group.parameters),
                gradients=trained,
                optimizer=2 * trained,
                average=_bytes(parameter for parameter in group.parameters if id(parameter) in averaged),
            )
        )
    for name, module in stage.frozen_modules.items():
        tensors = [*module.parameters(), *module.buffers()]
        parts.append(PartMemory(f"{name} (frozen)", sum(tensor.numel() for tensor in tensors), _bytes(tensors)))
    return parts


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class MemoryPlan(Callback):
    """Prints `memory_plan` on stderr before training."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line a part, and the sum."""
        assert isinstance(pl_module, Stage)
        if not trainer.is_global_zero:
            return
        parts = memory_plan(pl_module)
        print("memory of one process, MiB, activations not counted:", file=sys.stderr)
        for part in parts:
            pieces = {"gradients": part.gradients, "Adam": part.optimizer, "average": part.average}
            shown = "".join(f" + {name} {size / _MIB:.1f}" for name, size in pieces.items() if size)
            count = f"{part.parameters / 1e6:.2f} M parameters"
            print(f"  {part.name}: {count}: weights {part.weights / _MIB:.1f}{shown}", file=sys.stderr)
        print(f"  in all: {sum(part.total for part in parts) / _MIB:.1f}", file=sys.stderr)
