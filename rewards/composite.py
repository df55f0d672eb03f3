"""Several rewards as one: a weighted sum."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rewards.base import Reward
from rewards.conditions import Conditions, as_prompts


@dataclass(frozen=True)
class Normalisation:
    """Fixed figures that bring a reward's scores to a common scale: (score - mean) / std.

    Attributes:
        mean: What counts as 0, in the reward's own unit.
        std: What counts as 1, above 0.

    Raises:
        ValueError: `mean` is not finite, or `std` not finite and above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"normalisation.mean: expected a finite number, got {self.mean}")
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"normalisation.std: expected a finite number above 0, got {self.std}")


class CompositeReward(Reward):
    """sum_i weight_i (score_i - mean_i) / std_i, the sum over several rewards.

    Each reward reads the conditions in its own way, so one that takes prompts and one that takes labels can be summed
    if the strings are class names, or the former has `class_names`.

    Args:
        rewards: By name; in a list each goes by its own `name`.
        weights: By name, one for each reward, or in the order of `rewards`; by default 1 each. A reward of weight 0 is
            scored without a gradient and leaves the sum alone.
        normalisation: By name, for those rewards that want one; the others enter the sum as they are.
        class_names: Prompts that stand for class labels, for all of the rewards.
        name: Name in logs and errors.

    Raises:
        ValueError: No rewards, two of one name, weights or normalisations that do not fit, or only weights of 0.
    """

    takes: Literal["prompts", "labels", "any"] = "any"

    def __init__(
        self,
        rewards: Mapping[str, Reward] | Sequence[Reward],
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        normalisation: Mapping[str, Normalisation] | None = None,
        class_names: Sequence[str] | None = None,
        name: str = "composite",
    ) -> None:
        super().__init__(name=name, class_names=class_names)
        names = tuple(rewards if isinstance(rewards, Mapping) else (reward.name for reward in rewards))
        if not names:
            raise ValueError("rewards: expected at least one, got none")
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: expected names that are unique, got {', '.join(names)}")
        self.names = names
        self.rewards = nn.ModuleList(rewards.values() if isinstance(rewards, Mapping) else rewards)
        self.weights = _weights(weights, names=names)
        self.normalisation = dict(normalisation or {})
        _check_names(self.normalisation, names=names, key="normalisation")

    def place(self) -> torch.device | None:
        """Nowhere: each reward takes the images to its own device."""
        return None

    def read(self, conditions: Conditions) -> Conditions:
        """What the rewards are given: labels as prompts where there are `class_names`."""
        if self.class_names is None:
            return conditions
        return as_prompts(conditions, name=self.name, class_names=self.class_names)

    def scores(self, images: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """Each reward's own scores (B,) by name, neither weighted nor normalised.

        Args:
            images: (B, 3, H, W), float, in [0, 1].
            conditions: B prompts or labels that every one of the rewards can read.
        """
        scores, conditions = {}, self.read(conditions)
        for name, reward in zip(self.names, self.rewards, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights[name] != 0):
                scores[name] = reward(images, conditions)
        return scores

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what `scores` returned, in float32 or better."""
        total = None
        for name, weight in self.weights.items():
            if weight == 0:
                continue
            score = scores[name].to(torch.promote_types(scores[name].dtype, torch.float32))
            scale = self.normalisation.get(name, Normalisation())
            term = weight * (score - scale.mean) / scale.std
            total = term if total is None else total + term
        assert total is not None, "at least one weight is not 0"
        return total

    def forward(self, images: Tensor, conditions: Conditions) -> Tensor:
        """The weighted sum (B,) alone."""
        return self.combine(self.scores(images, conditions))


def _weights(given: Mapping[str, float] | Sequence[float] | None, *, names: tuple[str, ...]) -> dict[str, float]:
    if given is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(given, Mapping):
        _check_names(given, names=names, key="weights")
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"weights: expected one for each reward, got none for {', '.join(missing)}")
        weights = {name: float(given[name]) for name in names}
    else:
        if len(given) != len(names):
            raise ValueError(f"weights: expected one for each of the {len(names)} rewards, got {len(given)}")
        weights = dict(zip(names, map(float, given), strict=True))
    if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
        raise ValueError(f"weights: expected finite numbers that are not all 0, got {list(weights.values())}")
    return weights


def _check_names(given: Mapping[str, object], *, names: tuple[str, ...], key: str) -> None:
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{key}: expected names among {', '.join(names)}, got {', '.join(unknown)}")
