"""The plan of memory, frozen teachers in half precision, compiled blocks."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from distill import DiMO, SoftDiMO
from softgen.callbacks import MemoryPlan, memory_plan
from softgen.data import Labels
from softgen.models import MaskedTransformer, MaskGIT


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
    assert student.average == 4 * numbers
    assert auxiliary.average == 0
    assert auxiliary.gradients > 0
    assert (frozen.name, frozen.weights, frozen.total) == ("teacher (frozen)", 4 * numbers, 4 * numbers)


def test_a_teacher_in_bfloat16_is_half_as_large_and_its_copies_are_not() -> None:
    whole, half = (
        SoftDiMO(teacher=teacher(), objectives=[DiMO()], teacher_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(memory_plan(whole)[:2], memory_plan(half)[:2], strict=True):
        assert one == other
    assert 2 * memory_plan(half)[2].weights == memory_plan(whole)[2].weights
    with pytest.raises(ValueError, match=r"^model.teacher_dtype: expected bfloat16 with precision bf16-mixed alone"):
        trainer().fit(half, datamodule=Labels(num_classes=3, batch_size=2))


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
