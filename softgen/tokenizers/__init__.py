"""Image tokenizers."""

from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer
from softgen.tokenizers.conv_vq import ConvVQTokenizer
from softgen.tokenizers.diffusers_vq import DiffusersVQ
from softgen.tokenizers.maskbit import MaskBitTokenizer
from softgen.tokenizers.maskgit_vqgan import MaskGITVQGAN
from softgen.tokenizers.sftok import SFTok
from softgen.tokenizers.softvq import SoftVQ
from softgen.tokenizers.taming_vqgan import TamingVQGAN
from softgen.tokenizers.tatitok import TATiTok
from softgen.tokenizers.titok import TiTok
from softgen.tokenizers.vqgan_plus import VQGANPlusTokenizer

__all__ = [
    "ContinuousTokenizer",
    "ConvVQTokenizer",
    "DiffusersVQ",
    "ImageTokenizer",
    "MaskBitTokenizer",
    "MaskGITVQGAN",
    "SFTok",
    "SoftVQ",
    "TATiTok",
    "TamingVQGAN",
    "TiTok",
    "VQGANPlusTokenizer",
]
