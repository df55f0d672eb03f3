"""Training of tokenizers: every quantiser, every loss, their held-out codes and exact resume."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from softgen.callbacks import ExportModel, ResumeCheckpoint, StudentEMA, latest_checkpoint
from softgen.data import Digits
from softgen.data.base import Batch
from softgen.metrics import SmallClassifier
from softgen.testing import count_calls
from softgen.tokenizers import ConvVQTokenizer, MaskGITVQGAN, SFTok, SoftVQ
from softgen.training import Adversarial, Align, OptimizerConfig, Perceptual, SFTokTraining, TokenizerTraining
from softgen.training.frozen_features import FrozenFeatures

VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 2}
TINY: dict[str, Any] = {"image_size": 8, "num_latents": 4, "codebook_size": 12, "latent_dim": 4, "groups": 1}
TINY |= {"encoder": VIT, "decoder": VIT, "distance": "l2"}


class Blurred(FrozenFeatures):
    """Two maps with an answer that can be computed by hand: the images, and their 2x2 means."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return images, nn.functional.avg_pool2d(images, 2)


def softvq(**changes: Any) -> SoftVQ:
    torch.manual_seed(0)
    return SoftVQ(**{**TINY, **changes})


def conv() -> ConvVQTokenizer:
    torch.manual_seed(0)
    return ConvVQTokenizer(image_size=8, num_codes=12, code_dim=4, channels=[8, 8])


def build(tokenizer: Any = None, **options: Any) -> TokenizerTraining:
    tokenizer = softvq() if tokenizer is None else tokenizer
    return TokenizerTraining(
        tokenizer=tokenizer, **{"optimizer": OptimizerConfig(lr=1e-2), "warmup_steps": 2, **options}
    )


def fit(stage: Any, steps: int = 30, **options: Any) -> None:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 2, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="tokenizer: .* of its codes")
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **settings,
        ).fit(stage, datamodule=Digits(batch_size=64))


def batch(count: int = 8) -> Batch:
    source = Digits().train_source()
    return {"ordinal": list(range(count)), "index": list(range(count)), **source.fetch(range(count))}


def terms(stage: Any, given: Batch | None = None) -> dict[str, Tensor]:
    """The losses of one training step, with gradients, outside a trainer."""
    kept: dict[str, Tensor] = {}

    def keep(batch: Batch, losses: dict[str, Tensor], logs: dict[str, Tensor]) -> Tensor:
        kept.update(losses)
        kept.update({f"log_{name}": value for name, value in logs.items()})
        return torch.stack(list(losses.values())).sum()

    stage.report = keep
    stage.training_step(batch() if given is None else given, 0)
    del stage.report
    return kept


def test_averaged_codes_in_half_precision_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^trainer.precision: expected 32-true or bf16-mixed for codes that are moving"
    ):
        fit(build(conv()), steps=1, precision="bf16-true")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("adversarial", {"adversarial": Adversarial(channels=4, start_step=5)}), ("align", {"align": Align(Blurred())})],
)
def test_losses_that_keep_float32_refuse_half_precision(name: str, options: dict[str, Any], precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"^trainer.precision: expected 32-true or a mixed one for model.{name}, got"):
        fit(build(**options), steps=1, precision=precision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": ()}, "model.adversarial.consistency: expected 0 where nothing is augmented, got 4.0"),
        (
            {"optimizer": OptimizerConfig(muon_lr=0.02)},
            "model.adversarial.optimizer.muon_lr: expected none, got 0.02",
        ),
    ],
)
def test_options_of_a_discriminator_that_would_do_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model") as caught:
        build(adversarial=Adversarial(channels=4, **options))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "model.mse_weight: expected more than 0 where l1_weight is 0 and there is neither perceptual nor "
            "adversarial, got 0.0",
        ),
        (
            {"adversarial": Adversarial(weight="auto", channels=4)},
            "model.adversarial.weight: expected a number, since auto balances against mse, l1 or perceptual, and none "
            "of them is on, got 'auto'",
        ),
    ],
)
def test_images_have_to_be_compared_by_something(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model") as caught:
        build(mse_weight=0.0, l1_weight=0.0, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization": "vq"},
        {"quantization": "none"},
        {"groups": 2, "levels": 2},
        {"temperature": "learnable", "distance": "cosine"},
        {"temperature": "predicted"},
    ],
    ids=str,
)
def test_every_quantiser_learns_to_reconstruct(changes: dict[str, Any]) -> None:
    stage = build(softvq(**changes))
    before = terms(stage)["mse"].item()
    fit(stage, 40)
    assert terms(stage)["mse"].item() < 0.7 * before
    tokenizer = stage.tokenizer
    assert isinstance(tokenizer, SoftVQ)
    with torch.no_grad():
        latents = torch.cat(
            [tokenizer.eval().encode(part) for part in Digits().train_source().fetch(range(1000))["image"].split(500)]
        )
    # Measured on other images as well, so not exactly 0 and 1.
    assert tokenizer.normalise(latents).mean().item() == pytest.approx(0, abs=0.1)
    assert tokenizer.normalise(latents).std().item() == pytest.approx(1, abs=0.1)
    assert tokenizer.config["latent_std"] == tokenizer.latent_std


