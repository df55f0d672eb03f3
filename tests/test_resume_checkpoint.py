"""When `ResumeCheckpoint` writes, and what it says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from distill import SoftDiMO
from softgen.callbacks import ResumeCheckpoint, latest_checkpoint, read_checkpoint
from softgen.data import Labels
from softgen.models import MaskedTransformer


def _fit(*callbacks: Callback, samples: int = 1000, **options: Any) -> None:
    torch.manual_seed(0)
    teacher = MaskedTransformer(num_codes=7, num_sites=5, num_classes=3, width=8, depth=1, heads=1)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"max_steps": 6, "limit_val_batches": 0, **options},
    )
    trainer.fit(SoftDiMO(teacher=teacher), datamodule=Labels(num_classes=3, batch_size=8, samples_per_epoch=samples))


class _Interrupt(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise KeyboardInterrupt


class _Stop(Callback):
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.global_step == 2


def test_a_dry_run_leaves_checkpoints_where_they_are(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000750.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("x")
    _fit(ResumeCheckpoint(run_dir=str(tmp_path)), fast_dev_run=True)
    assert checkpoint.is_file()


def test_early_stopping_leaves_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    _fit(
        _Stop(),
        ResumeCheckpoint(run_dir=str(tmp_path)),
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000002.ckpt"


def test_early_stopping_at_the_end_of_an_epoch_does_too(tmp_path: Path) -> None:
    stop = EarlyStopping("val/max_probability", mode="max", stopping_threshold=-1.0)
    _fit(stop, ResumeCheckpoint(run_dir=str(tmp_path)), samples=16, limit_val_batches=1, num_sanity_val_steps=0)
    assert stop.stopped_epoch == 0
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000002.ckpt"


def test_checkpoints_of_another_callback_hold_whole_steps_where_gradients_accumulate(tmp_path: Path) -> None:
    other = ModelCheckpoint(tmp_path / "other", "{step}", every_n_train_steps=2, save_top_k=-1)
    _fit(other, ResumeCheckpoint(run_dir=str(tmp_path)), accumulate_grad_batches=3)
    for step in (2, 4, 6):
        loops = read_checkpoint(tmp_path / "other" / f"step={step}.ckpt")["loops"]["fit_loop"]
        assert loops["epoch_loop.batch_progress"]["total"]["processed"] == 3 * step


@pytest.mark.parametrize(("every", "hint"), [(1, "go on from step_00000002.ckpt"), (10, "there is no checkpoint yet")])
def test_an_interrupted_run_says_where_it_goes_on(
    every: int, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        _fit(ResumeCheckpoint(run_dir=str(tmp_path), every_n_steps=every), _Interrupt())
    assert f"interrupted at step 2; {hint}" in capsys.readouterr().err
