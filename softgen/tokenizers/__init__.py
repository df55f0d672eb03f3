"""Image tokenizers."""

from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.conv_vq import ConvVQTokenizer
from softgen.tokenizers.taming_vqgan import TamingVQGAN

__all__ = ["ConvVQTokenizer", "ImageTokenizer", "TamingVQGAN"]
