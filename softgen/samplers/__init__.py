"""Samplers as the authors of published models wrote them, one file a family; the general ones are in sampling.py."""

from softgen.samplers.maskbit import MaskBitSampler
from softgen.samplers.maskgit import PublishedMaskGITSampler
from softgen.samplers.titok import TiTokSampler

__all__ = ["MaskBitSampler", "PublishedMaskGITSampler", "TiTokSampler"]
