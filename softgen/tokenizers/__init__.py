"""Image tokenizers."""

from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.conv_vq import ConvVQTokenizer
from softgen.tokenizers.maskbit import MaskBitTokenizer
from softgen.tokenizers.maskgit_vqgan import MaskGITVQGAN
from softgen.tokenizers.taming_vqgan import TamingVQGAN
from softgen.tokenizers.titok import TiTok
from softgen.tokenizers.vqgan_plus import VQGANPlusTokenizer

__all__ = [
    "ConvVQTokenizer",
    "ImageTokenizer",
    "MaskBitTokenizer",
    "MaskGITVQGAN",
    "TamingVQGAN",
    "TiTok",
    "VQGANPlusTokenizer",
]
