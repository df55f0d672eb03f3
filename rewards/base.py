"""The interface of reward models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rewards.compute import Compute, score_in_parts, settle
from rewards.conditions import Conditions, as_labels, as_prompts, check_count

R = TypeVar("R", bound="Reward")
_ROUNDING = 0.01


class Reward(nn.Module, ABC):
    """Scores images under conditions; differentiable in the images, higher is better.

    Every reward is called alike, `reward(images, conditions)`, whether the generator at hand is driven by prompts or
    by class labels. The call checks the batch, turns the conditions into what the reward `takes`, and hands them to
    `forward`, the one method that a subclass writes:

        class Brightness(Reward):
            def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
                return images.mean(dim=(1, 2, 3))

    A reward is a judge, not something to train: it starts in training mode like any module, but `train()` puts it in
    eval mode, so that it stays there inside a Lightning module. A subclass with weights of its own ends its `__init__`
    with `settle()`, which freezes them.

    Args:
        name: Name in logs and errors; by default the class attribute `name`, or else the class's own name.
        class_names: What class k is called. A reward that takes prompts reads the label k as `class_names[k]` (which
            may be a whole prompt); one that takes labels reads the string `class_names[k]` as k.
        compute: Precision, micro-batches, recomputed activations and device.

    Attributes:
        name: As given.
        takes: What `forward` gets: "prompts", a list of B strings; "labels", a tensor (B,) int64 on the images'
            device; "any", the conditions as the caller gave them (for a reward that ignores them or hands them on).
        class_names: As given.
        compute: As given.

    Raises:
        ValueError: `class_names` are no list of strings, empty, blank or not unique.
    """

    name: str = ""
    takes: Literal["prompts", "labels", "any"] = "prompts"
    class_names: tuple[str, ...] | None

    def __init__(
        self,
        *,
        name: str | None = None,
        class_names: Sequence[str] | None = None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.compute = compute
        self.name = name or self.name or type(self).__name__
        if class_names is not None:
            _check_class_names(class_names, name=self.name)
        self.class_names = None if class_names is None else tuple(class_names)

    def __call__(self, images: Tensor, conditions: Conditions) -> Tensor:
        """Score a batch.

        Args:
            images: (B, 3, H, W), float, in [0, 1], on any device. On the CPU, values further outside than rounding
                goes (0.01) are refused; on an accelerator they are not looked at, since every step would wait for it.
            conditions: B prompts, or B class labels: strings, integers, or a tensor (B,) of an integer type.

        Returns:
            (B,), on the images' device, with a gradient that reaches the images.

        Raises:
            ValueError: The images or shapes do not fit, the reward cannot read the conditions, or returns another
                shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{tuple(images.shape)} of {images.dtype}"
            raise ValueError(f"reward {self.name}: expected float images (B, 3, H, W), got {got}")
        check_count(conditions, batch=len(images), name=self.name)
        _check_range(images, name=self.name)
        place = self.place()
        pixels = images if place is None else images.to(place)
        given = self._read(conditions, device=pixels.device)
        size = self.compute.micro_batch
        if size and len(pixels) > size:
            return score_in_parts(self._score, pixels, given, size=size).to(images.device)
        return self._score(pixels, given).to(images.device)

    def place(self) -> torch.device | None:
        """Where images are scored: the device of the weights; None for a reward without any, which follows them."""
        return next((tensor.device for tensors in (self.parameters(), self.buffers()) for tensor in tensors), None)

    def settle(self) -> None:
        """Freeze the weights, now that they are loaded, and put `compute` into effect.

        Raises:
            ValueError: `compute.checkpoint_activations` finds no layers.
        """
        settle(self, self.compute)

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

    def _apply(self: R, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> R:  # noqa: FBT001, FBT002
        """What `.to()` and its kin go through: the device that `compute` names stays."""
        device = self.compute.device
        kept = fn if device is None else lambda tensor: fn(tensor).to(device)
        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def _score(self, images: Tensor, conditions: Conditions) -> Tensor:
        scores = super().__call__(images, conditions)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"reward {self.name}: expected scores of shape ({len(images)},), got {got}")
        return scores

    def _read(self, conditions: Conditions, *, device: torch.device) -> Conditions:
        if self.takes == "prompts":
            return as_prompts(conditions, name=self.name, class_names=self.class_names)
        if self.takes == "labels":
            return as_labels(conditions, name=self.name, class_names=self.class_names, device=device)
        return conditions


def _check_class_names(class_names: Sequence[str], *, name: str) -> None:
    if isinstance(class_names, str) or not all(isinstance(word, str) for word in class_names):
        raise ValueError(f"reward {name}: expected class_names to be a list of strings, got {class_names!r}")
    if not class_names or not all(word.strip() for word in class_names):
        raise ValueError(f"reward {name}: expected class_names that are not empty, got {list(class_names)}")
    for word in class_names:
        if class_names.count(word) > 1:
            raise ValueError(f"reward {name}: expected class_names to be unique, got {word!r} twice")


def _check_range(images: Tensor, *, name: str) -> None:
    if images.device.type != "cpu" or images.numel() == 0:
        return
    least, most = (float(value) for value in images.detach().aminmax())
    if least < -_ROUNDING or most > 1 + _ROUNDING:
        raise ValueError(f"reward {name}: expected images in [0, 1], got values from {least:.3g} to {most:.3g}")
