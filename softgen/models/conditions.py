"""What a model is conditioned on: small frozen dataclasses of tensors with a leading batch dimension."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="Condition")

Asked = Tensor | Sequence[str]
"""What a caller asks for, before it is encoded: class labels (B,) int64, or B prompts."""


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


@dataclass(frozen=True)
class TextCondition(Condition):
    """Encoded prompts.

    Attributes:
        states: One vector a text token, (B, T, c).
        mask: True where there is a token, (B, T) bool; False is padding.
        pooled: One vector a prompt, (B, p).
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, states: Tensor, mask: Tensor, pooled: Tensor) -> "TextCondition":
        """Encoded prompts with nothing dropped."""
        dropped = torch.zeros(len(states), dtype=torch.bool, device=states.device)
        return cls(dropped=dropped, states=states, mask=mask, pooled=pooled)


def split_asked(asked: Asked, size: int) -> list[Asked]:
    """Labels or prompts in parts of `size`, the last one maybe shorter."""
    return [asked[first : first + size] for first in range(0, len(asked), size)]
