"""What the CPU's allocator counts while a step really runs, from torch's profiler."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softgen.activation_memory import make_gradients, one_pass

_KERNELS = ("aten::convolution_backward", "aten::mkldnn_convolution", "aten::bmm", "aten::mm", "aten::addmm")


def allocated_in_step(
    step: Callable[[], Tensor], parameters: Iterable[nn.Parameter], *, autocast: torch.dtype | None = None
) -> int:
    """Run a step as `step_memory` does, and follow the allocator: the most at once, in bytes, as `StepMemory.peak`.

    Left out is what a convolution or a matrix product takes for itself and gives back before it returns, such as a copy
    of an image whose 3 channels are filled up to 16: kernels differ in it from machine to machine.
    """
    make_gradients(parameters)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one_pass(step, autocast=autocast)
    events = sorted(_events(profile), key=lambda event: event[:2])
    scratch = _inside(events)
    live = peak = 0
    sizes: dict[int, int] = {}
    for index, (_, pointer, size, _) in enumerate(events):
        if index in scratch:
            continue
        if size > 0:
            sizes[pointer] = size
            live += size
        else:
            live -= sizes.pop(pointer, 0)  # of something older: not of the step
        peak = max(peak, live)
    return peak


def _inside(events: list[tuple[int, int, int, int]]) -> set[int]:
    """Indices of what a kernel takes and gives back itself."""
    taken: dict[int, tuple[int, int]] = {}
    inside: set[int] = set()
    for index, (_, pointer, size, call) in enumerate(events):
        if size > 0:
            taken[pointer] = (index, call)
            continue
        first, owner = taken.pop(pointer, (index, 0))
        if call and owner == call:
            inside |= {first, index}
    return inside


def _events(profile: torch.profiler.profile) -> Iterator[tuple[int, int, int, int]]:
    """Time, pointer, size (below 0 where it is freed) and the call of a kernel that does it, 0 for none."""
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    pending: list[tuple[Any, int]] = [(event, 0) for event in results.experimental_event_tree()]
    calls = 0
    while pending:
        event, call = pending.pop()
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, call
        elif event.name in _KERNELS:
            calls += 1
            call = calls
        pending.extend((child, call) for child in event.children)
