"""The contract of a reward, as a test that anyone can run on their own."""

import copy

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.conditions import Conditions
from rewards.probe import probe_reward

__all__ = ["check_reward"]


def check_reward(
    reward: Reward,
    *,
    conditions: Conditions,
    image_size: int | tuple[int, int] = 64,
    gradient: bool = True,
    bfloat16: bool = True,
    tolerance: float = 1e-4,
) -> None:
    """Try a reward on random images, and refuse one that breaks the contract.

    Shape and dtype of the scores; a finite gradient that reaches the pixels; the same scores again for the same images;
    one image's score whatever the others of its batch; no weight with a gradient, eval mode whatever `train()` asks;
    and a copy with weights in bfloat16 that still scores in float32 or better.

    Args:
        reward: In float32, on the device that it is to be tried on.
        conditions: At least two prompts or labels.
        image_size: Height and width of the images in pixels; one number for both.
        gradient: Whether the gradient is looked at.
        bfloat16: Whether the copy in bfloat16 is tried; one that stays in float32 passes.
        tolerance: Of one image alone against the batch, relative and absolute.

    Raises:
        ValueError: Naming the reward, what was expected and what was got.
    """
    if len(conditions) < 2:
        raise ValueError(f"conditions: expected at least two, got {len(conditions)}")
    probe_reward(reward, image_size=image_size, conditions=conditions, gradient=gradient)
    device = next((tensor.device for tensor in (*reward.parameters(), *reward.buffers())), torch.get_default_device())
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(conditions), 3, height, width, generator=generator).to(device)
    with torch.no_grad():
        scores = reward(images, conditions)
        _check(reward, "scores in float32 or better", scores.dtype in (torch.float32, torch.float64), scores.dtype)
        again = reward(images, conditions)
        _check(reward, "the same scores for the same images", torch.equal(again, scores), _apart(again, scores))
        alone = torch.cat([reward(images[i : i + 1], conditions[i : i + 1]) for i in range(len(images))])
        close = torch.allclose(alone, scores, rtol=tolerance, atol=tolerance)
        _check(reward, "scores that do not depend on the rest of the batch", close, _apart(alone, scores))
    trained = [name for name, parameter in reward.named_parameters() if parameter.requires_grad]
    _check(reward, "frozen weights", not trained, ", ".join(trained[:1]) or "none")
    training = any(module.training for module in copy.copy(reward).train().modules())
    _check(reward, "eval mode, whatever train() asks", not training, "training mode")
    if bfloat16:
        half = copy.deepcopy(reward).to(torch.bfloat16)
        with torch.no_grad():
            narrow = half(images, conditions)
        _check(reward, "finite scores from weights in bfloat16", bool(narrow.isfinite().all()), narrow.tolist())
        fine = narrow.dtype in (torch.float32, torch.float64)
        _check(reward, "scores in float32 from weights in bfloat16", fine, narrow.dtype)


def _check(reward: Reward, expected: str, held: object, got: object) -> None:
    if not held:
        raise ValueError(f"reward {reward.name}: expected {expected}, got {got}")


def _apart(one: Tensor, other: Tensor) -> str:
    return f"scores that differ by up to {float((one - other).abs().max()):.3g}"
