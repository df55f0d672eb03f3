"""Samplers as the authors of published models wrote them, one file a family; the general ones are in sampling.py."""

from softgen.samplers.maskgit import PublishedMaskGITSampler

__all__ = ["PublishedMaskGITSampler"]
