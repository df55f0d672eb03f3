"""SoftVQ-VAE: its quantiser in every variant, the model on tiny random weights, and its alignment."""

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
from softgen.convert import main as convert
from softgen.relaxation import expected_code, neighbour_distribution
from softgen.tokenizers import ContinuousTokenizer, SoftVQ, TiTok, soft_quantizer
from softgen.tokenizers.alignment import alignment_loss
from softgen.tokenizers.soft_quantizer import SoftQuantizer

VIT = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4}
TINY: dict[str, Any] = {"image_size": 16, "num_latents": 6, "codebook_size": 9, "latent_dim": 4, "groups": 2}
TINY |= {"encoder": VIT, "decoder": {**VIT, "width": 8, "depth": 1, "patch_size": 8}}
VARIANTS: list[dict[str, Any]] = [
    {"distance": distance, "temperature": temperature, "groups": groups}
    for distance in ("l2", "cosine", "dot")
    for temperature in ("fixed", "learnable", "predicted")
    for groups in (1, 3)
]
VARIANTS += [{"levels": 2}, {"levels": 3, "groups": 3, "temperature": "predicted"}]


def quantizer(**options: Any) -> SoftQuantizer:
    torch.manual_seed(0)
    built = SoftQuantizer(**{"num_codes": 8, "code_dim": 4, "tau": 0.3, **options}).double()
    if built.temperature == "predicted":
        nn.init.normal_(built.weigh.weight, std=0.5)
    return built


def build(**changes: Any) -> SoftVQ:
    torch.manual_seed(0)
    tokenizer = SoftVQ(**{**TINY, **changes})
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tokenizer.eval()


def test_the_posterior_takes_the_distance_and_snce_its_square() -> None:
    z, codes, tau = torch.zeros(1, 1, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5
    soft = SoftQuantizer(num_codes=2, code_dim=2, tau=tau)
    soft.embedding.data.copy_(codes)
    odds = soft.posterior(z)[0, 0, 0]
    assert (odds[0] / odds[1]).item() == pytest.approx(math.exp((3 - 1) / tau), rel=1e-5)
    squared = neighbour_distribution(z[0], codes, two_tau_squared=2 * tau**2)[0]
    assert (squared[0] / squared[1]).item() == pytest.approx(math.exp((9 - 1) / (2 * tau**2)), rel=1e-5)
    assert torch.equal(soft(z)[0], expected_code(z[0], codes, tau=tau))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_latents_are_expected_codes_and_the_fused_path_gives_the_same(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, z = quantizer(**options), torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 6, 4, dtype=torch.float64)
    groups, run = soft.groups, 6 // soft.groups
    expected = torch.zeros_like(z)
    for probs, codes in zip(soft.posterior(z), soft.codebooks.view(soft.levels, groups, 8, 4), strict=True):
        torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))
        expected = expected + torch.einsum("bglk,gkd->bgld", probs.view(2, groups, run, 8), codes).reshape(2, 6, 4)
    got = {}
    for impl in ("dense", "fused"):
        if impl == "fused":
            monkeypatch.setattr(soft_quantizer, "DENSE_LIMIT", 16)
        values = soft(z, impl=impl)
        torch.testing.assert_close(values, expected)
        got[impl] = torch.autograd.grad((values * direction).sum(), [z, *soft.parameters()], allow_unused=True)
    for dense, fused in zip(got["dense"], got["fused"], strict=True):
        assert dense is not None
        assert dense.abs().max() > 0
        torch.testing.assert_close(fused, dense)


def test_released_codes_learn_through_the_mean_alone() -> None:
    soft, z = quantizer(distance="cosine"), torch.randn(1, 5, 4, dtype=torch.float64)
    direction = torch.randn(1, 5, 4, dtype=torch.float64)
    got = torch.autograd.grad((soft(z) * direction).sum(), soft.embedding)[0]
    held = (soft.posterior(z)[0].detach() @ F.normalize(soft.embedding[0], dim=-1) * direction).sum()
    torch.testing.assert_close(got, torch.autograd.grad(held, soft.embedding)[0])
    paper = quantizer(distance="l2")
    through_both = torch.autograd.grad((paper(z) * direction).sum(), paper.embedding)[0]
    of_mean = torch.autograd.grad(
        (paper.posterior(z)[0].detach() @ paper.embedding[0] * direction).sum(), paper.embedding
    )
    assert (through_both - of_mean[0]).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", ["learnable", "predicted"])
@pytest.mark.parametrize("tau", [0.002, 0.07, 3.0])
def test_other_temperatures_start_from_tau(temperature: str, tau: float) -> None:
    z = torch.randn(1, 6, 4, dtype=torch.float64)
    soft = quantizer(temperature=temperature, tau=tau)
    if temperature == "predicted":
        nn.init.zeros_(soft.weigh.weight)
    fixed = quantizer(tau=tau)
    fixed.embedding.data.copy_(soft.embedding)
    torch.testing.assert_close(soft(z), fixed(z), rtol=1e-4, atol=1e-6)


