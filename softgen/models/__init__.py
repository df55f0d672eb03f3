"""Masked diffusion models and one-step generators."""

from softgen.models.base import MaskedDiffusionModel, ModelOutput
from softgen.models.conditions import ClassCondition, Condition
from softgen.models.generator import OneStepGenerator
from softgen.models.transformer import MaskedTransformer

__all__ = [
    "ClassCondition",
    "Condition",
    "MaskedDiffusionModel",
    "MaskedTransformer",
    "ModelOutput",
    "OneStepGenerator",
]
