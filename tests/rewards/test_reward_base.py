import math
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from toy_rewards import Brightness, Scripted

import rewards
from rewards import Conditions, Reward, probe_reward
from rewards.conditions import as_labels, as_prompts


class Reader(Reward):
    """Keeps what `forward` was given."""

    def __init__(self, takes: str, class_names: Sequence[str] | None = None) -> None:
        super().__init__(name="reader", class_names=class_names)
        self.takes = takes
        self.read: object = None

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        self.read = conditions
        return images.mean(dim=(1, 2, 3))


IMAGES = torch.full((2, 3, 4, 4), 0.25)


def one_line(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_every_public_name_is_there() -> None:
    assert all(hasattr(rewards, name) for name in rewards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rewards.nothing


def test_a_reward_scores_a_batch_and_stays_in_eval_mode() -> None:
    reward = Brightness()
    assert reward.name == "brightness"
    torch.testing.assert_close(reward(IMAGES, ["a", "b"]), torch.tensor([0.25, 0.25]))
    assert not reward.train().training


@pytest.mark.parametrize("labels", [torch.tensor([1, 0]), torch.tensor([1, 0], dtype=torch.int32), [1, 0]])
def test_prompts_are_read_from_strings_and_from_labels(labels: Conditions) -> None:
    reward = Reader("prompts", class_names=["a shirt", "a boot"])
    reward(IMAGES, ("x", "y"))
    assert reward.read == ["x", "y"]
    reward(IMAGES, labels)
    assert reward.read == ["a boot", "a shirt"]


@pytest.mark.parametrize("conditions", [torch.tensor([1, 0]), [1, 0], ["1", "0"], ["boot", "shirt"], ["boot", "0"]])
def test_labels_are_read_from_integers_numbers_and_class_names(conditions: Conditions) -> None:
    reward = Reader("labels", class_names=["shirt", "boot"])
    reward(IMAGES, conditions)
    assert isinstance(reward.read, Tensor)
    assert reward.read.dtype == torch.int64
    assert reward.read.tolist() == [1, 0]


def test_a_class_name_that_looks_like_a_number_is_a_name() -> None:
    assert as_labels(["1", "0"], name="r", class_names=["1", "0"]).tolist() == [0, 1]


def test_a_number_is_a_label_for_prompts_too_where_classes_have_names() -> None:
    assert as_prompts(["1", "a cat"], name="r", class_names=["dog", "cat"]) == ["cat", "a cat"]
    assert as_prompts(["1"], name="r", class_names=["2", "1"]) == ["1"]
    assert as_prompts(["1"], name="r", class_names=None) == ["1"]
    with pytest.raises(ValueError, match=r"^reward r: expected labels in \[0, 1\], got 2$"):
        as_prompts(["2"], name="r", class_names=["dog", "cat"])


def test_labels_are_checked_before_they_become_words() -> None:
    """Also those on an accelerator, which have to come to the processor in any case."""

    class Away(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

        def cpu(self) -> Tensor:  # type: ignore[override]
            return self.as_subclass(Tensor)

        def long(self) -> Tensor:  # type: ignore[override]
            return self

    for wrong in (2, -1):
        with pytest.raises(ValueError, match=rf"^reward r: expected labels in \[0, 1\], got {wrong}$"):
            as_prompts(torch.tensor([0, wrong]).as_subclass(Away), name="r", class_names=["dog", "cat"])


def test_any_conditions_are_handed_on() -> None:
    reward = Reader("any")
    labels = torch.tensor([3, 4])
    reward(IMAGES, labels)
    assert reward.read is labels


@pytest.mark.parametrize(
    ("images", "conditions", "message"),
    [
        (torch.zeros(2, 1, 4, 4), ["a", "b"], "expected float images (B, 3, H, W), got (2, 1, 4, 4) of torch.float32"),
        (IMAGES.byte(), ["a", "b"], "expected float images (B, 3, H, W), got (2, 3, 4, 4) of torch.uint8"),
        (IMAGES, ["a"], "expected one condition an image, got 1 for 2 images"),
        (IMAGES[:0], [], "expected one condition an image, got 0 for 0 images"),
        (IMAGES, "ab", "expected a list of 2 conditions, got the single string 'ab'"),
        (IMAGES, torch.zeros(2, 1).long(), "expected labels of shape (2,), got (2, 1)"),
        (IMAGES, ["a", 1], "expected all prompts or all integer labels, got a str among them"),
        (IMAGES, [0, True], "expected all prompts or all integer labels, got a bool among them"),
        (IMAGES, torch.zeros(2), "expected labels of an integer type, got torch.float32"),
        (IMAGES, [0, 2], "expected labels in [0, 1], got 2"),
        (IMAGES, [-1, 0], "expected labels in [0, 1], got -1"),
    ],
)
def test_a_wrong_batch_is_named(images: Tensor, conditions: Conditions, message: str) -> None:
    reward = Reader("prompts", class_names=["shirt", "boot"])
    with pytest.raises(ValueError, match=one_line(f"reward reader: {message}")):
        reward(images, conditions)


def test_labels_without_class_names_are_not_prompts() -> None:
    message = "reward r: expected prompts, got class labels (class_names would turn them into words)"
    with pytest.raises(ValueError, match=one_line(message)):
        as_prompts([0, 1], name="r", class_names=None)


def test_an_unknown_class_name_lists_the_known_ones() -> None:
    message = "reward r: expected a class name, one of cat, dog, or a label as a number, got 'cow'"
    with pytest.raises(ValueError, match=one_line(message)):
        as_labels(["cow"], name="r", class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=one_line("reward r: expected a class name or a label as a number, got '-1'")):
        as_labels(["-1"], name="r", class_names=None)


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ([], "expected class_names that are not empty, got []"),
        (["a", " "], "expected class_names that are not empty, got ['a', ' ']"),
        (["a", "b", "a"], "expected class_names to be unique, got 'a' twice"),
        ([0, 1], "expected class_names to be a list of strings, got [0, 1]"),
        ("cat", "expected class_names to be a list of strings, got 'cat'"),
    ],
)
def test_wrong_class_names_are_refused(class_names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=one_line(f"reward reader: {message}")):
        Reader("prompts", class_names=class_names)


@pytest.mark.parametrize("inference", [False, True])
def test_the_probe_passes_a_differentiable_reward_and_leaves_the_random_state_alone(inference: bool) -> None:
    state = torch.get_rng_state()
    with torch.inference_mode(inference):
        probe_reward(Brightness(), image_size=(4, 6), conditions=["a", "b"])
    assert torch.equal(torch.get_rng_state(), state)


def mean(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (mean, None),
        (lambda images: mean(images)[:, None], "expected scores of shape (2,), got shape (2, 1)"),
        (lambda images: mean(images).tolist(), "expected scores of shape (2,), got a list"),
        (lambda images: mean(images) * math.nan, "expected finite scores, got nan"),
        (lambda images: 0 * mean(images) - math.inf, "expected finite scores, got -inf"),
        (lambda images: torch.sqrt(0 * mean(images)), "expected finite gradients, got nan"),
        (
            lambda images: mean(images.detach()),
            "expected a gradient that reaches the pixels, got scores without a graph "
            "(detached, or computed under no_grad)",
        ),
        (
            lambda images: torch.zeros(2, requires_grad=True) + 1,
            "expected a gradient that reaches the pixels, got scores that do not depend on the images",
        ),
        (
            lambda images: mean((images * 255).round()),
            "expected a gradient that reaches the pixels, got zero at every pixel (rounded, or quantised)",
        ),
        (
            lambda images: torch.from_numpy(images.numpy()).mean(dim=(1, 2, 3)),
            "expected to score images of 4x4 with a gradient, got an error (Can't call numpy() on Tensor that "
            "requires grad. Use tensor.detach().numpy() instead.)",
        ),
        (
            lambda images: (images @ torch.zeros(5, 5)).mean(dim=(1, 2, 3)),
            "expected to score images of 4x4 with a gradient, got an error (mat1 and mat2 shapes cannot be multiplied "
            "(24x4 and 5x5))",
        ),
    ],
)
def test_the_probe_names_what_is_wrong(function: object, message: str | None) -> None:
    reward = Scripted(function, name="odd")
    if message is None:
        probe_reward(reward, image_size=4, conditions=[0, 1])
        return
    with pytest.raises(ValueError, match=one_line(f"reward odd: {message}")):
        probe_reward(reward, image_size=4, conditions=[0, 1])
