"""The Taming VQGAN on tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from softgen.tokenizers import TamingVQGAN

SMALL: dict[str, Any] = {"image_size": 8, "n_embed": 7, "embed_dim": 4, "ch": 32, "ch_mult": [1, 2]}
SMALL |= {"num_res_blocks": 1, "attn_resolutions": [4], "resolution": 8, "z_channels": 6}


def build(**changes: Any) -> TamingVQGAN:
    return TamingVQGAN(**{**SMALL, **changes}).eval()


@pytest.mark.parametrize("changes", [{}, {"resamp_with_conv": False}, {"attn_resolutions": []}, {"image_size": 16}])
def test_shapes_and_ranges(changes: dict[str, Any]) -> None:
    tokenizer = build(**changes)
    side = changes.get("image_size", 8)
    images = torch.rand(2, 3, side, side)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, (side // 2) ** 2)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(decoded, tokenizer.decode_embeddings(tokenizer.codebook[tokens]))
    one_hot = F.one_hot(tokens, 7).float()
    torch.testing.assert_close(tokenizer.embed_soft(one_hot), tokenizer.codebook[tokens], rtol=0, atol=0)


def test_codes_are_the_nearest_rows() -> None:
    tokenizer = build()
    latents = torch.randn(2, 16, 4)
    expected = torch.cdist(latents, tokenizer.codebook.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(tokenizer.quantize(latents), expected)


def test_sizes_come_from_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = build()
    state = {name.replace("quantizer.", "quantize."): value for name, value in tokenizer.state_dict().items()}
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(1)}}, tmp_path / "last.ckpt")
    opened = TamingVQGAN.from_checkpoint(tmp_path, image_size=8)
    assert {**opened.config, "attn_resolutions": [4], "resolution": 8} == tokenizer.config
    assert (opened.config["attn_resolutions"], opened.config["resolution"]) == ([128], 256)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(opened.latents(images), tokenizer.latents(images))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer.image_size: expected a multiple of 2, got 7$"):
        build(image_size=7)
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..6, got 7$"):
        build().decode(torch.full((1, 16), 7))
    with pytest.raises(ValueError, match=r"^images: expected shape"):
        build().latents(torch.rand(1, 3, 10, 10))
