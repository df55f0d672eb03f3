from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewards import Reward


class Brightness(Reward):
    """The mean of the pixels; the prompts only have to be strings."""

    name = "brightness"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert all(isinstance(prompt, str) for prompt in prompts)
        return images.mean(dim=(1, 2, 3))


class Scripted(Reward):
    """Returns what a function makes of the images."""

    takes = "any"

    def __init__(self, function: Callable[[Tensor], Any], *, name: str = "scripted") -> None:
        super().__init__(name=name)
        self.function = function

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        return self.function(images)


class Broken(Reward):
    """Cannot score images of any usual size."""

    name = "broken"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.flatten(1) @ torch.zeros(7, 1)).squeeze(1)


class LinearClassifier(nn.Module):
    """Logits from the flat pixels."""

    def __init__(self, num_classes: int, image_size: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))
