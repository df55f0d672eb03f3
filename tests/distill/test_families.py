"""Every published family goes through the whole of Soft-Di[M]O: Di[M]O, GAN, reward, TTEO, on tiny checkpoints."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from distill import GAN, DiMO, Reward, SoftDiMO
from rewards import ClassifierReward
from softgen import load_generator, load_model, load_tokenizer
from softgen.data import ImageFolder, TokenCache, write_token_cache
from softgen.images import save_image
from softgen.models import ImageBert, MaskBit, MaskedDiffusionModel, MaskGIT, UViTBert
from softgen.pretrained import fingerprint
from softgen.tokenizers import ImageTokenizer, MaskBitTokenizer, MaskGITVQGAN, TamingVQGAN, TiTok
from softgen.training import OptimizerConfig
from tteo import TTEOSettings, optimize

CLASSES = 3
VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8}
PIXELS = {"channel_mult": [1, 2], "hidden_channels": 32, "num_res_blocks": 1, "z_channels": 6, "num_channels": 3}
BERT: dict[str, Any] = {"codebook_size": 8, "image_seq_len": 5, "condition_num_classes": CLASSES, "hidden_size": 16}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES = ["maskgit", "maskbit", "imagebert", "uvitbert", "maskgit with its own vqgan"]


def _titok() -> TiTok:
    return TiTok(
        image_size=32,
        codebook_size=8,
        token_size=4,
        num_latent_tokens=5,
        encoder=VIT,
        decoder=VIT,
        proxy_codebook_size=7,
        pixel_decoder={**PIXELS, "channel_mult": [1, 1, 1, 2]},
    )


def build(family: str) -> tuple[MaskedDiffusionModel, ImageTokenizer]:
    """A tiny model with random weights, and its tokenizer."""
    torch.manual_seed(3)
    model: MaskedDiffusionModel
    tokenizer: ImageTokenizer
    if family == "maskbit":
        model = MaskBit(
            img_size=32, hidden_dim=16, bits=6, codebook_splits=2, depth=2, heads=2, mlp_dim=24, nclass=CLASSES
        )
        tokenizer = MaskBitTokenizer(
            image_size=32, bits=6, hidden_channels=32, channel_mult=[1, 1, 1, 1, 1], num_res_blocks=1
        )
    elif family.startswith("maskgit"):
        model = MaskGIT(img_size=32, hidden_dim=16, codebook_size=8, depth=2, heads=2, mlp_dim=24, nclass=CLASSES)
        if family == "maskgit":
            tokenizer = TamingVQGAN(
                image_size=32, n_embed=8, embed_dim=4, ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, z_channels=4
            )
        else:
            tokenizer = MaskGITVQGAN(image_size=32, codebook_size=8, **{**PIXELS, "channel_mult": [1] * 5})
    else:
        model = (ImageBert if family == "imagebert" else UViTBert)(**BERT)
        tokenizer = _titok()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        assert parameter.isfinite().all(), name
    return model, tokenizer


@pytest.fixture(params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model, tokenizer = build(request.param)
    model.save_pretrained(tmp_path / "teacher", tokenizer=tokenizer)
    return tmp_path / "teacher"


def _images(folder: Path) -> ImageFolder:
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        for index in range(4):
            save_image(torch.rand(3, 32, 32), folder / str(label) / f"{index}.png")
    return ImageFolder(folder, image_size=32, batch_size=4, val_fraction=0.25)


def _classifier() -> ClassifierReward:
    torch.manual_seed(4)
    return ClassifierReward(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, CLASSES)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_steps_move_the_student_and_nothing_that_is_frozen(teacher: Path, precision: Any, tmp_path: Path) -> None:
    data = _images(tmp_path / "images")
    write_token_cache(tmp_path / "tokens", load_tokenizer(teacher), data, progress=False)
    stage = SoftDiMO(
        teacher=str(teacher),
        objectives=[
            DiMO(guidance=2.0, auxiliary_optimizer=OptimizerConfig(lr=1e-3)),
            GAN(taps=[0, 1]),
            Reward(rewards=[_classifier()]),
        ],
        optimizer=OptimizerConfig(lr=1e-3),
        frozen_dtype="bfloat16" if precision == "bf16-mixed" else "float32",
    )
    assert stage.tokenizer is not None
    assert stage.tokenizer_beside is not None
    dtypes = {parameter.dtype for parameter in stage.tokenizer.parameters()}
    assert (torch.bfloat16 in dtypes) == (precision == "bf16-mixed")
    assert stage.tokenizer.codebook.dtype == torch.float32
    assert fingerprint(stage.tokenizer_beside) == fingerprint(load_tokenizer(teacher))
    before = {name: fingerprint(module) for name, module in stage.frozen_modules.items()}
    student = fingerprint(stage.student)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, datamodule=TokenCache(tmp_path / "tokens", batch_size=4))
    assert {name: fingerprint(module) for name, module in stage.frozen_modules.items()} == before
    assert fingerprint(stage.student) != student
    assert all(math.isfinite(float(value)) for value in stage.latest_losses.values())
    assert set(stage.latest_losses) >= {"dimo", "dimo_critic", "gan", "gan_critic", "reward"}


def test_a_student_is_optimised_at_test_time(teacher: Path, tmp_path: Path) -> None:
    stage = SoftDiMO(teacher=str(teacher))
    stage.student.save_pretrained(tmp_path / "student", tokenizer=stage.tokenizer_beside)
    generator, tokenizer = load_generator(tmp_path / "student"), load_tokenizer(tmp_path / "student")
    weights = fingerprint(generator)
    settings = TTEOSettings(steps=2)
    result = optimize(generator, tokenizer, _classifier(), torch.tensor([0, 2]), settings=settings)
    assert result.images.shape == (2, 3, 32, 32)
    assert result.soft_scores.isfinite().all()
    assert not torch.equal(result.soft_scores[0], result.soft_scores[1])
    assert fingerprint(generator) == weights


def test_one_hot_distributions_are_hard_tokens_for_model_and_decoder(teacher: Path) -> None:
    model, tokenizer = load_model(teacher), load_tokenizer(teacher)
    tokens = torch.randint(model.num_codes, (2, model.num_sites))
    one_hot = nn.functional.one_hot(tokens, model.num_codes).float()
    torch.testing.assert_close(model.embed_soft(one_hot), model.embed(tokens), rtol=0, atol=1e-6)
    soft, hard = tokenizer.decode_embeddings(tokenizer.embed_soft(one_hot)), tokenizer.decode(tokens)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-5)
