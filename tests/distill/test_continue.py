"""A Di[M]O run leaves its auxiliary model beside the student, and a later run goes on from both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill import DiMO, SoftDiMO
from softgen import load_generator, load_model
from softgen.fit import main
from softgen.models import MaskedDiffusionModel, MaskedTransformer, OneStepGenerator
from softgen.pretrained import read_config

SIZES = {"num_codes": 7, "num_sites": 5, "num_classes": 3, "width": 8, "depth": 1, "heads": 1}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    MaskedTransformer(**SIZES).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def _fit(teacher: Path, run_dir: Path, *words: str, lr: float = 0.01) -> SoftDiMO:
    cli = main(
        [
            "--model=distill.SoftDiMO",
            f"--model.init_args.teacher={teacher}",
            f"--model.init_args.optimizer.lr={lr}",
            "--data=softgen.data.Labels",
            "--data.init_args.num_classes=3",
            "--data.init_args.batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=3",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            f"--run_dir={run_dir}",
            *words,
        ]
    )
    assert isinstance(cli.model, SoftDiMO)
    return cli.model


def _from(run_dir: Path) -> list[str]:
    """The words that go on from an earlier run's student and auxiliary model."""
    objective = f"{{class_path: distill.DiMO, init_args: {{auxiliary: {run_dir}/auxiliary}}}}"
    return [f"--model.init_args.student={run_dir}/model", f"--model.init_args.objectives=[{objective}]"]


def _auxiliary(module: SoftDiMO) -> MaskedDiffusionModel:
    objective = module.objectives[0]
    assert isinstance(objective, DiMO)
    return objective.auxiliary


def _same(left: nn.Module, right: nn.Module) -> bool:
    values, others = left.state_dict(), right.state_dict()
    assert values.keys() == others.keys()
    return all(torch.equal(value, others[name]) for name, value in values.items())


def test_a_run_leaves_its_auxiliary_model_beside_the_student(teacher: Path, tmp_path: Path) -> None:
    module = _fit(teacher, tmp_path / "run")
    saved = load_model(tmp_path / "run" / "auxiliary")
    assert _same(saved, _auxiliary(module))
    assert not _same(saved, load_model(teacher))
    assert not saved.training
    assert module.beside.keys() == {"auxiliary"}
    assert read_config(tmp_path / "run" / "auxiliary", key="") == read_config(teacher, key="")


def test_a_later_run_goes_on_from_both(teacher: Path, tmp_path: Path) -> None:
    _fit(teacher, tmp_path / "first")
    student, auxiliary = load_generator(tmp_path / "first" / "model"), load_model(tmp_path / "first" / "auxiliary")

    still = _fit(teacher, tmp_path / "still", *_from(tmp_path / "first"), lr=0.0)
    assert _same(load_generator(tmp_path / "still" / "model"), student)
    assert _same(load_model(tmp_path / "still" / "auxiliary"), auxiliary)
    frozen = {name for name, parameter in _auxiliary(still).named_parameters() if not parameter.requires_grad}
    assert frozen == {"token_embedding.weight"}
    assert _auxiliary(still).training

    _fit(teacher, tmp_path / "second", *_from(tmp_path / "first"))
    assert not _same(load_model(tmp_path / "second" / "auxiliary"), auxiliary)
    anew = _fit(teacher, tmp_path / "anew", f"--model.init_args.student={tmp_path}/first/model", lr=0.0)
    assert _same(_auxiliary(anew), load_model(teacher))


def test_what_was_saved_in_half_precision_is_trained_in_float32(tmp_path: Path) -> None:
    for name in ("teacher", "auxiliary"):
        MaskedTransformer(**SIZES).bfloat16().save_pretrained(tmp_path / name)
    OneStepGenerator(MaskedTransformer(**SIZES).bfloat16()).save_pretrained(tmp_path / "student")
    assert {value.dtype for value in load_model(tmp_path / "teacher").state_dict().values()} == {torch.bfloat16}
    of_teacher = SoftDiMO(teacher=str(tmp_path / "teacher"))
    of_all = SoftDiMO(
        teacher=str(tmp_path / "teacher"),
        student=str(tmp_path / "student"),
        objectives=[DiMO(auxiliary=str(tmp_path / "auxiliary"))],
    )
    for module in (of_teacher, of_all):
        parts = (module.teacher, module.student, _auxiliary(module))
        assert {value.dtype for part in parts for value in part.state_dict().values()} == {torch.float32}
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_frozen_weights_of_another_type_are_refused_by_their_own_name(teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.frozen_dtype: expected float32 or bfloat16, got 'bf16'$"):
        SoftDiMO(teacher=str(teacher), frozen_dtype="bf16")  # type: ignore[arg-type]
    kept: dict[str, Any] = {}
    SoftDiMO(teacher=str(teacher)).on_save_checkpoint(kept)
    with pytest.raises(
        ValueError, match=r"^model.frozen_dtype: expected float32 as the checkpoint's run, got bfloat16$"
    ):
        SoftDiMO(teacher=str(teacher), frozen_dtype="bfloat16").on_load_checkpoint(kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 9}, "DiMO.auxiliary.num_codes: expected 7 as the teacher has, got 9"),
        ({"num_sites": 6}, "DiMO.auxiliary.num_sites: expected 5 as the teacher has, got 6"),
        ({"num_classes": 4}, "DiMO.auxiliary.num_classes: expected 3 as the teacher has, got 4"),
        (None, "DiMO.auxiliary: expected a MaskedDiffusionModel in {folder}, got a OneStepGenerator"),
    ],
)
def test_an_auxiliary_model_of_another_kind_is_refused_in_one_line(
    changes: dict[str, int] | None, message: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "first" / "auxiliary"
    other = MaskedTransformer(**{**SIZES, **(changes or {})})
    (other if changes else OneStepGenerator(other)).save_pretrained(folder)
    objective = f"[{{class_path: distill.DiMO, init_args: {{auxiliary: {folder}}}}}]"
    with pytest.raises(SystemExit) as stop:
        _fit(teacher, tmp_path / "run", f"--model.init_args.objectives={objective}")
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].endswith(f"error: {message.format(folder=folder)}")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_in_the_way_is_found_before_training(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "run" / "auxiliary" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("keep me")
    with pytest.raises(SystemExit) as stop:
        _fit(teacher, tmp_path / "run")
    assert stop.value.code == 2
    message = f"expected {notes.parent} to be new or a saved module, got something else"
    assert message in capsys.readouterr().err
    assert notes.read_text() == "keep me"
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "run" / "model").exists()
