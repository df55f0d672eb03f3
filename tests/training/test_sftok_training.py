"""SFTok's three stages on digits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from softgen.data import Digits
from softgen.data.base import Batch
from softgen.testing import ToyTokenizer
from softgen.tokenizers import MaskGITVQGAN, SFTok
from softgen.training import OptimizerConfig, SFTokTraining
from softgen.training.sftok import Phase

VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 2}
TINY: dict[str, Any] = {"image_size": 8, "codebook_size": 16, "token_size": 4, "num_latent_tokens": 4, "steps": 2}
TINY |= {"encoder": VIT, "decoder": VIT, "proxy_codebook_size": 5}


def teacher() -> ToyTokenizer:
    return ToyTokenizer(num_codes=5, grid=4, patch=2)


def vqgan(codes: int = 5) -> MaskGITVQGAN:
    return MaskGITVQGAN(
        image_size=8, codebook_size=codes, channel_mult=[1, 1], hidden_channels=32, num_res_blocks=1, z_channels=4
    )


def tokenizer(*, is_trained: bool) -> SFTok:
    """Before any stage, or as if one had moved its codes."""
    torch.manual_seed(0)
    made = SFTok(**TINY)
    if is_trained:
        with torch.no_grad():
            made.quantizer.shared_linear.bias += 1e-6
    return made


def build(phase: Phase, **options: Any) -> SFTokTraining:
    start = tokenizer(is_trained=phase != "warm_up")
    given = {"tokenizer": start, "teacher": vqgan() if phase == "fine_tuning" else teacher(), **options}
    return SFTokTraining(phase=phase, optimizer=OptimizerConfig(lr=3e-3), **given)


def batch(count: int = 32) -> Batch:
    source = Digits().train_source()
    return {"ordinal": list(range(count)), "index": list(range(count)), **source.fetch(range(count))}


def loss(stage: SFTokTraining) -> float:
    kept: dict[str, Tensor] = {}

    def keep(batch: Batch, losses: dict[str, Tensor], logs: object) -> Tensor:
        kept.update(losses)
        return losses[next(iter(losses))]

    stage.report = keep  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        stage.training_step(batch(), 0)
    del stage.report
    return kept[next(iter(kept))].item()


@pytest.mark.parametrize("phase", ["warm_up", "alignment", "fine_tuning"])
def test_the_loss_falls_and_what_is_frozen_stays(phase: Phase) -> None:
    stage = build(phase)
    before, first = {name: value.clone() for name, value in stage.tokenizer.state_dict().items()}, loss(stage)
    Trainer(
        accelerator="cpu",
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        use_distributed_sampler=False,
    ).fit(stage, datamodule=Digits(batch_size=64))
    assert loss(stage) < 0.9 * first
    moved = {
        name.split(".")[0] for name, value in stage.tokenizer.state_dict().items() if (value != before[name]).any()
    }
    expected = {"latent_tokens", "encoder", "quantizer", "decoder"}
    assert moved == ({"decoder", "pixel_quantize", "pixel_decoder"} if phase == "fine_tuning" else expected)


@pytest.mark.parametrize("phase", ["warm_up", "alignment", "fine_tuning"])
def test_all_that_is_trained_has_a_gradient_under_autocast(phase: Phase) -> None:
    """Also what has run without gradients, in the same step, before."""
    stage = build(phase)
    stage.report = lambda batch, losses, logs: sum(losses.values())  # type: ignore[assignment, method-assign, return-value]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = stage.training_step(batch(), 0)
    total.backward()
    trained = [name for name, parameter in stage.named_parameters() if parameter.requires_grad]
    without = [
        name for name, parameter in stage.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert any("decoder" in name for name in trained)
    assert not without


def test_each_stage_shows_the_decoder_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(phase: Phase, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        stage, seen = build(phase, **options), []
        step = stage.tokenizer.decoder.proxy_logits

        def record(tokens: Tensor, z: Tensor) -> Tensor:
            seen.append((tokens, step(tokens, z)))
            return seen[-1][1]

        monkeypatch.setattr(stage.tokenizer.decoder, "proxy_logits", record)
        loss(stage)
        truth = teacher().encode(batch()["image"])
        return seen[-1][0], seen[0][1].argmax(-1), truth

    given, _, _ = shown("warm_up")
    assert (given == 5).all()
    given, guided, truth = shown("alignment")
    visible = given != 5
    assert visible.any()
    assert not visible.all()
    assert torch.equal(given[visible], guided[visible])
    given, _, _ = shown("alignment", replace_prob=0.0)
    assert torch.equal(given[visible], truth[visible])
    given, guided, _ = shown("fine_tuning", replace_prob=0.0)
    assert torch.equal(given[visible], guided[visible])


def test_a_stage_goes_on_from_the_product_of_the_one_before(tmp_path: Path) -> None:
    first = build("alignment")
    first.product.save_pretrained(tmp_path / "model")
    pixels = vqgan()
    stage = SFTokTraining(tokenizer=str(tmp_path / "model"), teacher=pixels, phase="fine_tuning")
    state = stage.tokenizer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in first.tokenizer.state_dict().items())
    assert torch.equal(state["pixel_quantize.embedding.weight"], pixels.codebook)
    preview = stage.preview(batch(4))
    assert preview.shape == (8, 3, 8, 8)
    stage.product.save_pretrained(tmp_path / "tuned")
    again = SFTokTraining(tokenizer=str(tmp_path / "tuned"), phase="fine_tuning")
    assert again.teacher is None


def test_alignment_without_a_warm_up_where_it_is_asked_for() -> None:
    stage = build("alignment", tokenizer=tokenizer(is_trained=False), from_scratch=True)
    assert stage.tokenizer.untrained


@pytest.mark.parametrize(
    ("phase", "options", "message"),
    [
        ("warm", {}, "model.phase: expected one of warm_up, alignment, fine_tuning, got 'warm'"),
        (
            "warm_up",
            {"teacher": None},
            "model.teacher: expected the tokenizer of the proxy codes for warm_up, got none",
        ),
        (
            "warm_up",
            {"teacher": vqgan(6)},
            "model.teacher.num_codes: expected 5 as the tokenizer's proxies have, got 6",
        ),
        ("alignment", {"replace_prob": 2.0}, "model.replace_prob: expected a number in [0, 1], got 2.0"),
        ("alignment", {"quantizer_weight": -1.0}, "model.quantizer_weight: expected a number of at least 0, got -1.0"),
        (
            "fine_tuning",
            {"teacher": None},
            "model.teacher: expected the tokenizer of the proxy codes for fine_tuning, got none",
        ),
        (
            "alignment",
            {"tokenizer": tokenizer(is_trained=False)},
            "model.tokenizer: expected the product of warm_up for alignment, got an untrained SFTok "
            "(from_scratch: true takes it)",
        ),
        (
            "fine_tuning",
            {"tokenizer": tokenizer(is_trained=False), "from_scratch": True},
            "model.tokenizer: expected the product of alignment for fine_tuning, got an untrained SFTok",
        ),
        ("alignment", {"tokenizer": vqgan()}, "model.tokenizer: expected an SFTok, got a MaskGITVQGAN"),
    ],
)
def test_settings_that_do_not_fit(phase: Phase, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model") as caught:
        build(phase, **options)
    assert str(caught.value) == message
