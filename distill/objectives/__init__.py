"""What is added up in L_gen, one file an objective."""

from distill.objectives.base import DistillState, Objective, ObjectiveLosses
from distill.objectives.dimo import DiMO

__all__ = ["DiMO", "DistillState", "Objective", "ObjectiveLosses"]
