"""Reward models as metrics."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from rewards.base import Reward
from rewards.conditions import Conditions


class RewardScore(Metric):
    """The mean score of a reward over all images seen, on every process together.

    Args:
        reward: The reward; frozen, and moved along with the metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, reward: Reward, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reward = reward
        self.add_state("total", default=torch.zeros(()), dist_reduce_fx="sum")  # MPS has no float64
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images: Tensor, conditions: Conditions) -> None:
        """Score a batch.

        Args:
            images: (B, 3, H, W), float, in [0, 1].
            conditions: B prompts or labels, as the reward takes them.
        """
        scores = self.reward(images, conditions)
        self.total += scores.float().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The mean, a scalar, float32; NaN before the first image."""
        return self.total / self.count
