"""The arithmetic of a step's memory, held against what the CPU's allocator counts in models that really run."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import DiMO, Reward, SoftDiMO
from rewards import Reward as RewardModel
from softgen.activation_memory import shapes_alone, step_memory
from softgen.models import MaskedDiffusionModel, MaskGen, Meissonic
from softgen.models.conditions import TextCondition
from softgen.models.text import PromptProblems, TextEncoder
from softgen.tokenizers import DiffusersVQ, ImageTokenizer, TATiTok
from tests.allocator import allocated_in_step

VIT = {"width": 64, "depth": 2, "heads": 4, "patch_size": 16}
MIB = 2**20


class Zeros(TextEncoder):
    """States that say nothing."""

    def __init__(self, *, pooled_width: int) -> None:
        super().__init__()
        self.length, self.width, self.pooled_width = 9, 32, pooled_width

    def forward(self, prompts: Sequence[str]) -> TextCondition:
        count, length = len(prompts), self.length
        mask = torch.ones(count, length, dtype=torch.bool)
        return TextCondition.of(torch.zeros(count, length, self.width), mask, torch.zeros(count, self.pooled_width))

    def problems(self, prompts: Sequence[str]) -> PromptProblems:
        return PromptProblems()


class Squares(RewardModel):
    name = "squares"

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.square().mean(dim=(1, 2, 3))


class Unprobed(Reward):
    """No values to look at."""

    def setup(self, teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None) -> None:
        pass


def stage(family: str, *, refined: bool, saving: bool, precision: Any) -> SoftDiMO:
    """A small stage of random weights."""
    model: MaskedDiffusionModel
    tokenizer: ImageTokenizer
    if family == "meissonic":
        model = Meissonic(
            grid=[8, 8],
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=[4, 6, 6],
            vocab_size=520,
            codebook_size=512,
            text_encoder=Zeros(pooled_width=64),
        )
        tokenizer = DiffusersVQ(
            image_size=128,
            block_out_channels=[16] * 5,
            layers_per_block=1,
            latent_channels=8,
            num_vq_embeddings=512,
            norm_num_groups=4,
        )
    else:
        model = MaskGen(
            codebook_size=512,
            num_latent_tokens=48,
            decoder_embed_dim=64,
            decoder_depth=4,
            decoder_num_heads=4,
            text_embed_dim=32,
            micro_condition_embed_dim=16,
            condition_num_classes=2,
            text_encoder=Zeros(pooled_width=32),
        )
        tokenizer = TATiTok(
            image_size=128,
            codebook_size=512,
            token_size=8,
            num_latent_tokens=48,
            encoder=VIT,
            decoder=VIT,
            text_context_length=9,
            text_embed_dim=32,
            text_encoder=Zeros(pooled_width=32),
        )
    reward = Unprobed(rewards=[Squares()], micro_batch=1 if saving else 0, checkpoint_decoder=saving, weight="auto")
    return SoftDiMO(
        teacher=model,
        tokenizer=tokenizer,
        objectives=[DiMO(guidance=4.0), *([reward] if refined else [])],
        checkpoint_activations=saving,
        frozen_dtype="float32" if precision is None else "bfloat16",
    )


def planned(family: str, *, batch_size: int = 4, **options: Any) -> int:
    batch = {"ordinal": list(range(batch_size)), "prompt": ["a dog"] * batch_size}
    with shapes_alone():
        built = stage(family, **options)
        step = step_memory(lambda: built.training_step(batch, 0), built.parameters(), autocast=options["precision"])
    assert 0 < step.kept <= step.forward <= step.peak
    return step.peak


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize(
    ("family", "refined", "saving", "precision"),
    [  # any three of the four in all combinations
        ("meissonic", False, False, torch.bfloat16),
        ("meissonic", False, True, None),
        ("meissonic", True, False, None),
        ("meissonic", True, True, torch.bfloat16),
        ("maskgen", False, False, None),
        ("maskgen", False, True, torch.bfloat16),
        ("maskgen", True, False, torch.bfloat16),
        ("maskgen", True, True, None),
    ],
)
def test_the_plan_of_a_step_is_what_the_allocator_counts(
    family: str, refined: bool, saving: bool, precision: torch.dtype | None
) -> None:
    options = {"refined": refined, "saving": saving, "precision": precision}
    built = stage(family, **options)
    batch = {"ordinal": [0, 1, 2, 3], "prompt": ["a dog"] * 4}
    built.training_step(batch, 0)  # constants that are made once
    measured = allocated_in_step(lambda: built.training_step(batch, 0), built.parameters(), autocast=precision)
    assert planned(family, **options) == pytest.approx(measured, rel=0.01)


def test_recomputing_takes_less_and_a_larger_batch_more() -> None:
    options: dict[str, Any] = {"refined": False, "precision": None}
    plain, saving = (planned("meissonic", saving=asked, **options) for asked in (False, True))
    assert saving < 0.7 * plain
    assert planned("meissonic", saving=False, batch_size=8, **options) > 1.8 * plain


@pytest.mark.parametrize("family", ["meissonic", "maskgen"])
def test_codebooks_keep_their_precision_without_memory_too(family: str) -> None:
    with shapes_alone():
        tokenizer = stage(family, refined=False, saving=False, precision=torch.bfloat16).tokenizer
    assert tokenizer is not None
    codes = tokenizer.codebook_weight()
    for tensor in tokenizer.parameters():
        assert tensor.dtype == (torch.float32 if tensor is codes else torch.bfloat16)


def test_a_chain_of_known_sizes() -> None:
    """Five linear maps without bias: inputs are kept for the weights; backward holds two gradients more."""
    with shapes_alone():
        chain = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(5)))
        inputs = torch.zeros(1024, 256)
        step = step_memory(lambda: chain(inputs).sum(), chain.parameters())
    output, weight = 1024 * 256 * 4, 256 * 256 * 4
    assert step.kept == 4 * output + 4  # the input was there, the last output is not needed, a scalar
    assert step.forward == 5 * output + 4
    assert step.peak >= 4 * output + output + weight


def test_a_size_that_no_machine_has_is_planned() -> None:
    with shapes_alone():
        huge = nn.Linear(2**20, 2**20, bias=False)
        assert huge.weight.numel() * 4 == 4096 * 1024 * MIB
        step = step_memory(lambda: huge(torch.zeros(1, 2**20)).sum(), huge.parameters())
    assert step.peak >= 4096 * 1024 * MIB  # the gradient of a step, before it is added up


def test_nothing_of_it_stays() -> None:
    planned("maskgen", refined=False, saving=False, precision=None)
    built = stage("maskgen", refined=False, saving=False, precision=None)
    logits = built.student.logits(
        built.teacher.embed(torch.zeros(1, 48, dtype=torch.long)), built.teacher.encode(["a"])
    )
    assert type(logits.detach()) is Tensor
