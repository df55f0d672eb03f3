"""What is added up in L_gen, one file an objective."""

from distill.objectives.base import DistillState, Objective, ObjectiveLosses
from distill.objectives.dimo import DiMO
from distill.objectives.gan import GAN
from distill.objectives.reward import Reward
from distill.objectives.sharpen import Sharpen

__all__ = ["GAN", "DiMO", "DistillState", "Objective", "ObjectiveLosses", "Reward", "Sharpen"]
