"""Distillation of masked diffusion models into one-step generators, and their refinement."""

from distill.objectives import DiMO, Objective
from distill.soft_dimo import SoftDiMO

__all__ = ["DiMO", "Objective", "SoftDiMO"]
