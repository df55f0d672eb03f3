"""Reward models, usable on their own: differentiable scores of images under prompts or class labels."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards.aesthetic import AestheticReward
    from rewards.base import Reward
    from rewards.classifier import ClassifierReward
    from rewards.clip import CLIPReward
    from rewards.composite import CompositeReward, Normalisation
    from rewards.compute import Compute
    from rewards.conditions import Conditions
    from rewards.hpsv2 import HPSv2Reward
    from rewards.hpsv3 import HPSv3Reward
    from rewards.imagereward import ImageRewardReward
    from rewards.isolated import Isolated
    from rewards.pickscore import PickScoreReward
    from rewards.probe import probe_reward
    from rewards.registry import available, build

__all__ = [
    "AestheticReward",
    "CLIPReward",
    "ClassifierReward",
    "CompositeReward",
    "Compute",
    "Conditions",
    "HPSv2Reward",
    "HPSv3Reward",
    "ImageRewardReward",
    "Isolated",
    "Normalisation",
    "PickScoreReward",
    "Reward",
    "available",
    "build",
    "probe_reward",
]

_HOMES = {
    "AestheticReward": "aesthetic",
    "CLIPReward": "clip",
    "ClassifierReward": "classifier",
    "CompositeReward": "composite",
    "Compute": "compute",
    "Conditions": "conditions",
    "HPSv2Reward": "hpsv2",
    "HPSv3Reward": "hpsv3",
    "ImageRewardReward": "imagereward",
    "Isolated": "isolated",
    "Normalisation": "composite",
    "PickScoreReward": "pickscore",
    "Reward": "base",
    "available": "registry",
    "build": "registry",
    "probe_reward": "probe",
}


def __getattr__(name: str) -> object:
    # Lazy: `python -m rewards list` stays free of torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"rewards.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rewards' has no attribute {name!r}")
