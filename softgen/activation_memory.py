"""What a training step needs beside the weights, by arithmetic: it is run on tensors of shapes without memory.

Every operation of the forward and backward pass is carried out on shapes alone, and the sizes of the storages that are
alive are added up. Sizes, recomputed blocks, casts of autocast and micro-batches so enter as they are in the code.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softgen.models.mmdit import frequencies


@dataclass(frozen=True)
class StepMemory:
    """Of one forward and backward pass, in bytes, beside weights and gradients.

    Attributes:
        forward: The most that is alive at once up to the loss.
        kept: Alive when the loss is there: what the backward pass will read.
        peak: The most that is alive at once, in either pass.
    """

    forward: int
    kept: int
    peak: int


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make while it is entered, and takes them off when they are freed.

    Scratch memory inside of a kernel is not seen, nor what an allocator rounds up or keeps.

    Attributes:
        live: Bytes now.
        peak: The most so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count what it returns and did not get."""
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:
                self._known[id(storage)] = weakref.ref(storage, self._forget(id(storage), 0))
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:
                size = storage.nbytes()
                self._known[id(storage)] = weakref.ref(storage, self._forget(id(storage), size))
                self.live += size
        self.peak = max(self.peak, self.live)
        return result

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.live -= size

        return forget


class _Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A copy of a model has tensors of the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shapes":
        return self


class _AnswerZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions about values, which are not there, with zero and False."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it tensors take no memory; models of any size are built and run. Values that code asks for are zero.

    Attention and convolutions are those of the CPU's kernels: attention is fused, and keeps no map of scores. Casts are
    those of the CPU's autocast; that of CUDA has norms return float32.
    """
    frequencies.cache_clear()  # what is kept for later runs must be of the same kind as they are
    swap = torch.utils.swap_tensors
    # What `Module.to` does to such tensors, which it finds referred to and then cannot.
    torch.utils.swap_tensors = _assign
    try:
        with warnings.catch_warnings(), _Shapes(), _AnswerZero():  # type: ignore[no-untyped-call]
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        torch.utils.swap_tensors = swap
        frequencies.cache_clear()


def _assign(one: Tensor, other: Tensor) -> None:
    one.data = other.data


def step_memory(
    step: Callable[[], Tensor], parameters: Iterable[nn.Parameter], *, autocast: torch.dtype | None = None
) -> StepMemory:
    """Count a step; within `shapes_alone` without its memory, else while it really runs.

    The gradients are made first and are not counted: they are there from the first accumulated batch on.

    Args:
        step: Returns the loss, as `SoftDiMO.training_step` does.
        parameters: What is trained.
        autocast: Of the forward pass; None for none.
    """
    parameters = list(parameters)
    make_gradients(parameters)
    halfway: list[int] = []
    with MemoryMeter() as meter:
        one_pass(step, autocast=autocast, between=lambda: halfway.extend((meter.peak, meter.live)))
    forward, kept = halfway
    return StepMemory(forward=forward, kept=kept, peak=meter.peak)


def make_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros, as there are between two batches whose gradients are added up."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def one_pass(
    step: Callable[[], Tensor],
    *,
    autocast: torch.dtype | None = None,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Forward and backward of a step outside of a trainer, for whoever watches the memory.

    Args:
        step: As of `step_memory`.
        autocast: As of `step_memory`.
        between: Called when the loss is there.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to `self.log")
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = step()
        between()
        loss.backward()  # type: ignore[no-untyped-call]


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
