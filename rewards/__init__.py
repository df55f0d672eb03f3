"""Reward models, usable on their own: differentiable scores of images under prompts or class labels."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards.base import Reward
    from rewards.classifier import ClassifierReward
    from rewards.clip import CLIPReward
    from rewards.composite import CompositeReward, Normalisation
    from rewards.conditions import Conditions
    from rewards.probe import check_reward
    from rewards.registry import available, build

__all__ = [
    "CLIPReward",
    "ClassifierReward",
    "CompositeReward",
    "Conditions",
    "Normalisation",
    "Reward",
    "available",
    "build",
    "check_reward",
]

_HOMES = {
    "CLIPReward": "clip",
    "ClassifierReward": "classifier",
    "CompositeReward": "composite",
    "Conditions": "conditions",
    "Normalisation": "composite",
    "Reward": "base",
    "available": "registry",
    "build": "registry",
    "check_reward": "probe",
}


def __getattr__(name: str) -> object:
    # Lazy: `python -m rewards list` stays free of torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"rewards.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rewards' has no attribute {name!r}")
