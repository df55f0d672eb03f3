"""What a model is conditioned on: small frozen dataclasses of tensors with a leading batch dimension."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="Condition")


@dataclass(frozen=True)
class Condition:
    """Base of the conditions. Every field is a tensor whose first dimension is the batch.

    Subclasses have a field `dropped` (B,) bool: True where the sample is to be treated as unconditional.
    """

    dropped: Tensor

    def __len__(self) -> int:
        return int(self.dropped.shape[0])

    def __getitem__(self: C, index: slice | Tensor) -> C:
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self: C, device: torch.device) -> C:
        """The same condition on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def drop(self: C, where: Tensor | None = None) -> C:
        """The unconditional form, for guidance; with `where` (B,) bool only of those samples (label dropout)."""
        dropped = torch.ones_like(self.dropped) if where is None else self.dropped | where
        return replace(self, dropped=dropped)

    @classmethod
    def cat(cls: type[C], conditions: Sequence[C]) -> C:
        """Concatenate along the batch."""
        first = conditions[0]
        return replace(
            first,
            **{
                field.name: torch.cat([getattr(condition, field.name) for condition in conditions])
                for field in fields(first)
            },
        )


@dataclass(frozen=True)
class ClassCondition(Condition):
    """Class labels, shape (B,) int64 in [0, num_classes)."""

    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "ClassCondition":
        """Labels with nothing dropped."""
        return cls(dropped=torch.zeros_like(labels, dtype=torch.bool), labels=labels)
