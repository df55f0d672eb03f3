"""Tokenizers with weights in bfloat16 take ordinary images and code vectors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from softgen.tokenizers import (
    ContinuousTokenizer,
    ConvVQTokenizer,
    DiffusersVQ,
    ImageTokenizer,
    MaskBitTokenizer,
    MaskGITVQGAN,
    SFTok,
    SoftVQ,
    TamingVQGAN,
    TiTok,
    VQGANPlusTokenizer,
)

VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4}
PIXELS: dict[str, Any] = {"channel_mult": [1, 1, 2], "hidden_channels": 32, "num_res_blocks": 1, "z_channels": 6}
PIXELS |= {"num_channels": 3}
TOKENS: dict[str, Any] = {"image_size": 16, "codebook_size": 9, "token_size": 4, "num_latent_tokens": 5}
TOKENS |= {"encoder": VIT, "decoder": VIT, "proxy_codebook_size": 7, "pixel_decoder": PIXELS}
CONV: dict[str, Any] = {"image_size": 16, "hidden_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1}
BUILD: dict[str, Callable[[], nn.Module]] = {
    "conv_vq": lambda: ConvVQTokenizer(image_size=16, num_codes=5, channels=[8, 8]),
    "diffusers_vq": lambda: DiffusersVQ(
        image_size=16, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, num_vq_embeddings=5
    ),
    "maskbit": lambda: MaskBitTokenizer(bits=4, **CONV),
    "maskgit_vqgan": lambda: MaskGITVQGAN(image_size=16, codebook_size=9, **PIXELS),
    "sftok": lambda: SFTok(steps=2, **TOKENS),
    "softvq": lambda: SoftVQ(
        image_size=16, num_latents=6, codebook_size=9, latent_dim=4, groups=2, encoder=VIT, decoder=VIT
    ),
    "taming_vqgan": lambda: TamingVQGAN(
        image_size=16, n_embed=5, embed_dim=4, ch=32, ch_mult=[1, 1], num_res_blocks=1, z_channels=4
    ),
    "titok": lambda: TiTok(**TOKENS),
    "titok, one stage": lambda: TiTok(**{**TOKENS, "is_legacy": False, "pixel_decoder": None}),
    "vqgan_plus": lambda: VQGANPlusTokenizer(codebook_size=5, token_size=4, **CONV),
}


@pytest.mark.parametrize("name", BUILD)
def test_half_precision(name: str) -> None:
    tokenizer = BUILD[name]().eval().to(torch.bfloat16)
    images = torch.rand(2, 3, 16, 16)
    assert isinstance(tokenizer, (ImageTokenizer, ContinuousTokenizer))
    with torch.no_grad():
        decoded = tokenizer.decode(tokenizer.encode(images))
        if isinstance(tokenizer, ImageTokenizer):
            probs = torch.rand(2, tokenizer.num_sites, tokenizer.num_codes).softmax(dim=-1)
            assert tokenizer.decode_embeddings(tokenizer.embed_soft(probs).float()).shape == images.shape
    assert decoded.shape == images.shape
    assert bool(decoded.isfinite().all())