def test_a_learnable_temperature_gets_its_gradient() -> None:
    z, direction = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(1, 6, 4, dtype=torch.float64)
    soft = quantizer(temperature="learnable")
    (soft(z) * direction).sum().backward()
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = quantizer(temperature="learnable")
        moved.log_tau.data.add_(sign * step)
        values.append((moved(z) * direction).sum().item())
    assert soft.log_tau.grad is not None
    assert soft.log_tau.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_each_group_of_tokens_has_its_own_codebook() -> None:
    soft, z = quantizer(groups=3), torch.randn(2, 6, 4, dtype=torch.float64)
    before = soft(z)
    soft.embedding.data[1] += 1
    changed = (soft(z) - before).abs().amax(dim=-1) > 1e-6
    assert changed.tolist() == [[False, False, True, True, False, False]] * 2


def test_a_level_quantises_what_those_before_it_left() -> None:
    soft, z = quantizer(levels=3), torch.randn(1, 6, 4, dtype=torch.float64)
    total = torch.zeros_like(z[0])
    for codes in soft.embedding:
        total = total + expected_code(z[0] - total, codes, tau=0.3)
    torch.testing.assert_close(soft(z)[0], total)


def corners(groups: int, **options: Any) -> SoftQuantizer:
    soft = SoftQuantizer(num_codes=4, code_dim=4, groups=groups, tau=0.01, **options)
    soft.embedding.data.copy_(torch.eye(4).expand(groups, 4, 4))
    return soft


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_the_kl_of_known_posteriors(distance: Any) -> None:
    spread, same = torch.eye(4).unsqueeze(0), torch.eye(4)[:1].expand(1, 4, 4)
    assert corners(1, distance=distance).kl(spread).item() == pytest.approx(-math.log(4), abs=1e-5)
    assert corners(1, distance=distance).kl(same).item() == pytest.approx(0.0, abs=1e-5)
    undecided = corners(1, distance=distance).kl(torch.full((1, 2, 4), 0.5))
    assert undecided.item() == pytest.approx(0.0, abs=1e-5)
    # Each of two codebooks always uses one code, not the same one: one mean over both counts two.
    fixed = torch.eye(4)[[0, 0, 1, 1]].unsqueeze(0)
    expected = {"l2": 0.0, "cosine": -math.log(2)}[distance]
    assert corners(2, distance=distance).kl(fixed).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("distance", ["l2", "cosine", "dot"])
