"""Meissonic and MaskGen go through the whole of Soft-Di[M]O: Di[M]O, GAN, reward, TTEO, on tiny checkpoints."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from distill import GAN, DiMO, Reward, SoftDiMO
from rewards import Reward as RewardModel
from softgen import load_generator, load_model, load_tokenizer
from softgen.data import Shapes
from softgen.models import MaskedDiffusionModel, MaskGen, Meissonic, PretrainedTextEncoder
from softgen.models.pretrained_text import openai_clip_text
from softgen.pretrained import fingerprint
from softgen.sample import sample
from softgen.tokenizers import DiffusersVQ, ImageTokenizer, TATiTok
from softgen.training import OptimizerConfig
from tests.models.text_towers import LENGTH, save_clip_text
from tteo import TTEOSettings, optimize

pytest.importorskip("transformers", reason="the extra softgen[rewards] is not installed")

VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8}
PROMPTS = ["a red circle", "a ring and a dog"]
FAMILIES = ["meissonic", "meissonic, placed after the embedding", "monetico", "maskgen"]


class Brightness(RewardModel):
    """The mean of the pixels; the prompts only have to be strings."""

    name = "brightness"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert all(isinstance(prompt, str) for prompt in prompts)
        return images.mean(dim=(1, 2, 3))


def build(family: str, text: str) -> tuple[MaskedDiffusionModel, ImageTokenizer]:
    """A tiny model with random weights, and its tokenizer."""
    torch.manual_seed(3)
    model: MaskedDiffusionModel
    tokenizer: ImageTokenizer
    if family == "maskgen":
        model = MaskGen(
            codebook_size=8,
            num_latent_tokens=5,
            decoder_embed_dim=16,
            decoder_depth=2,
            decoder_num_heads=2,
            text_embed_dim=16,
            micro_condition_embed_dim=8,
            condition_num_classes=2,
            text_encoder=openai_clip_text(text, layer=-2),
        )
        tokenizer = TATiTok(
            image_size=32,
            codebook_size=8,
            token_size=4,
            num_latent_tokens=5,
            encoder=VIT,
            decoder=VIT,
            text_context_length=LENGTH,
            text_embed_dim=16,
            text_encoder=openai_clip_text(text, layer=-1),
        )
    else:
        small = family == "monetico"
        model = Meissonic(
            grid=[2, 2],
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=[4, 2, 2],
            vocab_size=12,
            codebook_size=8,
            downsample=not small,
            soft_placement="lookup" if family == "meissonic" else "post_embed",
            text_encoder=PretrainedTextEncoder(text, layer=-2, attend_padding=True),
            negative_prompt="worst quality",
        )
        tokenizer = DiffusersVQ(
            image_size=32,
            block_out_channels=[8] * 5,
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=8,
            norm_num_groups=4,
        )
    for module in (model, tokenizer):
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            assert parameter.isfinite().all(), name
    return model, tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(params=FAMILIES)
def teacher(request: pytest.FixtureRequest, text: str, tmp_path: Path) -> Path:
    model, tokenizer = build(request.param, text)
    model.save_pretrained(tmp_path / "teacher", tokenizer=tokenizer)
    return tmp_path / "teacher"


def tower(model: nn.Module) -> str:
    encoder = model.text
    assert isinstance(encoder, PretrainedTextEncoder)
    return fingerprint(encoder._open().model)


@pytest.mark.parametrize("refine", ["reward", "gan"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_move_the_student_and_nothing_that_is_frozen(teacher: Path, precision: Any, refine: str) -> None:
    stage = SoftDiMO(
        teacher=str(teacher),
        objectives=[
            DiMO(guidance=4.0, mask_law="cosine", auxiliary_optimizer=OptimizerConfig(lr=1e-3)),
            Reward(rewards=[Brightness()], micro_batch=2, held_out_every=1) if refine == "reward" else GAN(),
        ],
        optimizer=OptimizerConfig(lr=1e-3),
        r_init=0.5,
        noise=0.3,
        frozen_dtype="bfloat16" if precision == "bf16-mixed" else "float32",
    )
    assert stage.tokenizer is not None
    assert stage.tokenizer.codebook.dtype == torch.float32
    held = {**stage.frozen_modules, "beside": stage.tokenizer_beside}
    before = {name: fingerprint(module) for name, module in held.items() if module is not None}
    towers = tower(stage.teacher), tower(stage.student.model)
    student = fingerprint(stage.student)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=2 if refine == "reward" else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, datamodule=Shapes(image_size=32, batch_size=4, train_samples=16, val_samples=8))
    assert {name: fingerprint(module) for name, module in held.items() if module is not None} == before
    assert (tower(stage.teacher), tower(stage.student.model)) == towers
    assert fingerprint(stage.student) != student
    assert all(math.isfinite(float(value)) for value in stage.latest_losses.values())
    assert set(stage.latest_losses) >= {"dimo", "dimo_critic", refine}
    embedding = dict(stage.teacher.named_parameters())
    for name, parameter in stage.student.model.named_parameters():
        if not parameter.requires_grad and precision == "32-true":
            assert torch.equal(parameter, embedding[name]), name


def test_a_student_is_optimised_at_test_time(teacher: Path, tmp_path: Path) -> None:
    stage = SoftDiMO(teacher=str(teacher))
    stage.student.save_pretrained(tmp_path / "student", tokenizer=stage.tokenizer_beside)
    generator, tokenizer = load_generator(tmp_path / "student"), load_tokenizer(tmp_path / "student")
    weights = fingerprint(generator)
    result = optimize(generator, tokenizer, Brightness(), PROMPTS, settings=TTEOSettings(steps=2, lr=10.0))
    assert result.images.shape == (2, 3, 32, 32)
    assert result.soft_scores.isfinite().all()
    assert bool((result.after >= result.before).all())
    assert not torch.equal(result.soft_scores[0], result.soft_scores[1])
    assert fingerprint(generator) == weights


def test_one_hot_distributions_are_hard_tokens_for_model_and_decoder(teacher: Path) -> None:
    model, tokenizer = load_model(teacher), load_tokenizer(teacher).under(PROMPTS)
    tokens = torch.randint(model.num_codes, (2, model.num_sites))
    one_hot = nn.functional.one_hot(tokens, model.num_codes).float()
    mask = torch.rand(tokens.shape) < 0.5
    hard_masked = model.embed(tokens.masked_fill(mask, model.mask_id))
    torch.testing.assert_close(model.embed_soft(one_hot), model.embed(tokens), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.embed_soft(one_hot, mask), hard_masked, rtol=0, atol=1e-5)
    soft, hard = tokenizer.decode_embeddings(tokenizer.embed_soft(one_hot)), tokenizer.decode(tokens)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-5)


def test_prompts_and_the_negative_prompt_come_in(teacher: Path) -> None:
    model = load_model(teacher)
    x = model.embed(torch.full((2, model.num_sites), model.mask_id))
    condition = model.encode(PROMPTS)
    logits = model(x, condition)
    negative = model.config["negative_prompt"]
    torch.testing.assert_close(model(x, condition.drop()), model(x, model.encode([negative] * 2)), rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits - model(x, condition.drop())).abs().amax(dim=(1, 2)).min() > 1e-3


def test_the_command_samples_as_published(teacher: Path, tmp_path: Path) -> None:
    sample(model=str(teacher), out=str(tmp_path / "samples"), n=3, prompts=PROMPTS, sampler="published", device="cpu")
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 3