def test_hard_codes_are_the_values_and_pass_the_gradient() -> None:
    tokenizer = softvq(quantization="vq")
    raw = tokenizer.raw_latents(batch()["image"]).detach().requires_grad_()
    quantised = tokenizer.quantizer(raw)
    codes = tokenizer.quantizer.codes(raw)
    assert torch.equal(quantised, tokenizer.quantizer.codebook.codes[codes.view(8, 4)])
    unit = nn.functional.normalize(raw, dim=-1)
    direction = torch.randn_like(quantised)
    expected = torch.autograd.grad((unit * direction).sum(), raw)[0]
    torch.testing.assert_close(torch.autograd.grad((quantised * direction).sum(), raw)[0], expected)
    distances = torch.cdist(unit, tokenizer.quantizer.codebook.codes)
    assert torch.equal(codes.view(8, 4), distances.argmin(dim=-1))


def test_a_plain_autoencoder_leaves_latents_alone() -> None:
    tokenizer, images = softvq(quantization="none"), batch()["image"]
    assert torch.equal(tokenizer.encode(images), tokenizer.raw_latents(images))
    assert not any("quantizer" in name for name in tokenizer.state_dict())


def test_losses_have_the_values_that_they_say() -> None:
    stage = build(mse_weight=4.0, l1_weight=0.5, kl_weight=0.01, perceptual=Perceptual(Blurred(), weight=2.0))
    got, images = terms(stage), batch()["image"]
    raw = stage.tokenizer.raw_latents(images)
    decoded = stage.tokenizer.decode_raw(stage.tokenizer.quantizer(raw))
    assert got["mse"].item() == pytest.approx(4 * (decoded - images).square().mean().item(), rel=1e-5)
    assert got["l1"].item() == pytest.approx(0.5 * (decoded - images).abs().mean().item(), rel=1e-5)
    assert got["kl"].item() == pytest.approx(0.01 * stage.tokenizer.quantizer.kl(raw).item(), rel=1e-5)
    cosines = [
        nn.functional.cosine_similarity(a + 1e-12, b, dim=1)
        for a, b in zip(Blurred()(decoded), Blurred()(images), strict=True)
    ]
    # |a - b|^2 = 2 - 2 cos of unit vectors, where neither is 0: digits have black corners, where b is 0 and |a| = 1.
    for layer, (cosine, real) in enumerate(zip(cosines, Blurred()(images), strict=True)):
        dark = real.square().sum(dim=1) == 0
        cosines[layer] = torch.where(dark, torch.full_like(cosine, 0.5), cosine)
    expected = 2 * sum((2 - 2 * cosine).mean() for cosine in cosines).item() / 2
    assert got["perceptual"].item() == pytest.approx(expected, rel=1e-3)