def test_the_kl_has_a_gradient_where_probabilities_underflow(distance: Any) -> None:
    soft = corners(1, distance=distance)
    soft.embedding.data[:, 2:] = -soft.embedding[:, :2]
    z = (20 * torch.eye(4)[:2] + 0.01 * torch.rand(2, 4)).unsqueeze(0).requires_grad_()
    assert (soft.posterior(z) == 0).any()
    soft.kl(z).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_images_become_latents_and_images_again() -> None:
    tokenizer, images = build(latent_mean=0.5, latent_std=2.0), torch.rand(2, 3, 16, 16, requires_grad=True)
    latents = tokenizer.encode(images)
    assert latents.shape == (2, 6, 4)
    assert torch.equal(latents, tokenizer.quantizer(tokenizer.raw_latents(images)))
    decoded = tokenizer.decode(latents)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1
    gradient = torch.autograd.grad(tokenizer.decode_raw(latents).sum(), images)[0]
    assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(tokenizer.normalise(latents), (latents - 0.5) / 2)
    torch.testing.assert_close(tokenizer.denormalise(tokenizer.normalise(latents)), latents)
    with pytest.raises(ValueError, match=r"^images: expected shape \(B, 3, 16, 16\), got \(2, 3, 8, 8\)$"):
        tokenizer.encode(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^latents: expected shape \(B, 6, 4\), got \(2, 5, 4\)$"):
        tokenizer.decode(torch.rand(2, 5, 4))


def released(tokenizer: SoftVQ) -> dict[str, Tensor]:
    state = {
        name.replace("quantizer.", "quantize.") if name.startswith("quantizer.") else name: value
        for name, value in tokenizer.state_dict().items()
    }
    beyond = ("repa_model.norm.weight", "projection.0.weight", "quantize.codebook_used", "decoder.model.patch_embed.x")
    return {**state, **{name: torch.zeros(3) for name in beyond}}


def test_a_released_checkpoint_is_opened_and_converted(tmp_path: Path) -> None:
    tokenizer = build(distance="dot", tau=0.2, latent_mean=0.1, latent_std=0.9)
    save_file(released(tokenizer), tmp_path / "model.safetensors")
    settings: dict[str, Any] = {"codebook_size": 9, "codebook_embed_dim": 4, "num_codebooks": 2, "tau": 0.2}
    settings |= {"codebook_l2_norm": False, "vq_mean": 0.1, "vq_std": 0.9}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    opened = SoftVQ.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    assert opened.config == tokenizer.config
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(opened.encode(images), tokenizer.encode(images))

    options = json.dumps({"encoder_heads": 2, "decoder_heads": 2})
    convert(["--family", "softvq", "--source", str(tmp_path), "--out", str(tmp_path / "out"), "--options", options])
    again = ContinuousTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(again, SoftVQ)
    assert again.config == tokenizer.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tokenizer.state_dict().items())
    with pytest.raises(ValueError, match=r"^tokenizer: expected a ImageTokenizer in .*, got a SoftVQ$"):
        load_tokenizer(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^tokenizer: .*\(a checkpoint of SoftVQ-VAE\)$"):
        TiTok.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 16}, "tokenizer: expected codebook_size 16 as config.json says, got 9"),
        ({"num_codebooks": 4}, "tokenizer: expected num_codebooks 4 as config.json says, got 2"),
        ({"tau": 0}, "tokenizer.tau: expected a finite number above 0, got 0"),
        (
            {"enc_use_rope": True},
            "tokenizer: expected learned positions as in every released SoftVQ-VAE, got enc_use_rope",
        ),
    ],
)
def test_settings_of_another_checkpoint(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(released(build()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected") as caught:
        SoftVQ.from_checkpoint(tmp_path, encoder_heads=2, decoder_heads=2)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [{"distance": "l2", "levels": 2}, {"temperature": "predicted"}, {"quantization": "vq"}, {"quantization": "none"}],
    ids=str,
)
def test_the_variants_are_saved_and_opened(options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer, images = build(**options), torch.rand(1, 3, 16, 16)
    tokenizer.save_pretrained(tmp_path / "model")
    again = SoftVQ.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.encode(images), tokenizer.encode(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "tokenizer.image_size: expected a multiple of the encoder's patch, 4, got 18"),
        ({"image_size": 12}, "tokenizer.image_size: expected a multiple of the decoder's patch, 8, got 12"),
        ({"encoder": {**VIT, "heads": 3}}, "tokenizer.encoder.heads: expected a divisor of 16, got 3"),
        ({"groups": 4}, "tokenizer.groups: expected a divisor of the 6 tokens, got 4"),
        ({"latent_std": 0.0}, "tokenizer.latent_std: expected a finite number above 0, got 0.0"),
        ({"latent_mean": math.inf}, "tokenizer.latent_mean: expected a finite number, got inf"),
        ({"layer_scale": -1.0}, "tokenizer.layer_scale: expected a finite number of at least 0, got -1.0"),
        (
            {"quantization": "vq", "distance": "l2", "levels": 2},
            "tokenizer.quantization: expected soft for 2 levels and a fixed temperature, got vq",
        ),
        ({"quantization": "hard"}, "tokenizer.quantization: expected one of soft, vq, none, got 'hard'"),
        ({"tau": 0.0}, "tokenizer.tau: expected a finite number above 0, got 0.0"),
        ({"tau": -0.1}, "tokenizer.tau: expected a finite number above 0, got -0.1"),
        ({"codebook_size": 0}, "tokenizer.codebook_size: expected at least 1, got 0"),
        ({"levels": 2}, "tokenizer.levels: expected 1 unless distance is l2, got 2 with cosine"),
        ({"distance": "l1"}, "tokenizer.distance: expected one of l2, cosine, dot, got 'l1'"),
        ({"temperature": "cold"}, "tokenizer.temperature: expected one of fixed, learnable, predicted, got 'cold'"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        SoftVQ(**{**TINY, **changes})
    assert str(caught.value) == message


def test_latents_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^quantizer.groups: expected a divisor of the 7 tokens, got 3$"):
        quantizer(groups=3)(torch.zeros(1, 7, 4))
    with pytest.raises(ValueError, match=r"^latents: expected shape \(B, L, 4\), got \(1, 6, 5\)$"):
        quantizer()(torch.zeros(1, 6, 5))


def test_alignment_compares_what_it_says() -> None:
    latents = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    head = nn.Identity()
    assert alignment_loss(latents, features, head).item() == pytest.approx(-3 / 4)
    pooled = -(1 + 1 / math.sqrt(2)) / 2
    assert alignment_loss(latents, features, head, how="avg_1d").item() == pytest.approx(pooled)
    whole = -(0.25 * 0.5 + 0.25 * 0.5) / (math.sqrt(0.5) * math.sqrt(0.125))
    assert alignment_loss(latents, features, head, how="global").item() == pytest.approx(whole)
    order = torch.tensor([2, 3, 0, 1])
    shuffled = alignment_loss(latents, features, head, how="avg_1d_shuffle", order=order).item()
    assert shuffled == pytest.approx(-(-1 / math.sqrt(2) + 0) / 2)
    with pytest.raises(ValueError, match=r"^alignment: expected latents whose number divides the 3 patches, got 2$"):
        alignment_loss(latents, features[:, :3], head)
    with pytest.raises(ValueError, match=r"^alignment: expected an order of the patches for avg_1d_shuffle, got none$"):
        alignment_loss(latents, features, head, how="avg_1d_shuffle")
    with pytest.raises(ValueError, match=r"^alignment: expected one of repeat, global, .*, got 'mean'$"):
        alignment_loss(latents, features, head, how="mean")  # type: ignore[arg-type]
