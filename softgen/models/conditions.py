"""What a model is conditioned on: small frozen dataclasses of tensors with a leading batch dimension."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="Condition")

Asked = Tensor | Sequence[str]
"""What a caller asks for, before it is encoded: class labels (B,) int64, or B prompts."""


@dataclass(frozen=True)
class Condition:
    """Base of the conditions. Every field is a tensor whose first dimension is the batch, but for the one that says so.

    Attributes:
        dropped: True where the sample is to be treated as unconditional, (B,) bool.
        nothing_dropped: Not a tensor: True if `dropped` is known to be False everywhere, without looking at it.
    """

    dropped: Tensor
    nothing_dropped: bool = field(default=False, kw_only=True)

    def __len__(self) -> int:
        return int(self.dropped.shape[0])

    def __getitem__(self: C, index: slice | Tensor) -> C:
        return self._each(lambda name: getattr(self, name)[index])

    def to(self: C, device: torch.device) -> C:
        """The same condition on another device."""
        return self._each(lambda name: getattr(self, name).to(device))

    def drop(self: C, where: Tensor | None = None) -> C:
        """The unconditional form, for guidance; with `where` (B,) bool only of those samples (label dropout)."""
        dropped = torch.ones_like(self.dropped) if where is None else self.dropped | where
        return replace(self, dropped=dropped, nothing_dropped=False)

    @classmethod
    def cat(cls: type[C], conditions: Sequence[C]) -> C:
        """Concatenate along the batch."""
        joined = conditions[0]._each(lambda name: torch.cat([getattr(condition, name) for condition in conditions]))
        return replace(joined, nothing_dropped=all(condition.nothing_dropped for condition in conditions))

    def _each(self: C, new: Callable[[str], Tensor]) -> C:
        """A copy with other tensors, each made from its name."""
        tensors: dict[str, Any] = {kept.name: new(kept.name) for kept in fields(self) if kept.name != "nothing_dropped"}
        return replace(self, **tensors)


@dataclass(frozen=True)
class ClassCondition(Condition):
    """Class labels, shape (B,) int64 in [0, num_classes)."""

    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "ClassCondition":
        """Labels with nothing dropped."""
        return cls(dropped=torch.zeros_like(labels, dtype=torch.bool), labels=labels, nothing_dropped=True)


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
        return cls(dropped=dropped, states=states, mask=mask, pooled=pooled, nothing_dropped=True)


def check_prompts(prompts: Sequence[str], *, key: str) -> None:
    """Refuse what is no list of prompts; one text would be read letter by letter.

    Raises:
        ValueError: Naming `key`.
    """
    if isinstance(prompts, str):
        raise ValueError(f"{key}: expected a list of prompts, got the text {prompts!r}")
    if len(prompts) == 0:
        raise ValueError(f"{key}: expected at least one prompt, got none")


def check_labels(labels: Tensor, *, key: str) -> None:
    """Refuse what is no row of class numbers.

    Raises:
        ValueError: Naming `key`.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{key}: expected labels (B,) of an integer type, got {labels.dtype} {tuple(labels.shape)}")


def split_asked(asked: Asked, size: int) -> list[Asked]:
    """Labels or prompts in parts of `size`, the last one maybe shorter."""
    return [asked[first : first + size] for first in range(0, len(asked), size)]
