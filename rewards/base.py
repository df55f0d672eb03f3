"""The interface of reward models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rewards.conditions import Conditions, as_labels, as_prompts, check_count

R = TypeVar("R", bound="Reward")


class Reward(nn.Module, ABC):
    """Scores images under conditions; differentiable in the images, higher is better.

    Every reward is called alike, `reward(images, conditions)`, whether the generator at hand is driven by prompts or
    by class labels. The call checks the batch, turns the conditions into what the reward `takes`, and hands them to
    `forward`, the one method that a subclass writes:

        class Brightness(Reward):
            def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
                return images.mean(dim=(1, 2, 3))

    A reward is a judge, not something to train: it starts in training mode like any module, but `train()` puts it in
    eval mode, so that it stays there inside a Lightning module. Its own weights are for the subclass to freeze.

    Args:
        name: Name in logs and errors; by default the class attribute `name`, or else the class's own name.
        class_names: What class k is called. A reward that takes prompts reads the label k as `class_names[k]` (which
            may be a whole prompt); one that takes labels reads the string `class_names[k]` as k.

    Attributes:
        name: As given.
        takes: What `forward` gets: "prompts", a list of B strings; "labels", a tensor (B,) int64 on the images'
            device; "any", the conditions as the caller gave them (for a reward that ignores them or hands them on).
        class_names: As given.

    Raises:
        ValueError: `class_names` are empty, blank or not unique.
    """

    name: str = ""
    takes: Literal["prompts", "labels", "any"] = "prompts"
    class_names: tuple[str, ...] | None

    def __init__(self, *, name: str | None = None, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.name = name or self.name or type(self).__name__
        self.class_names = None if class_names is None else tuple(class_names)
        if self.class_names is not None:
            _check_class_names(self.class_names, name=self.name)

    def __call__(self, images: Tensor, conditions: Conditions) -> Tensor:
        """Score a batch.

        Args:
            images: (B, 3, H, W), float, in [0, 1].
            conditions: B prompts, or B class labels: strings, integers, or a tensor (B,) of an integer type.

        Returns:
            (B,), with a gradient that reaches the images.

        Raises:
            ValueError: The shapes do not fit, the reward cannot read the conditions, or returns another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"reward {self.name}: expected float images (B, 3, H, W), got {got}")
        check_count(conditions, batch=len(images), name=self.name)
        scores = super().__call__(images, self._read(conditions, device=images.device))
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"reward {self.name}: expected scores of shape ({len(images)},), got {got}")
        return scores

    @abstractmethod
    def forward(self, images: Tensor, conditions: Any, /) -> Tensor:
        """Score a batch; a subclass names and types the second argument by what it takes.

        Args:
            images: (B, 3, H, W), float, in [0, 1].
            conditions: B strings, or labels (B,) int64: see `takes`.

        Returns:
            (B,), with a gradient that reaches the images.
        """

    def train(self: R, mode: bool = True) -> R:  # noqa: FBT001, FBT002 (nn.Module's signature)
        """Put the reward in eval mode, whatever `mode` says."""
        super().train(False)
        return self

    def _read(self, conditions: Conditions, *, device: torch.device) -> Conditions:
        if self.takes == "prompts":
            return as_prompts(conditions, name=self.name, class_names=self.class_names)
        if self.takes == "labels":
            return as_labels(conditions, name=self.name, class_names=self.class_names, device=device)
        return conditions


def _check_class_names(class_names: Sequence[str], *, name: str) -> None:
    if not class_names or not all(word.strip() for word in class_names):
        raise ValueError(f"reward {name}: expected class_names that are not empty, got {list(class_names)}")
    for word in class_names:
        if class_names.count(word) > 1:
            raise ValueError(f"reward {name}: expected class_names to be unique, got {word!r} twice")
