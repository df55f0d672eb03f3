"""Masked diffusion models, one-step generators, and an autoregressive model."""

from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import ImageCodeModel, MaskedDiffusionModel, ModelOutput
from softgen.models.conditions import ClassCondition, Condition, TextCondition
from softgen.models.generator import OneStepGenerator
from softgen.models.maskbit import MaskBit
from softgen.models.maskgen import MaskGen
from softgen.models.maskgit import MaskGIT
from softgen.models.meissonic import Meissonic
from softgen.models.open_clip_models import OpenCLIP
from softgen.models.pretrained_text import PretrainedTextEncoder
from softgen.models.sit import SiT
from softgen.models.text import TextEncoder, WordTextEncoder
from softgen.models.titok_generators import ImageBert, UViTBert
from softgen.models.transformer import MaskedTransformer

__all__ = [
    "AutoregressiveTransformer",
    "ClassCondition",
    "Condition",
    "ImageBert",
    "ImageCodeModel",
    "MaskBit",
    "MaskGIT",
    "MaskGen",
    "MaskedDiffusionModel",
    "MaskedTransformer",
    "Meissonic",
    "ModelOutput",
    "OneStepGenerator",
    "OpenCLIP",
    "PretrainedTextEncoder",
    "SiT",
    "TextCondition",
    "TextEncoder",
    "UViTBert",
    "WordTextEncoder",
]
