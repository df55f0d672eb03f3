"""A trial run of a reward, before anything is optimised by it."""

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.composite import CompositeReward
from rewards.conditions import Conditions
from rewards.errors import one_line


def probe_reward(
    reward: Reward, *, image_size: int | tuple[int, int], conditions: Conditions, gradient: bool = True
) -> None:
    """Score random images and follow the gradient back to their pixels.

    The images come from a generator of their own: the global random state is left as it was.

    Args:
        reward: On the device and in the precision in which it will be used; of a composite, each part is probed.
        image_size: Height and width of the images in pixels; one number for both.
        conditions: B prompts or labels, of the kind that the reward will get.
        gradient: Whether the gradient is asked for; a reward that is only logged needs none.

    Raises:
        ValueError: In one line with the reward's name: it cannot score such images, its scores have the wrong shape or
            are not finite, or the gradient does not reach the pixels or is not finite.
    """
    if isinstance(reward, CompositeReward):
        for name, part in zip(reward.names, reward.rewards, strict=True):
            assert isinstance(part, Reward)
            climbed = gradient and reward.weights[name] != 0
            probe_reward(part, image_size=image_size, conditions=reward.read(conditions), gradient=climbed)
        return
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(len(conditions), 3, height, width, generator=generator)
    # A probe inside a validation loop still needs a graph.
    with torch.inference_mode(False), torch.enable_grad():
        images = pixels.clone().to(_device(reward)).requires_grad_()
        try:
            scores = reward(images, conditions)
            _check_finite(scores, what="scores", reward=reward)
            if not gradient:
                return
            slope = _gradient(scores, images, reward=reward)
        except RuntimeError as error:
            wanted = f"to score images of {height}x{width}{' with a gradient' if gradient else ''}"
            raise ValueError(f"reward {reward.name}: expected {wanted}, got an error ({one_line(error)})") from error
        _check_finite(slope, what="gradients", reward=reward)


def _gradient(scores: Tensor, images: Tensor, *, reward: Reward) -> Tensor:
    problem = f"reward {reward.name}: expected a gradient that reaches the pixels, got"
    if not scores.requires_grad:
        raise ValueError(f"{problem} scores without a graph (detached, or computed under no_grad)")
    (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{problem} scores that do not depend on the images")
    if not gradient.any():
        raise ValueError(f"{problem} zero at every pixel (rounded, or quantised)")
    return gradient


def _check_finite(values: Tensor, *, what: str, reward: Reward) -> None:
    values = values.detach()
    wrong = values[~values.isfinite()]
    if len(wrong):
        raise ValueError(f"reward {reward.name}: expected finite {what}, got {float(wrong[0])}")


def _device(reward: Reward) -> torch.device:
    for tensor in (*reward.parameters(), *reward.buffers()):
        return tensor.device
    return torch.get_default_device()
