"""Who computes a published reward: this package, or the official one in an environment of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from rewards.compute import Compute
from rewards.environments import find_interpreter
from rewards.isolated import Isolated

Backend = Literal["native", "official"]
_SECONDS = 1800.0  # to read 15 GB of weights, or to score a batch without an accelerator


def is_official(backend: str, *, python: str | Path | None) -> bool:
    """Whether the official package is asked for.

    Raises:
        ValueError: An unknown backend, or an interpreter beside the native one.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected native or official, got {backend!r}")
    if backend == "native" and python is not None:
        raise ValueError(f"python: expected none beside backend 'native', got '{python}'")
    return backend == "official"


def open_official(
    reward: str,
    *,
    environment: str,
    python: str | Path | None,
    options: Mapping[str, Any],
    unread: Mapping[str, bool],
    compute: Compute,
    name: str,
) -> Isolated:
    """The official package's reward, in a worker on `compute.device` or else on the CPU.

    Args:
        reward: Dotted path of a class of `rewards.official`.
        environment: Which one it runs in, unless `python` says so.
        python: Interpreter of an environment that has the package.
        options: Arguments of the class.
        unread: Arguments that the official package has no use for, and whether they were given.
        compute: Of which it takes `micro_batch` and `device`.
        name: In logs and errors.

    Raises:
        ValueError: There is no such environment, it lacks the package, the worker dies, or an argument goes unread.
    """
    unread = {
        **unread,
        "compute.dtype": compute.dtype != Compute.dtype,
        "compute.checkpoint_activations": compute.checkpoint_activations,
    }
    for argument, given in unread.items():
        if given:
            raise ValueError(f"{argument}: expected its default beside backend 'official', which does not read it")
    device = compute.device or "cpu"
    return Isolated(
        reward,
        python=find_interpreter(environment) if python is None else python,
        options={**options, "device": device, "name": name},
        timeout=_SECONDS,
        device=device,
        name=name,
    )
