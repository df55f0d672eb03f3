"""Lightning modules of the stages before distillation."""

from softgen.training.clip import CLIPTraining
from softgen.training.optimization import OptimizerConfig, ParameterGroup
from softgen.training.sftok import SFTokTraining
from softgen.training.stage import Stage
from softgen.training.teacher import TeacherTraining
from softgen.training.tokenizer import TokenizerTraining

__all__ = [
    "CLIPTraining",
    "OptimizerConfig",
    "ParameterGroup",
    "SFTokTraining",
    "Stage",
    "TeacherTraining",
    "TokenizerTraining",
]
