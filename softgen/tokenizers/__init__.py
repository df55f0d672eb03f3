"""Image tokenizers."""

from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.conv_vq import ConvVQTokenizer

__all__ = ["ConvVQTokenizer", "ImageTokenizer"]
