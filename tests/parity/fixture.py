"""A folder of expected values: what an original implementation made of random weights."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Outputs = Iterator[tuple[str, Tensor] | tuple[str, Tensor, float]]
"""Name in io.safetensors, the value we get, and its tolerance where it is not the family's."""


@dataclass(frozen=True)
class Fixture:
    """One folder.

    Attributes:
        folder: Holds config.json, state_dict.safetensors, io.safetensors.
        config: config.json.
        io: Tensors of io.safetensors.
    """

    folder: Path
    config: dict[str, Any]
    io: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Fixture":
        """Open a folder.

        Raises:
            ValueError: If it is no fixture.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            return cls(folder, config, load_file(folder / "io.safetensors"))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: expected a folder of expected values, got {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        return self.io[name]

    def weights(self, prefix: str = "") -> Path:
        """The file of a state dict, such as `tokenizer_`."""
        return self.folder / f"{prefix}state_dict.safetensors"


@dataclass(frozen=True)
class Family:
    """How a family is checked.

    Attributes:
        outputs: Yields what we get for every expected tensor.
        tolerance: Largest absolute difference of floats; integers are exact.
        inputs: Prefixes of tensors that are given and not expected.
    """

    outputs: Callable[[Fixture], Outputs]
    tolerance: float = 1e-4
    inputs: tuple[str, ...] = ("in.",)


@dataclass
class Report:
    """What a fixture's check found.

    Attributes:
        lines: One a tensor.
        failed: Names of those that differ, or were not checked.
    """

    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, *, good: bool) -> None:
        """Add a tensor."""
        self.lines.append(f"  {'ok  ' if good else 'FAIL'} {name}: {text}")
        if not good:
            self.failed.append(name)


@torch.no_grad()
def compare(fixture: Fixture, family: Family) -> Report:
    """Compare everything the family yields with what the folder expects."""
    report, seen = Report(), set()
    for name, got, *own in family.outputs(fixture):
        seen.add(name)
        if name not in fixture.io:
            continue  # a folder of other options holds other tensors
        expected, tolerance = fixture.io[name], own[0] if own else family.tolerance
        if got.shape != expected.shape:
            report.add(name, f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}", good=False)
        elif expected.is_floating_point() or expected.is_complex():
            difference = (got.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
            report.add(name, f"{difference:.2e} (at most {tolerance:.0e})", good=difference <= tolerance)
        else:
            wrong = int((got.to(expected.dtype) != expected).sum())
            report.add(name, "equal" if not wrong else f"{wrong} of {expected.numel()} differ", good=not wrong)
    for name in fixture.io:
        if name not in seen and not name.startswith(family.inputs):
            report.add(name, "not checked", good=False)
    return report
