"""Distillation of masked diffusion models into one-step generators, and their refinement."""

from distill.objectives import GAN, DiMO, DistillState, Objective, ObjectiveLosses, Reward, Sharpen
from distill.soft_dimo import SoftDiMO

__all__ = ["GAN", "DiMO", "DistillState", "Objective", "ObjectiveLosses", "Reward", "Sharpen", "SoftDiMO"]