def test_the_perceptual_loss_warms_up() -> None:
    config = Perceptual(Blurred(), weight=2.0, warmup_steps=3)
    assert [config.at(step) for step in (0, 1, 2, 3, 100)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_posterior_codes_are_its_largest_probability() -> None:
    tokenizer = softvq(groups=2, levels=2)
    raw = torch.randn(3, 4, 4)
    likeliest = tokenizer.quantizer.posterior(raw).argmax(dim=-1)  # (R, B, L)
    expected = torch.stack([level[:, group * 2 : group * 2 + 2].flatten() for level in likeliest for group in (0, 1)])
    assert torch.equal(tokenizer.quantizer.codes(raw), expected)


def classifier(folder: Path) -> str:
    torch.manual_seed(1)
    SmallClassifier(name="judge", image_size=8, num_classes=10, width=4).save(folder / "judge")
    return str(folder / "judge")


def test_each_network_is_passed_as_often_as_needed(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    stage = build(
        perceptual=Perceptual(folder),
        align=Align(folder, how="avg_1d", hidden=8),
        adversarial=Adversarial(consistency=4.0, channels=4),
    )
    shared = stage.alignment.features
    parts = {
        "encoder": stage.tokenizer.encoder,
        "decoder": stage.tokenizer.decoder,
        "quantizer": stage.tokenizer.quantizer,
        "features": shared,
    }
    counters = {name: count_calls(part) for name, part in parts.items()}
    counts = {name: counter.__enter__() for name, counter in counters.items()}
    terms(stage)
    # Alignment and the perceptual loss share what the network sees in the originals; the decoded images are the second.
    assert {name: count.calls for name, count in counts.items()} == {
        "encoder": 1,
        "decoder": 1,
        "quantizer": 1,
        "features": 2,
    }
    for counter in counters.values():
        counter.__exit__(None, None, None)


def at_step(stage: TokenizerTraining, step: int) -> TokenizerTraining:
    class Stepped(type(stage)):  # type: ignore[misc]
        global_step = step

    stage.__class__ = Stepped
    return stage


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, set()), (2, {"log_discriminator_accuracy"}), (5, {"log_discriminator_accuracy", "adversarial"})],
)
def test_the_discriminator_starts_and_is_listened_to_in_turn(step: int, expected: set[str]) -> None:
    stage = at_step(build(adversarial=Adversarial(start_step=2, critic_only_steps=3, channels=4)), step)
    got = terms(stage)
    assert set(got) == {"mse", "l1", "discriminator"} | expected
    sum(value for name, value in got.items() if not name.startswith("log_")).backward()
    gradients = [parameter.grad for parameter in stage.reconstruction.critic.parameters()]
    assert all(gradient is not None for gradient in gradients), "DDP waits for each"
    assert (sum(float(gradient.abs().sum()) for gradient in gradients) > 0) == (step >= 2)
    stage.reconstruction.hold(step)
    assert all((parameter.grad is None) == (step < 2) for parameter in stage.reconstruction.critic.parameters())


def test_neither_side_of_the_game_feels_the_other() -> None:
    stage = build(adversarial=Adversarial(channels=4), mse_weight=0.0, l1_weight=0.0)
    got = terms(stage)
    discriminator = list(stage.reconstruction.critic.parameters())
    of_generator = torch.autograd.grad(
        got["adversarial"],
        [*discriminator, *stage.tokenizer.decoder.parameters()],
        allow_unused=True,
        retain_graph=True,
    )
    assert all(gradient is None for gradient in of_generator[: len(discriminator)])
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in of_generator[len(discriminator) :])
    of_critic = torch.autograd.grad(got["discriminator"], list(stage.tokenizer.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in of_critic)


def test_the_automatic_weight_balances_the_gradients_at_the_image() -> None:
    torch.manual_seed(0)
    reconstruction = build(adversarial=Adversarial(weight="auto", weight_ratio=0.5, channels=4)).reconstruction
    plain = build(adversarial=Adversarial(weight=1.0, channels=4)).reconstruction
    plain.load_state_dict(reconstruction.state_dict())
    images, decoded = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8, requires_grad=True)
    given = batch(4)
    noise = [build().noise(given, "discriminator") for _ in range(2)]
    balanced = reconstruction(decoded, images, step=0, noise=noise[0])
    fixed = plain(decoded, images, step=0, noise=noise[1])
    anchor = torch.autograd.grad(fixed.losses["mse"] + fixed.losses["l1"], decoded, retain_graph=True)[0]
    pull = torch.autograd.grad(fixed.losses["adversarial"], decoded, retain_graph=True)[0]
    weight = 0.5 * anchor.norm() / pull.norm()
    assert balanced.logs["adversarial_weight"].item() == pytest.approx(weight.item(), rel=1e-4)
    assert balanced.losses["adversarial"].item() == pytest.approx(
        (weight * fixed.losses["adversarial"]).item(), rel=1e-4
    )
    total = torch.autograd.grad(sum(balanced.losses.values()), decoded)[0]
    torch.testing.assert_close(total, anchor + weight * pull, rtol=1e-4, atol=1e-7)


