"""The tokenizers of the text-to-image families on tiny random weights: diffusers' VQModel and TA-TiTok."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softgen.tokenizers import DiffusersVQ, ImageTokenizer, TATiTok
from tests.models.text_towers import LENGTH, save_clip_text

VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 4}
TATITOK: dict[str, Any] = {"image_size": 16, "codebook_size": 9, "token_size": 4, "num_latent_tokens": 5}
TATITOK |= {"encoder": VIT, "decoder": VIT, "text_context_length": LENGTH, "text_embed_dim": 16}
VQ: dict[str, Any] = {"image_size": 16, "block_out_channels": [8, 12], "layers_per_block": 1, "latent_channels": 6}
VQ |= {"num_vq_embeddings": 9, "norm_num_groups": 4}


def randomised(tokenizer: ImageTokenizer) -> ImageTokenizer:
    torch.manual_seed(2)
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return tokenizer.eval()


def diffusers_vq(**changes: Any) -> DiffusersVQ:
    tokenizer = randomised(DiffusersVQ(**{**VQ, **changes}))
    assert isinstance(tokenizer, DiffusersVQ)
    return tokenizer


def tatitok(**changes: Any) -> TATiTok:
    tokenizer = randomised(TATiTok(**{**TATITOK, **changes}))
    assert isinstance(tokenizer, TATiTok)
    return tokenizer


def states(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, LENGTH, 16)


@pytest.mark.parametrize("kind", ["vq", "vq with attention", "vq of another width", "tatitok"])
def test_tokens_and_images(kind: str) -> None:
    tokenizer: ImageTokenizer
    if kind == "tatitok":
        tokenizer = tatitok().under_states(states())
    else:
        changes = {"vq": {}, "vq with attention": {"mid_block_add_attention": True}}.get(kind, {"vq_embed_dim": 3})
        tokenizer = diffusers_vq(**changes)
        assert any("attentions" in name for name in tokenizer.state_dict()) == (kind == "vq with attention")
    images = torch.rand(2, 3, 16, 16)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, tokenizer.num_sites)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(decoded, tokenizer.decode_embeddings(tokenizer.codebook[tokens]))
    one_hot = F.one_hot(tokens, 9).float()
    torch.testing.assert_close(tokenizer.embed_soft(one_hot), tokenizer.codebook[tokens], rtol=0, atol=1e-7)
    nearest = torch.cdist(tokenizer.latents(images), tokenizer.codebook.expand(2, -1, -1)).argmin(-1)
    assert torch.equal(tokens, nearest)
    logits = torch.randn(2, tokenizer.num_sites, 9, requires_grad=True)
    tokenizer.decode_embeddings(tokenizer.embed_soft(logits.softmax(-1))).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).all()
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..8, got 9$"):
        tokenizer.decode(torch.full_like(tokens, 9))
    with pytest.raises(ValueError, match=r"^images: expected shape"):
        tokenizer.encode(torch.rand(2, 3, 8, 8))


def test_grids_need_not_be_square() -> None:
    tokenizer = diffusers_vq()
    grid = tokenizer.latent_grid(torch.rand(1, 3, 16, 24))
    assert grid.shape == (1, 6, 8, 12)
    assert tokenizer.decode_grid(grid).shape == (1, 3, 16, 24)


def test_the_decoder_looks_at_the_text_and_the_encoder_does_not() -> None:
    tokenizer, one = tatitok(), states()
    tokens = torch.randint(9, (2, 5))
    first, second = tokenizer.under_states(one), tokenizer.under_states(states())
    assert (first.decode_raw(first.codebook[tokens]) - second.decode_raw(second.codebook[tokens])).abs().max() > 1e-4
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(first.latents(images), tokenizer.latents(images))
    assert first.decoder is tokenizer.decoder
    with pytest.raises(ValueError, match=r"^tokenizer: expected text to decode for, from tokenizer.under\(prompts\)"):
        tokenizer.decode(tokens)
    with pytest.raises(ValueError, match=r"^tokenizer: expected 2 images as there are prompts, got 1$"):
        first.decode(tokens[:1])
    with pytest.raises(ValueError, match=r"^states: expected shape \(B, 7, 16\), got \(2, 3, 16\)$"):
        tokenizer.under_states(torch.zeros(2, 3, 16))
    with pytest.raises(ValueError, match=r"^tokenizer: expected prompts, since its decoder looks at the text, got"):
        tokenizer.under(torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a text encoder, got one whose decoder"):
        tokenizer.under(["a dog"])


def test_prompts_are_read_by_the_text_encoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra softgen[rewards] is not installed")
    from softgen.models.pretrained_text import openai_clip_text

    text = openai_clip_text(str(save_clip_text(tmp_path / "text")), layer=-1)
    tokenizer = tatitok(text_encoder=text)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    opened = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokens = torch.randint(9, (2, 5))
    prompts = ["a dog", "a red cat"]
    expected = tokenizer.under_states(text(prompts).states).decode(tokens)
    assert torch.equal(opened.under(prompts).decode(tokens), expected)
    with pytest.raises(ValueError, match=r"^tokenizer.text_encoder.width: expected 8 as the decoder has, got 16$"):
        tatitok(text_encoder=text, text_embed_dim=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 17}, "tokenizer.image_size: expected a multiple of 2, got 17"),
        ({"norm_num_groups": 8}, "tokenizer.block_out_channels: expected levels of a multiple of 8 channels, got 12"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer") as caught:
        diffusers_vq(**changes)
    assert str(caught.value) == message
