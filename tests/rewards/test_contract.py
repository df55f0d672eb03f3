"""`rewards.testing.check_reward` and `rewards.metrics.RewardScore`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import BUILDERS
from torch import Tensor, nn

from rewards import ClassifierReward, Reward
from rewards.metrics import RewardScore
from rewards.testing import check_reward
from softgen.metrics import SmallClassifier

PROMPTS = ["a red cat", "photo of two blue dog", "a"]


class Good(Reward):
    def __init__(self) -> None:
        super().__init__(name="mine")
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return (images.mean(dim=(2, 3)) * self.weight.float()).sum(dim=1) * lengths


class Batchwise(Good):
    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        return super().forward(images - images.mean(dim=0), prompts)


class Noisy(Good):
    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        return super().forward(images, prompts) + torch.rand(len(images))


class Narrow(Good):
    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        return super().forward(images, prompts).bfloat16()


class Detached(Good):
    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        return super().forward(images.detach(), prompts)


class Trainable(Good):
    def __init__(self) -> None:
        super().__init__()
        self.weight.requires_grad_()


class Stubborn(Good):
    def train(self, mode: bool = True) -> "Stubborn":
        return nn.Module.train(self, mode)


class Overflowing(Good):
    def forward(self, images: Tensor, prompts: Any) -> Tensor:
        scores = super().forward(images, prompts)
        return scores if self.weight.dtype == torch.float32 else scores.to(self.weight.dtype)


def test_a_good_reward_passes() -> None:
    check_reward(Good(), conditions=PROMPTS, image_size=(8, 6))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Batchwise(), "expected scores that do not depend on the rest of the batch, got scores that differ by up to"),
        (Noisy(), "expected the same scores for the same images, got scores that differ by up to"),
        (Narrow(), "expected scores in float32 or better, got torch.bfloat16"),
        (Detached(), "expected a gradient that reaches the pixels, got"),
        (Trainable(), "expected frozen weights, got weight"),
        (Stubborn(), "expected eval mode, whatever train() asks, got training mode"),
        (Overflowing(), "expected scores in float32 from weights in bfloat16, got torch.bfloat16"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_breach_is_named(reward: Reward, message: str) -> None:
    with pytest.raises(ValueError, match=r"^reward mine: ") as caught:
        check_reward(reward, conditions=PROMPTS, image_size=8)
    assert message in str(caught.value)


def test_one_condition_is_too_few() -> None:
    with pytest.raises(ValueError, match=r"^conditions: expected at least two, got 1$"):
        check_reward(Good(), conditions=["a"])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_published_rewards_keep_the_contract(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    check_reward(BUILDERS[name](tmp_path), conditions=PROMPTS, image_size=(40, 32), tolerance=1e-4)


def test_a_classifier_keeps_the_contract() -> None:
    torch.manual_seed(0)
    classifier = SmallClassifier(name="net", image_size=8, num_classes=3, width=4)
    check_reward(ClassifierReward(classifier), conditions=[0, 2, 1], image_size=8)


def test_the_metric_is_the_mean_over_batches() -> None:
    metric, images = RewardScore(Good()), torch.rand(5, 3, 4, 4)
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    metric.update(images[:2], prompts[:2])
    metric.update(images[2:], prompts[2:])
    torch.testing.assert_close(metric.compute(), Good()(images, prompts).mean())
    assert metric.total.dtype == torch.float32  # some accelerators have no float64
    # Over processes both states are added up.
    assert {metric._reductions[name].__name__ for name in ("total", "count")} == {"dim_zero_sum"}
