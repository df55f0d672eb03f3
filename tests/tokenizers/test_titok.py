"""TiTok and MaskGIT's VQGAN on tiny random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.tokenizers import ImageTokenizer, MaskGITVQGAN, TiTok

VIT = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4}
PIXELS = {"channel_mult": [1, 1, 2], "hidden_channels": 32, "num_res_blocks": 1, "z_channels": 6, "num_channels": 3}
TWO_STAGE: dict[str, Any] = {"image_size": 16, "codebook_size": 9, "token_size": 4, "num_latent_tokens": 5}
TWO_STAGE |= {"encoder": VIT, "decoder": {**VIT, "depth": 1}, "proxy_codebook_size": 7, "pixel_decoder": PIXELS}
SINGLE = {**TWO_STAGE, "is_legacy": False, "use_l2_norm": False, "pixel_decoder": None, "proxy_codebook_size": 1024}
VQGAN: dict[str, Any] = {"image_size": 16, "codebook_size": 9, **PIXELS}


def build(kind: str) -> ImageTokenizer:
    tokenizer: ImageTokenizer
    tokenizer = {"vqgan": MaskGITVQGAN, "two-stage": TiTok, "single-stage": TiTok}[kind](
        **{"vqgan": VQGAN, "two-stage": TWO_STAGE, "single-stage": SINGLE}[kind]
    )
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return tokenizer.eval()


def published(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    return {
        name.replace("quantizer.", "quantize.") if name.startswith("quantizer.") else name: value
        for name, value in tokenizer.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["vqgan", "two-stage", "single-stage"])
def test_tokens_and_images(kind: str) -> None:
    tokenizer = build(kind)
    images = torch.rand(2, 3, 16, 16)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, tokenizer.num_sites)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(decoded, tokenizer.decode_embeddings(tokenizer.codebook[tokens]))
    one_hot = F.one_hot(tokens, tokenizer.num_codes).float()
    torch.testing.assert_close(tokenizer.embed_soft(one_hot), tokenizer.codebook[tokens], rtol=0, atol=1e-7)
    latents = tokenizer.latents(images)
    nearest = torch.cdist(latents, tokenizer.codebook.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(tokens, nearest)
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..8, got 9$"):
        tokenizer.decode(torch.full_like(tokens, 9))
    with pytest.raises(ValueError, match=r"^images: expected shape"):
        tokenizer.encode(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("kind", ["vqgan", "two-stage", "single-stage"])
def test_the_gradient_of_pixels_reaches_the_distributions(kind: str) -> None:
    tokenizer = build(kind)
    logits = torch.randn(1, tokenizer.num_sites, 9, requires_grad=True)
    tokenizer.decode_embeddings(tokenizer.embed_soft(logits.softmax(-1))).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).all()


def test_expected_codes_are_averaged_before_they_are_normalised() -> None:
    tokenizer = build("two-stage")
    assert isinstance(tokenizer, TiTok)
    probs = torch.randn(2, 5, 9).softmax(-1)
    expected = F.normalize(probs @ tokenizer.quantizer.embedding.weight, dim=-1)
    torch.testing.assert_close(tokenizer.embed_soft(probs), expected)
    assert (expected - F.normalize(probs @ tokenizer.codebook, dim=-1)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["vqgan", "two-stage", "single-stage"])
def test_sizes_come_from_the_checkpoint(kind: str, tmp_path: Path) -> None:
    tokenizer = build(kind)
    save_file(published(tokenizer), tmp_path / "model.safetensors")
    if kind == "vqgan":
        opened: ImageTokenizer = MaskGITVQGAN.from_checkpoint(tmp_path, image_size=16)
    else:
        opened = TiTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    assert opened.config == tokenizer.config
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(opened.latents(images), tokenizer.latents(images))
    opened.save_pretrained(tmp_path / "saved")
    again = ImageTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))


@pytest.mark.parametrize("multiples", [[2, 2], [2, 3], [2, 1], [3, 2]])
def test_levels_of_any_widths_come_from_the_checkpoint(multiples: list[int], tmp_path: Path) -> None:
    vqgan = MaskGITVQGAN(**{**VQGAN, "channel_mult": multiples})
    save_file(published(vqgan), tmp_path / "model.safetensors")
    assert MaskGITVQGAN.from_checkpoint(tmp_path, image_size=16).config == vqgan.config
    halves = {"decoder": {**VIT, "patch_size": 2}, "pixel_decoder": {**PIXELS, "channel_mult": multiples}}
    titok = TiTok(**{**TWO_STAGE, **halves}).eval()
    save_file(published(titok), tmp_path / "model.safetensors")
    opened = TiTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    tokens = torch.randint(9, (1, 5))
    assert torch.equal(opened.decode(tokens), titok.decode(tokens))


@pytest.mark.parametrize("kind", ["two-stage", "single-stage"])
def test_the_config_beside_a_checkpoint_says_whether_codes_are_normalised(kind: str, tmp_path: Path) -> None:
    state = published(build(kind))
    save_file({**state, "quantize.embed_prob": torch.zeros(9)}, tmp_path / "model.safetensors")
    usual = kind == "two-stage"
    heads = {"encoder_heads": 2, "decoder_heads": 2}
    assert TiTok.from_checkpoint(tmp_path, **heads).use_l2_norm == usual
    (tmp_path / "config.json").write_text(json.dumps({"model": {"vq_model": {"use_l2_norm": not usual}}}))
    assert TiTok.from_checkpoint(tmp_path, **heads).use_l2_norm != usual
    assert TiTok.from_checkpoint(tmp_path, **heads, use_l2_norm=usual).use_l2_norm == usual


def test_a_stage_1_checkpoint_encodes_and_says_what_it_lacks(tmp_path: Path) -> None:
    state = {name: value for name, value in published(build("two-stage")).items() if not name.startswith("pixel_")}
    save_file(state, tmp_path / "model.safetensors")
    opened = TiTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    tokens = opened.encode(torch.rand(1, 3, 16, 16))
    assert opened.proxy_logits(opened.codebook[tokens]).shape == (1, 7, 4, 4)
    with pytest.raises(ValueError, match=r"^tokenizer: expected a TiTok with a pixel decoder, got one of stage 1"):
        opened.decode(tokens)
    single = build("single-stage")
    assert isinstance(single, TiTok)
    with pytest.raises(ValueError, match=r"^tokenizer: expected a two-stage TiTok, got a single-stage one"):
        single.proxy_logits(single.codebook[tokens])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "tokenizer.image_size: expected a multiple of the encoder's patch, 4, got 18"),
        ({"encoder": {**VIT, "heads": 3}}, "tokenizer.encoder.heads: expected a divisor of 16, got 3"),
        ({"encoder": {**VIT, "dept": 1}}, "tokenizer.encoder: expected width, depth, heads, patch_size, got dept"),
        (
            {"pixel_decoder": {"z_channels": 6}},
            "tokenizer.pixel_decoder: expected channel_mult, hidden_channels, num_res_blocks, got z_channels",
        ),
        (
            {"pixel_decoder": {**PIXELS, "channel_mult": [1, 1]}},
            "tokenizer.pixel_decoder.channel_mult: expected levels that make 4 pixels of the decoder's patch, each but "
            "the first twice as many, got 2 levels",
        ),
        ({"is_legacy": False}, "tokenizer.pixel_decoder: expected none in a single-stage model, got one"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer") as caught:
        TiTok(**{**TWO_STAGE, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": []}, "tokenizer.channel_mult: expected at least one level, got none"),
        ({"hidden_channels": 48}, "tokenizer.hidden_channels: expected levels of a multiple of 32 channels, got 48"),
        ({"channel_mult": [1, 0]}, "tokenizer.channel_mult: expected levels of a multiple of 32 channels, got 0"),
        ({"codebook_size": 0}, "tokenizer.codebook_size: expected at least 1, got 0"),
        ({"num_res_blocks": 0}, "tokenizer.num_res_blocks: expected at least 1, got 0"),
    ],
)
def test_sizes_of_the_vqgan_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer") as caught:
        MaskGITVQGAN(**{**VQGAN, **changes})
    assert str(caught.value) == message


def test_the_vqgan_fits_any_multiple_of_its_factor() -> None:
    assert MaskGITVQGAN(**{**VQGAN, "image_size": 32}).num_sites == 64
    with pytest.raises(ValueError, match=r"^tokenizer.image_size: expected a multiple of 4, got 18$"):
        MaskGITVQGAN(**{**VQGAN, "image_size": 18})
