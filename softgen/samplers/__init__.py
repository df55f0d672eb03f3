"""Samplers as the authors of published models wrote them, one file a family; the general ones are in sampling.py."""

from softgen.models.base import MaskedDiffusionModel
from softgen.models.maskbit import MaskBit
from softgen.models.maskgen import MaskGen
from softgen.models.maskgit import MaskGIT
from softgen.models.meissonic import Meissonic
from softgen.models.titok_generators import ImageBert, UViTBert
from softgen.samplers.maskbit import MaskBitSampler
from softgen.samplers.maskgen import MaskGenSampler
from softgen.samplers.maskgit import PublishedMaskGITSampler
from softgen.samplers.meissonic import MeissonicSampler
from softgen.samplers.titok import TiTokSampler
from softgen.sampling import Sampler

__all__ = [
    "MaskBitSampler",
    "MaskGenSampler",
    "MeissonicSampler",
    "PublishedMaskGITSampler",
    "TiTokSampler",
    "published_sampler",
]


_SFTOK = (64, 8192)


def published_sampler(model: MaskedDiffusionModel, *, key: str = "sampler") -> Sampler:
    """The sampler of a model's family at the settings that its published checkpoint was measured with.

    A model of a size of its own gets those of a published one: of MaskGIT and Meissonic the one for 256 pixels and with
    `downsample`, of ImageBert those of TiTok's L-32. 64 sites of 8,192 codes are SFTok's generator.

    Raises:
        ValueError: If none were published for the family, or for these bits of MaskBit.
    """
    if isinstance(model, MaskGIT):
        if model.config["img_size"] == 512:
            return PublishedMaskGITSampler(steps=15, guidance=2.8, confidence_noise=7.0)
        return PublishedMaskGITSampler()
    if isinstance(model, Meissonic):
        return MeissonicSampler(steps=64 if model.downsample else 48)
    if isinstance(model, MaskGen):
        return MaskGenSampler()
    if isinstance(model, MaskBit):
        return MaskBitSampler.published(model.config["bits"])
    if isinstance(model, ImageBert):
        if (model.num_sites, model.num_codes) == _SFTOK:
            return TiTokSampler(guidance_decay="constant", randomize_temperature=1.0)
        if model.num_sites == 64:
            return TiTokSampler(guidance=3.0, randomize_temperature=11.0)
        return TiTokSampler()
    if isinstance(model, UViTBert):
        return TiTokSampler(steps=64, guidance=6.9, guidance_decay="power-cosine", randomize_temperature=2.8)
    raise ValueError(f"{key}: expected maskgit or halton, since no sampler was published for a {type(model).__name__}")
