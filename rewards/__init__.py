"""Reward models, usable on their own."""

from rewards.base import Reward

__all__ = ["Reward"]