def test_alignment_pulls_latents_towards_features(tmp_path: Path) -> None:
    stage = build(align=Align(classifier(tmp_path), how="avg_1d_shuffle", weight=0.5, hidden=16))
    before = terms(stage)["alignment"].item()
    fit(stage, 30)
    assert terms(stage)["alignment"].item() < before - 0.1
    assert "aligned_features" in stage.frozen_modules
    assert not any(name.startswith("_frozen") or "classifier" in name for name in stage.state_dict())


def test_idle_codes_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = build(softvq(codebook_size=10))
    monkeypatch.setattr(
        stage.tokenizer.quantizer, "codes", lambda raw: torch.arange(raw[..., 0].numel()).view(1, -1) % 4
    )
    with pytest.warns(UserWarning, match="of its codes are used") as caught:
        Trainer(
            accelerator="cpu",
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        ).fit(stage, datamodule=Digits(batch_size=64))
    said = [str(warning.message) for warning in caught if "of its codes are used" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("tokenizer: 40.0% of its codes are used on ")


def test_a_finished_run_that_is_resumed_leaves_the_same_model(tmp_path: Path) -> None:
    """Nothing is left to train: the statistics of the latents, which no checkpoint holds, are measured all the same."""
    found = []
    for path in (None, "last"):
        stage = build()
        trainer = Trainer(
            accelerator="cpu",
            max_steps=2,
            callbacks=[ExportModel(run_dir=str(tmp_path)), ResumeCheckpoint(run_dir=str(tmp_path))],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        checkpoint = latest_checkpoint(tmp_path) if path else None
        trainer.fit(stage, datamodule=Digits(batch_size=64), ckpt_path=checkpoint, weights_only=True)
        found.append((tmp_path / "model" / "config.json").read_text())
    assert '"latent_mean": 0.0' not in found[0]
    assert found[0] == found[1]


def test_usage_and_perplexity_are_logged() -> None:
    stage = build(softvq(codebook_size=2))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    (logged,) = trainer.validate(stage, datamodule=Digits(batch_size=64), verbose=False)
    assert 0 < logged["val/codebook_used"] <= 1
    assert 1 <= logged["val/perplexity"] <= 2 + 1e-6
    (logged,) = trainer.validate(build(softvq(quantization="none")), datamodule=Digits(), verbose=False)
    assert set(logged) == {"val/mse"}


def _everything(folder: Path, judged: Path) -> TokenizerTraining:
    return build(
        softvq(),
        adversarial=Adversarial(weight="auto", start_step=2, features=str(judged), channels=4),
        perceptual=Perceptual(str(judged), warmup_steps=5),
        align=Align(str(judged), how="avg_1d", hidden=8),
        kl_weight=0.01,
    )


def _run(stage: TokenizerTraining, folder: Path, *, steps: int, resume: Path | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[ResumeCheckpoint(run_dir=str(folder), every_n_steps=4), StudentEMA(decay=0.9)],
        ).fit(stage, datamodule=Digits(batch_size=128), ckpt_path=resume, weights_only=True if resume else None)


def test_a_run_in_two_parts_ends_bit_equal(tmp_path: Path) -> None:
    judged = Path(classifier(tmp_path))
    whole = _everything(tmp_path, judged)
    _run(whole, tmp_path / "whole", steps=12)
    _run(_everything(tmp_path, judged), tmp_path / "first", steps=8)
    resumed = _everything(tmp_path, judged)
    _run(resumed, tmp_path / "first", steps=12, resume=tmp_path / "first" / "checkpoints" / "step_00000008.ckpt")
    expected = whole.state_dict()
    assert {name for name in expected if name.startswith("reconstruction.critic.lecam")}
    assert expected["reconstruction.critic.lecam_real"].item() != 0
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_sftok_fine_tunes_with_all_losses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"image_size": 8, "codebook_size": 16, "token_size": 4, "num_latent_tokens": 4, "steps": 2}
    tokenizer = SFTok(**tiny, encoder=VIT, decoder=VIT, proxy_codebook_size=5)
    with torch.no_grad():
        tokenizer.quantizer.shared_linear.bias += 1e-6  # as if a stage had moved its codes
    vqgan = MaskGITVQGAN(
        image_size=8, codebook_size=5, channel_mult=[1, 1], hidden_channels=32, num_res_blocks=1, z_channels=4
    )
    options: dict[str, Any] = {
        "perceptual": Perceptual(classifier(tmp_path)),
        "adversarial": Adversarial(channels=4, start_step=1),
    }
    stage = SFTokTraining(tokenizer=tokenizer, teacher=vqgan, phase="fine_tuning", **options)
    before = {name: value.clone() for name, value in stage.reconstruction.state_dict().items()}
    fit(stage, 4)
    assert set(stage.latest_losses) == {"mse", "perceptual", "adversarial", "discriminator"}
    assert any((value != before[name]).any() for name, value in stage.reconstruction.state_dict().items())
    with pytest.raises(
        ValueError, match=r"^model.perceptual: expected none before fine_tuning, got one for alignment$"
    ):
        SFTokTraining(tokenizer=tokenizer, teacher=vqgan, phase="alignment", perceptual=options["perceptual"])


def _refused(options: dict[str, Any], tokenizer: Any = None) -> str:
    with pytest.raises(ValueError, match="expected") as caught:
        build(tokenizer, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    folder = classifier(tmp_path)
    assert _refused({"align": Align(folder)}, softvq(num_latents=3)) == (
        "model.align.features: expected patches that are a multiple of the 3 latents for repeat, got 16 "
        "(avg_1d takes any number)"
    )
    assert _refused({"kl_weight": 0.1}, softvq(quantization="vq")) == (
        "model.kl_weight: expected 0 for a tokenizer without soft codes, got 0.1"
    )
    assert _refused({"kl_weight": math.nan}) == "model.kl_weight: expected a number of at least 0, got nan"
    assert _refused({"mse_weight": -1.0}) == "model.mse_weight: expected a number of at least 0, got -1.0"
    assert _refused({"perceptual": Perceptual("nowhere")}) == (
        "model.perceptual.network: expected a folder with config.json, got 'nowhere'"
    )
    assert _refused({"perceptual": Perceptual("nowhere.pth")}) == (
        "model.perceptual.network: expected a file of weights, got 'nowhere.pth', which is none"
    )
    assert _refused({"adversarial": Adversarial(weight=-1.0)}) == (
        "model.adversarial.weight: expected auto or a number of at least 0, got -1.0"
    )
    bad: Sequence[Any] = ["noise"]
    assert _refused({"adversarial": Adversarial(augment=bad)}) == (
        "model.adversarial.augment: expected of translation, colour, cutout, got 'noise'"
    )
    with pytest.raises(ValueError, match=r"^tokenizer.quantization: expected one of soft, vq, none, got 'hard'$"):
        softvq(quantization="hard")
    conv().save_pretrained(tmp_path / "conv")
    assert _refused({"align": Align(str(tmp_path / "conv"))}).startswith(
        "model.align.features: expected a SmallClassifier in "
    )
