"""Lightning modules of the stages before distillation."""

from softgen.training.adversarial import Adversarial
from softgen.training.alignment import Align
from softgen.training.clip import CLIPTraining
from softgen.training.flow import FlowTraining
from softgen.training.optimization import OptimizerConfig, ParameterGroup
from softgen.training.perceptual import Perceptual
from softgen.training.sftok import SFTokTraining
from softgen.training.stage import Stage
from softgen.training.teacher import TeacherTraining
from softgen.training.tokenizer import TokenizerTraining

__all__ = [
    "Adversarial",
    "Align",
    "CLIPTraining",
    "FlowTraining",
    "OptimizerConfig",
    "ParameterGroup",
    "Perceptual",
    "SFTokTraining",
    "Stage",
    "TeacherTraining",
    "TokenizerTraining",
]
