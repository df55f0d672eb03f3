"""The interface of reward models."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Reward(nn.Module, ABC):
    """Scores images under prompts; differentiable in the images, higher is better."""

    @abstractmethod
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score a batch.

        Args:
            images: (B, 3, H, W), float, in [0, 1].
            prompts: B strings.

        Returns:
            (B,), with a gradient that reaches the images.
        """
