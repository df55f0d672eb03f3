"""SFTok on tiny random weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from softgen import load_tokenizer
from softgen.categorical import StoredNoise
from softgen.convert import main as convert
from softgen.tokenizers import ConvVQTokenizer, ImageTokenizer, MaskGITVQGAN, SFTok, TiTok
from softgen.tokenizers.optvq import sinkhorn_codes, straight_through
from softgen.tokenizers.sftok_decoder import SFTokDecoder, proxy_loss, self_forced_input

VIT = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4}
PIXELS = {"channel_mult": [1, 1, 2], "hidden_channels": 32, "num_res_blocks": 1, "z_channels": 6, "num_channels": 3}
TINY: dict[str, Any] = {"image_size": 16, "codebook_size": 9, "token_size": 4, "num_latent_tokens": 5}
TINY |= {"encoder": VIT, "decoder": {**VIT, "depth": 1}, "proxy_codebook_size": 7, "pixel_decoder": PIXELS, "steps": 4}


def build(**changes: Any) -> SFTok:
    torch.manual_seed(0)
    tokenizer = SFTok(**{**TINY, **changes})
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return tokenizer.eval()


def published(tokenizer: SFTok) -> dict[str, Tensor]:
    state = {
        name.replace("quantizer.", "quantize.") if name.startswith("quantizer.") else name: value
        for name, value in tokenizer.state_dict().items()
    }
    return {**state, "quantize.index_offset": torch.zeros(1, dtype=torch.long)}


def test_the_contract_of_a_tokenizer() -> None:
    tokenizer = build()
    images = torch.rand(2, 3, 16, 16)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, 5)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    assert torch.equal(decoded, tokenizer.decode_embeddings(tokenizer.codebook[tokens]))
    one_hot = F.one_hot(tokens, 9).float()
    assert torch.equal(tokenizer.embed_soft(one_hot), tokenizer.codebook[tokens])
    assert torch.equal(tokens, torch.cdist(tokenizer.latents(images), tokenizer.codebook.expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(9))


def test_nearest_codes_and_images_do_not_depend_on_the_batch_and_published_codes_do() -> None:
    tokenizer, images = build(temperature=1.0), torch.rand(6, 3, 16, 16)
    alone = torch.cat([tokenizer.encode(image) for image in images.split(1)])
    assert torch.equal(tokenizer.encode(images), alone)
    codes = tokenizer.codebook[alone]
    proxies = torch.cat([tokenizer.refine(code).tokens for code in codes.split(1)])
    assert torch.equal(tokenizer.refine(codes).tokens, proxies)
    assert not torch.equal(tokenizer.refine(codes, temperature=0.0).tokens, proxies)

    transport = build(eval="published")
    assert not torch.equal(transport.encode(images), torch.cat([transport.encode(image) for image in images.split(1)]))
    assert torch.equal(tokenizer.train().encode(images), transport.encode(images))


def test_transport_shares_the_codes_out() -> None:
    latents, codebook = torch.tensor([[0.0], [0.3], [0.1], [0.2]]), torch.tensor([[0.0], [1.0]])
    assert sinkhorn_codes(latents, codebook).tolist() == [0, 1, 0, 1]


def test_quantised_latents_pass_their_gradient_on() -> None:
    latents = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    codes = torch.tensor([[[0.0, 1.0]]], requires_grad=True)
    assigned = straight_through(latents, codes, commitment=0.25)
    assert torch.equal(assigned.embeddings, codes)
    assert assigned.loss.item() == 1.25
    gradient = torch.autograd.grad(assigned.embeddings.sum(), latents, retain_graph=True)[0]
    assert torch.equal(gradient, torch.ones_like(latents))
    of_latents, of_codes = torch.autograd.grad(assigned.loss, (latents, codes))
    assert of_latents.tolist() == [[[0.25, -0.25]]]
    assert of_codes.tolist() == [[[-1.0, 1.0]]]


@pytest.mark.parametrize("steps", [1, 4])
def test_the_gradient_of_pixels_reaches_the_distributions(steps: int) -> None:
    tokenizer = build(steps=steps)
    logits = torch.randn(1, 5, 9, requires_grad=True)
    tokenizer.decode_raw(tokenizer.embed_soft(logits.softmax(-1))).sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).all()


def test_pixels_come_from_expected_proxies() -> None:
    tokenizer, logits = build(), torch.randn(2, 16, 7)
    expected = (logits.softmax(-1) @ tokenizer.pixel_quantize.embedding.weight).mT.reshape(2, 6, 4, 4)
    torch.testing.assert_close(tokenizer.pixels(logits), tokenizer.pixel_decoder(expected))


def test_the_published_number_of_proxies_is_masked_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder = SFTokDecoder(
        image_size=64, patch_size=4, width=8, depth=1, heads=1, latent_tokens=2, token_size=3, proxy_codes=6
    )
    given: list[Tensor] = []
    step = decoder.proxy_logits
    monkeypatch.setattr(decoder, "proxy_logits", lambda tokens, z: (given.append(tokens), step(tokens, z))[1])
    draws = [torch.rand(2, 256, *shape) for _ in range(8) for shape in ((6,), ())]
    refined = decoder.refine(torch.randn(2, 2, 3), StoredNoise(draws), steps=8, temperature=1.0)
    masks = [(tokens == 6).sum(-1).tolist() for tokens in given]
    assert masks == [[count] * 2 for count in (256, 235, 214, 193, 170, 145, 117, 82)]
    for before, after in zip([*given[1:]], [*given[2:], refined.tokens], strict=True):
        known = before != 6
        assert torch.equal(after[known], before[known])
    assert refined.tokens.max() < 6


def test_as_many_steps_as_proxies_fix_one_after_another() -> None:
    tokenizer = build(steps=16, temperature=1.0)
    refined = tokenizer.refine(torch.randn(2, 5, 4))
    assert refined.tokens.max() < 7
    assert refined.logits.shape == (2, 16, 7)


def test_annealing_divides_the_logits_at_every_step() -> None:
    tokenizer = build(steps=2, temperature=0.0)
    latents = torch.randn(2, 5, 4)
    plain, annealed = (list(tokenizer.predictions(latents, anneal=anneal)) for anneal in (False, True))
    torch.testing.assert_close(annealed[0].logits, plain[0].logits / 0.9)
    given = annealed[0].tokens
    assert torch.equal(given, plain[0].tokens)  # without noise the likeliest stay the likeliest
    torch.testing.assert_close(
        build(anneal=True, steps=1).refine(latents).logits * 0.5, build(steps=1).refine(latents).logits
    )


def test_the_decoder_is_shown_its_own_predictions() -> None:
    guided, truth = torch.zeros(3, 1000, dtype=torch.long), torch.ones(3, 1000, dtype=torch.long)
    shares = torch.tensor([0.0, math.cos(math.pi / 8), 1.0])
    draws = [shares, torch.rand(3, 1000), torch.rand(3, 1000)]

    def shown(**options: Any) -> Tensor:
        given = self_forced_input(guided, StoredNoise(draws), mask_id=7, **options)
        assert torch.equal(given.masked, given.tokens == 7)
        return given.tokens

    assert (shown() == 7).sum(-1).tolist() == [1000, 250, 0]
    assert shown(truth=truth, replace_prob=1.0).unique().tolist() == [0, 7]
    assert shown(truth=truth, replace_prob=0.0).unique().tolist() == [1, 7]
    half = shown(truth=truth, replace_prob=0.5)[2]
    assert abs(half.float().mean() - 0.5) < 0.08
    assert (shown(min_ratio=0.25, max_ratio=0.75) == 7).sum(-1).tolist() == [750, 375, 250]
    assert (shown(power=1.5) == 7).sum(-1).tolist() == [1000, 125, 0]
    assert (shown(min_ratio=0.2504, max_ratio=0.7506) == 7).sum(-1)[[0, 2]].tolist() == [750, 250]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", 0.5), ("quadratic", 0.25), ("cubic", 0.125), ("exponential", math.exp(-1)), ("cosine", 0.5)],
)
def test_other_schedules(schedule: Any, expected: float) -> None:
    draws = [torch.full((1,), 0.5), torch.rand(1, 1000)]
    tokens = torch.zeros(1, 1000, dtype=torch.long)
    given = self_forced_input(tokens, StoredNoise(draws), mask_id=1, schedule=schedule, power=2.0)
    assert given.masked.sum().item() == round(1000 * expected)


def test_visible_proxies_weigh_a_tenth() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)]]])
    target = torch.tensor([[0, 0]])
    hidden, visible = math.log(2), math.log(4)
    got = proxy_loss(logits, target, torch.tensor([[True, False]]))
    assert got.item() == pytest.approx((hidden + 0.1 * visible) / 1.1, rel=1e-6)
    assert proxy_loss(logits, target).item() == pytest.approx((hidden + visible) / 2, rel=1e-6)
    many = logits.repeat(512, 128, 1), target.repeat(512, 128), torch.ones(512, 256, dtype=torch.bool)
    torch.set_default_dtype(torch.float16)  # as trainers do in half precision
    try:
        assert proxy_loss(*many).item() == pytest.approx((hidden + visible) / 2, rel=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sizes_and_steps_come_from_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = build(steps=3, temperature=0.5, anneal=True, use_l2_norm=False, is_legacy=False)
    state = published(tokenizer)
    state["decoder.embedding_positional_embedding"] = state.pop("decoder.learnable_embedding_positional_embedding")
    save_file(state, tmp_path / "model.safetensors")
    sampler = {"num_steps": 3, "randomize_temperature": 0.5, "softmax_temperature_annealing": True}
    codes = {"use_l2_norm": False, "is_legacy": False}
    sections = {"vq_model": codes, "decoder": sampler, "generator": None}
    (tmp_path / "config.json").write_text(json.dumps({"model": sections}))
    opened = SFTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    assert opened.config == tokenizer.config
    tokens = torch.randint(9, (2, 5))
    torch.testing.assert_close(opened.decode(tokens), tokenizer.decode(tokens), rtol=0, atol=1e-4)
    assert SFTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2, steps=2).steps == 2
    with pytest.raises(ValueError, match=r"^tokenizer: .*\(a checkpoint of SFTok\)$"):
        TiTok.from_checkpoint(tmp_path)

    options = json.dumps({"encoder_heads": 2, "decoder_heads": 2})
    convert(["--family", "sftok", "--source", str(tmp_path), "--out", str(tmp_path / "out"), "--options", options])
    again = load_tokenizer(tmp_path / "out")
    assert isinstance(again, SFTok)
    assert again.config == tokenizer.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tokenizer.state_dict().items())
    torch.testing.assert_close(again.decode(tokens), tokenizer.decode(tokens), rtol=0, atol=1e-4)


def test_a_checkpoint_of_the_first_stages_predicts_proxies_and_says_what_it_lacks(tmp_path: Path) -> None:
    state = {name: value for name, value in published(build()).items() if not name.startswith("pixel_")}
    save_file(state, tmp_path / "model.safetensors")
    opened = SFTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    tokens = opened.encode(torch.rand(1, 3, 16, 16))
    assert opened.refine(opened.codebook[tokens]).tokens.shape == (1, 16)
    with pytest.raises(ValueError, match=r"^tokenizer: expected an SFTok with a pixel decoder, got one of the first"):
        opened.decode(tokens)


def test_a_codebook_of_another_size_is_refused(tmp_path: Path) -> None:
    state = published(build())
    state["pixel_quantize.embedding.weight"] = torch.zeros(8, 6)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'pixel_quantize.embedding.weight' of shape \(8, 6\) instead of \(7, 6\)"):
        SFTok.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    save_file({**published(build()), "quantize.embedding": torch.zeros(2, 9, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^tokenizer.num_group: expected 1 as in every published SFTok, got 2$"):
        SFTok.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..8, got 9$"):
        build().decode(torch.full((1, 5), 9))
    with pytest.raises(ValueError, match=r"^embeddings: expected shape \(B, 5, 4\), got \(1, 5, 3\)$"):
        build().decode_embeddings(torch.zeros(1, 5, 3))


def conv_vq(**changes: Any) -> ConvVQTokenizer:
    return ConvVQTokenizer(**{"image_size": 16, "num_codes": 7, "code_dim": 3, "channels": [8, 8, 8], **changes})


def test_the_tokenizer_of_the_proxies_gives_the_pixels(tmp_path: Path) -> None:
    bare, proxies = build(pixel_decoder=None), conv_vq()
    tokenizer = bare.with_pixels(proxies)
    state = tokenizer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in bare.state_dict().items())
    codes = torch.randint(7, (2, 16))
    images = tokenizer.pixels(100.0 * F.one_hot(codes, 7))
    torch.testing.assert_close(images, proxies.decode_raw(proxies.codebook[codes]))
    with torch.no_grad():
        next(tokenizer.pixel_decoder.parameters()).zero_()
    assert next(proxies.decoder.parameters()).any(), "they are its own, to be trained"

    tokenizer.save_pretrained(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert isinstance(again, SFTok)
    assert again.config == tokenizer.config
    tokens = torch.randint(9, (2, 5))
    torch.testing.assert_close(again.decode(tokens), tokenizer.decode(tokens))
    given = SFTok(**{**TINY, "pixel_decoder": proxies})
    assert given.config == tokenizer.config
    assert torch.equal(given.pixel_quantize.embedding.weight, proxies.codebook)


def test_pixels_of_maskgits_vqgan_keep_the_published_layout() -> None:
    vqgan = MaskGITVQGAN(image_size=16, codebook_size=7, **PIXELS)
    tokenizer = build(pixel_decoder=None).with_pixels(vqgan)
    assert tokenizer.config == build().config
    assert tokenizer.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(tokenizer.pixel_quantize.embedding.weight, vqgan.codebook)


@pytest.mark.parametrize(
    ("proxies", "message"),
    [
        (conv_vq(num_codes=8), "proxies.num_codes: expected 7 as the tokenizer's proxies have, got 8"),
        (conv_vq(channels=[8, 8]), "proxies.num_sites: expected 16 as the tokenizer's proxies have, got 64"),
        (
            conv_vq(image_size=32, channels=[8, 8, 8, 8]),
            "proxies.image_size: expected 16 as the tokenizer's proxies have, got 32",
        ),
        (
            build(),
            "proxies: expected a ConvVQTokenizer or a MaskGITVQGAN to take the pixel decoder from, got a SFTok",
        ),
    ],
)
def test_proxies_of_another_kind(proxies: ImageTokenizer, message: str) -> None:
    with pytest.raises(ValueError, match=r"^proxies") as caught:
        build(pixel_decoder=None).with_pixels(proxies)
    assert str(caught.value) == message


def test_every_step_says_what_it_predicts() -> None:
    tokenizer, latents = build(temperature=1.0), torch.randn(2, 5, 4)
    steps = list(tokenizer.predictions(latents))
    assert len(steps) == tokenizer.steps
    last = tokenizer.refine(latents)
    assert torch.equal(steps[-1].tokens, last.tokens)
    assert torch.equal(steps[-1].logits, last.logits)
    for step in steps:
        assert step.tokens.shape == (2, 16)
        assert step.tokens.max() < 7
        assert step.logits.shape == (2, 16, 7)
    hidden = torch.full((2, 16), 7)
    torch.testing.assert_close(steps[0].logits, tokenizer.decoder.proxy_logits(hidden, latents))
    assert [step.logits.requires_grad for step in steps] == [False, False, False, True]
    with pytest.raises(ValueError, match=r"^steps: expected 1 to 16, the number of proxies, got 17$"):
        tokenizer.predictions(latents, steps=17)


def test_a_step_of_training_leaves_a_mark() -> None:
    tokenizer = SFTok(**TINY)
    assert tokenizer.untrained
    optimizer = torch.optim.SGD(tokenizer.quantizer.parameters(), lr=1e-3)
    tokenizer.codebook.sum().backward()
    optimizer.step()
    assert not tokenizer.untrained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "tokenizer.image_size: expected a multiple of the encoder's patch, 4, got 18"),
        ({"decoder": {**VIT, "heads": 3}}, "tokenizer.decoder.heads: expected a divisor of 16, got 3"),
        (
            {"pixel_decoder": {**PIXELS, "channel_mult": [1]}},
            "tokenizer.pixel_decoder.channel_mult: expected levels that make 4 pixels of the decoder's patch, each but "
            "the first twice as many, got 1 levels",
        ),
        ({"steps": 0}, "tokenizer.steps: expected 1 to 16, the number of proxies, got 0"),
        ({"steps": 17}, "tokenizer.steps: expected 1 to 16, the number of proxies, got 17"),
        ({"temperature": -1.0}, "tokenizer.temperature: expected a finite number of at least 0, got -1.0"),
        ({"eval": "closest"}, "tokenizer.eval: expected one of nearest, published, got 'closest'"),
        ({"codebook_size": 0}, "tokenizer.codebook_size: expected at least 1, got 0"),
        ({"num_latent_tokens": 0}, "tokenizer.num_latent_tokens: expected at least 1, got 0"),
        ({"encoder": {**VIT, "patch_size": 0}}, "tokenizer.encoder.patch_size: expected at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer") as caught:
        SFTok(**{**TINY, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, "power: expected a finite number of at least 0, got -1.0"),
        ({"power": math.nan}, "power: expected a finite number of at least 0, got nan"),
        ({"replace_prob": 1.5}, "replace_prob: expected a number in [0, 1], got 1.5"),
        ({"min_ratio": 0.5, "max_ratio": 0.2}, "min_ratio: expected 0 <= min_ratio <= max_ratio <= 1, got 0.5 and 0.2"),
    ],
)
def test_self_forcing_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        self_forced_input(torch.zeros(1, 4, dtype=torch.long), StoredNoise([]), mask_id=7, **options)
    assert str(caught.value) == message
