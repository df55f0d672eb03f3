"""The plan of memory, frozen teachers in half precision, compiled blocks, recomputed activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from distill import GAN, DiMO, SoftDiMO
from softgen import load_generator
from softgen.callbacks import MemoryPlan, StudentEMA, memory_plan
from softgen.callbacks.memory import average_beside
from softgen.data import Labels
from softgen.models import MaskedTransformer, MaskGen, MaskGIT
from softgen.models.pretrained_text import openai_clip_text
from softgen.testing import ToyMaskedModel, ToyTokenizer, count_calls
from softgen.training import OptimizerConfig
from softgen.training.optimization import hidden_matrices
from tests.models.text_towers import save_clip_text
from tests.test_convert_text import MASKGEN


def teacher() -> MaskedTransformer:
    return MaskedTransformer(num_codes=5, num_sites=4, num_classes=3, width=8, depth=2, heads=2)


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **options,
    )


def test_every_part_is_counted_in_bytes() -> None:
    stage = SoftDiMO(teacher=teacher(), objectives=[DiMO()])
    student, auxiliary, frozen = memory_plan(stage)
    numbers = sum(parameter.numel() for parameter in teacher().parameters())
    held = stage.student.model.token_embedding.weight.numel()  # type: ignore[union-attr, operator]
    assert (student.name, student.parameters, student.weights) == ("student", numbers, 4 * numbers)
    assert student.gradients == 4 * (numbers - held)
    assert student.optimizer == 2 * student.gradients
    assert student.average == student.gradients  # what is frozen needs none
    assert memory_plan(stage, averaged=False)[0].average == 0
    assert auxiliary.average == 0
    assert auxiliary.gradients > 0
    assert (frozen.name, frozen.weights, frozen.total) == ("teacher (frozen)", 4 * numbers, 4 * numbers)


def test_muon_keeps_one_moment() -> None:
    config = OptimizerConfig(muon_lr=0.01)
    stage = SoftDiMO(teacher=teacher(), objectives=[DiMO()], optimizer=config)
    student = memory_plan(stage)[0]
    matrices = sum(4 * matrix.numel() for matrix in hidden_matrices(stage.student))
    assert student.optimizer == 2 * student.gradients - matrices


def test_a_teacher_in_bfloat16_is_half_as_large_and_its_copies_are_not() -> None:
    whole, half = (
        SoftDiMO(teacher=teacher(), objectives=[DiMO()], frozen_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(memory_plan(whole)[:2], memory_plan(half)[:2], strict=True):
        assert one == other
    assert 2 * memory_plan(half)[2].weights == memory_plan(whole)[2].weights
    with pytest.raises(ValueError, match=r"^model.frozen_dtype: expected bfloat16 with precision bf16-mixed alone"):
        trainer().fit(half, datamodule=Labels(num_classes=3, batch_size=2))


@pytest.mark.filterwarnings("ignore:text encoder")
def test_text_towers_are_counted_once_and_opened_for_it(tmp_path: Path) -> None:
    source = str(save_clip_text(tmp_path))
    encoder = openai_clip_text(source, layer=-2, length=7, width=16, pooled_width=16)
    read = MaskGen(**MASKGEN, text_encoder=encoder)
    plan = memory_plan(SoftDiMO(teacher=read, objectives=[DiMO()], frozen_dtype="bfloat16"))
    assert [part.name for part in plan] == [
        "student",
        "auxiliary",
        "teacher (frozen)",
        "text tower of teacher (frozen)",
    ]
    tower = encoder.tower()
    # Buffers of whole numbers, the positions, stay as they are.
    numbers = sum(parameter.numel() for parameter in tower.parameters())
    assert plan[-1].weights == 2 * numbers + sum(buffer.nbytes for buffer in tower.buffers())
    assert plan[-1].gradients == plan[-1].average == 0


def test_a_text_tower_that_is_missing_ends_the_run_before_it_starts() -> None:
    absent = openai_clip_text("/no/such/folder", layer=-2, length=7, width=16, pooled_width=16)
    stage = SoftDiMO(teacher=MaskGen(**{**MASKGEN, "text_encoder": absent}), objectives=[DiMO(guidance=1)])
    with pytest.raises(ValueError, match=r"^text_encoder.source: expected a text model in '/no/such/folder', got an"):
        memory_plan(stage)


@pytest.mark.parametrize(("callbacks", "averaged"), [([], 0), ([StudentEMA()], 1), ([StudentEMA(device="meta")], 0)])
def test_the_average_is_counted_where_it_is(callbacks: list[Any], averaged: int) -> None:
    stage = SoftDiMO(teacher=teacher(), objectives=[DiMO()])
    plan = memory_plan(stage, averaged=average_beside(trainer(callbacks=callbacks), stage))
    assert plan[0].average == averaged * plan[0].gradients


@pytest.mark.parametrize("recomputed", [False, True])
def test_casts_of_autocast_are_kept_where_activations_are(recomputed: bool) -> None:
    stage = recomputing(checkpoint_activations=recomputed)
    batch = {"ordinal": [0, 1], "label": torch.tensor([0, 2]), "token": torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])}
    seen = []
    stage.student.register_forward_hook(lambda *_: seen.append(torch.is_autocast_cache_enabled()))
    with pytest.warns(UserWarning, match="You are trying to `self.log"):
        stage.training_step(batch, 0)
    assert seen == [not recomputed]
    assert torch.is_autocast_cache_enabled()


def test_the_plan_is_printed_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    stage = SoftDiMO(teacher=teacher(), objectives=[DiMO()])
    trainer(callbacks=[MemoryPlan()]).fit(stage, datamodule=Labels(num_classes=3, batch_size=2))
    lines = capsys.readouterr().err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("memory of one process, MiB"))
    assert [line.split(":")[0].strip() for line in lines[start + 1 : start + 5]] == [
        "student",
        "auxiliary",
        "teacher (frozen)",
        "in all",
    ]


def test_blocks_are_compiled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def record(function: Any, **_: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr("torch.compile", record)
    stage = SoftDiMO(teacher=teacher(), objectives=[DiMO()], compile_blocks=True)
    assert len(compiled) == 3 * 2  # teacher, student, auxiliary model
    assert stage.student.model.state_dict().keys() == teacher().state_dict().keys()
    compiled.clear()
    MaskGIT(img_size=32, hidden_dim=8, codebook_size=5, depth=3, heads=2, mlp_dim=12, nclass=3).compile_blocks()
    assert len(compiled) == 3 * 2  # attention and feed-forward
    trainer().fit(stage, datamodule=Labels(num_classes=3, batch_size=2))
    assert all(torch.isfinite(value) for value in stage.latest_losses.values())


def recomputing(*, checkpoint_activations: bool, saved: bool = False) -> SoftDiMO:
    """Student, teacher and auxiliary model of random weights, the teacher judged by a GAN."""
    torch.manual_seed(2)
    model = MaskedTransformer(
        num_codes=3, num_sites=4, num_classes=3, width=8, depth=2, heads=2, checkpoint_activations=saved
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return SoftDiMO(
        teacher=model,
        tokenizer=ToyTokenizer(num_codes=3),
        objectives=[DiMO(), GAN(taps=[0, 1])],
        checkpoint_activations=checkpoint_activations,
    )


def networks(stage: SoftDiMO) -> list[Any]:
    dimo = stage.objectives[0]
    assert isinstance(dimo, DiMO)
    return [stage.student.model, stage.teacher, dimo.auxiliary]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_recomputed_activations_give_the_same_losses_and_gradients() -> None:
    batch = {"ordinal": [0, 1], "label": torch.tensor([0, 2]), "token": torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])}
    kept, recomputed = (recomputing(checkpoint_activations=asked) for asked in (False, True))
    passes = []
    for stage in (kept, recomputed):
        first, second, third = (model.blocks[0] for model in networks(stage))
        with count_calls(first) as student, count_calls(second) as teacher, count_calls(third) as auxiliary:
            stage.training_step(batch, 0).backward()
        passes.append((student.calls, teacher.calls, auxiliary.calls))
    # The teacher: once for Di[M]O without a graph, once each for real and fake, of which the fake has a graph.
    assert passes == [(1, 3, 1), (2, 4, 2)]
    assert stage.latest_losses.keys() == {"dimo", "dimo_critic", "gan", "gan_critic"}
    assert kept.latest_losses == recomputed.latest_losses
    assert all(model.checkpoint_activations for model in networks(recomputed))
    assert not any(model.checkpoint_activations for model in networks(kept))
    for one, other in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("saved", [False, True])
def test_recomputing_is_of_the_run_and_not_of_what_it_leaves(saved: bool, tmp_path: Path) -> None:
    stage = recomputing(checkpoint_activations=True, saved=saved)
    stage.student.save_pretrained(tmp_path / "student")
    opened = load_generator(tmp_path / "student")
    assert opened.model.checkpoint_activations == opened.model.config["checkpoint_activations"] == saved
    weights = stage.student.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in opened.state_dict().items())
    left = recomputing(checkpoint_activations=False, saved=saved)
    assert {model.checkpoint_activations for model in networks(left)} == {saved}


def test_a_model_that_cannot_recompute_says_so() -> None:
    toy = ToyMaskedModel.random(num_classes=2, num_sites=2, num_codes=2)
    with pytest.warns(UserWarning, match="model.checkpoint_activations: ignored by ToyMaskedModel, which keeps"):
        SoftDiMO(teacher=toy, checkpoint_activations=True)
