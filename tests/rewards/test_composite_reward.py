import math
import re

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from toy_rewards import Brightness, LinearClassifier, Scripted

from rewards import ClassifierReward, CompositeReward, Normalisation, Reward, probe_reward
from rewards.compute import Compute

IMAGES = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def red(images: Tensor) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def test_the_sum_is_weighted_and_normalised_and_the_scores_are_not() -> None:
    reward = CompositeReward(
        {"light": Brightness(), "red": Scripted(red)},
        weights={"red": -2.0, "light": 3.0},
        normalisation={"red": Normalisation(mean=0.5, std=0.25)},
    )
    scores = reward.scores(IMAGES, ["a", "b"])
    assert list(scores) == ["light", "red"]
    torch.testing.assert_close(scores["light"], IMAGES.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(scores["red"], red(IMAGES))
    expected = 3 * scores["light"] - 2 * (scores["red"] - 0.5) / 0.25
    torch.testing.assert_close(reward.combine(scores), expected)
    torch.testing.assert_close(reward(IMAGES, ["a", "b"]), expected)


def test_the_gradient_is_the_weighted_sum_of_the_gradients() -> None:
    torch.manual_seed(0)
    reward = CompositeReward([Brightness(), ClassifierReward(LinearClassifier(5))], weights=[2.0, 0.5]).double()
    assert reward.names == ("brightness", "classifier")
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reward(x, ["3", "0"]), images)


def test_a_reward_of_weight_0_is_scored_without_a_graph_and_left_out() -> None:
    held_out = Scripted(lambda images: red(images) * math.inf, name="held out")
    reward = CompositeReward([Brightness(), held_out], weights=[1.0, 0.0])
    images = IMAGES.clone().requires_grad_()
    scores = reward.scores(images, ["a", "b"])
    assert scores["brightness"].requires_grad
    assert not scores["held out"].requires_grad
    torch.testing.assert_close(reward.combine(scores), IMAGES.mean(dim=(1, 2, 3)))


def test_no_gradient_of_a_reward_of_weight_0_is_computed_in_parts_either() -> None:
    wanted: list[bool] = []

    def watched(images: Tensor) -> Tensor:
        wanted.append(images.requires_grad)
        return red(images)

    class InParts(Scripted):
        def __init__(self) -> None:
            super().__init__(watched)
            self.compute = Compute(micro_batch=1)

    images = IMAGES.clone().requires_grad_()
    for weight in (1.0, 0.0):
        CompositeReward([Brightness(), InParts()], weights=[1.0, weight])(images, ["a", "b"]).sum().backward()
    assert wanted == [True, True, False, False]


def test_low_precision_scores_are_summed_in_float32() -> None:
    reward = CompositeReward([Scripted(lambda images: red(images).bfloat16())], weights=[1 / 3])
    assert reward(IMAGES, ["a", "b"]).dtype == torch.float32


def test_a_composite_is_a_reward_and_can_be_nested() -> None:
    inner = CompositeReward([Brightness()], weights=[2.0], name="inner")
    outer = CompositeReward([inner, Scripted(red)])
    torch.testing.assert_close(outer(IMAGES, ["a", "b"]), 2 * IMAGES.mean(dim=(1, 2, 3)) + red(IMAGES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"brightness": 1.0}}, "weights: expected one for each reward, got none for scripted"),
        ({"weights": {"light": 1.0}}, "weights: expected names among brightness, scripted, got light"),
        ({"weights": [1.0]}, "weights: expected one for each of the 2 rewards, got 1"),
        ({"weights": [0.0, 0.0]}, "weights: expected finite numbers that are not all 0, got [0.0, 0.0]"),
        ({"weights": [1.0, math.nan]}, "weights: expected finite numbers that are not all 0, got [1.0, nan]"),
        (
            {"normalisation": {"light": Normalisation()}},
            "normalisation: expected names among brightness, scripted, got light",
        ),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CompositeReward([Brightness(), Scripted(red)], **options)


def test_rewards_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"^rewards: expected names that are unique, got brightness, brightness$"):
        CompositeReward([Brightness(), Brightness()])
    with pytest.raises(ValueError, match=r"^rewards: expected at least one, got none$"):
        CompositeReward({})


@pytest.mark.parametrize(("mean", "std", "key"), [(math.inf, 1.0, "mean"), (0.0, 0.0, "std"), (0.0, math.nan, "std")])
def test_a_normalisation_is_finite(mean: float, std: float, key: str) -> None:
    with pytest.raises(ValueError, match=f"^normalisation.{key}: expected a finite number"):
        Normalisation(mean=mean, std=std)


def test_a_composite_can_be_written_as_a_config() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    config = {
        "class_path": "rewards.CompositeReward",
        "init_args": {
            "rewards": {"light": {"class_path": "toy_rewards.Brightness"}},
            "weights": {"light": 2.0},
            "normalisation": {"light": {"mean": 0.5, "std": 0.1}},
        },
    }
    reward = parser.instantiate_classes(parser.parse_object({"reward": config})).reward
    assert isinstance(reward, CompositeReward)
    torch.testing.assert_close(reward(IMAGES, ["a", "b"]), 2 * (IMAGES.mean(dim=(1, 2, 3)) - 0.5) / 0.1)


def test_class_names_are_read_once_for_all() -> None:
    composite = CompositeReward([Brightness()], class_names=["a shirt", "a boot"])
    images = torch.rand(2, 3, 4, 4)
    labels = torch.tensor([1, 0])
    torch.testing.assert_close(composite(images, labels), images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(composite.scores(images, labels)["brightness"], images.mean(dim=(1, 2, 3)))
    probe_reward(composite, image_size=4, conditions=labels)
    with pytest.raises(ValueError, match=r"^reward composite: expected labels in \[0, 1\], got 2$"):
        composite(images, [0, 2])
