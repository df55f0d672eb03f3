"""Checkpoints to resume from: written whole or not at all, the last few kept."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from softgen.messages import reason_of

PATTERN = "step_*.ckpt"


class ResumeCheckpoint(Checkpoint):
    """Writes `<run_dir>/checkpoints/step_00000123.ckpt` every n optimizer steps and at the last one.

    A checkpoint is written under another name, flushed to disk and renamed, and older ones go only after that:
    a run killed at any moment has a checkpoint that loads. A run that starts anew in a used folder, or goes on from a
    checkpoint that is not the newest, sets those of later steps aside, as `checkpoints_before_1` and so on.

    A run that ends while gradients accumulate is resumed at the first batch of that optimizer step, since its gradients
    are not kept; buffers that move with every batch, such as averaged codes, are kept as they were then.

    Args:
        run_dir: The run's folder.
        every_n_steps: Optimizer steps between checkpoints, at least 1.
        keep: How many to keep, at least 1.
    """

    def __init__(self, *, run_dir: str, every_n_steps: int = 1000, keep: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"checkpoint.{name}: expected at least 1, got {value}")
        self.folder = checkpoint_folder(run_dir)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._written_step = -1
        self._last_step = -1
        self._batches_of_step = 0
        self._final_step: float = -1
        self._buffers: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not write again the checkpoint that was just loaded; set those that do not lead to this run aside."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._written_step = self._last_step = trainer.global_step
        self._batches_of_step = 0
        self._final_step = trainer.estimated_stepping_batches
        self._keep_buffers(trainer, pl_module)
        later = [path for path in self.folder.glob(PATTERN) if path.name > _name(trainer.global_step)]
        if later and trainer.is_global_zero:
            aside = next(
                path
                for path in (self.folder.with_name(f"checkpoints_before_{n}") for n in itertools.count(1))
                if not path.exists()
            )
            aside.mkdir()
            for path in later:
                path.rename(aside / path.name)
            rank_zero_warn(f"{self.folder} held checkpoints of an earlier run: they are in {aside} now")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write when it is time, and before a run ends early (a time limit, or SIGTERM)."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = trainer.global_step
        self._batches_of_step = 0 if step != self._last_step else self._batches_of_step + 1
        self._last_step = step
        if self._batches_of_step == 0:
            self._keep_buffers(trainer, pl_module)
        ending = step == self._final_step or trainer.should_stop or trainer.received_sigterm
        due = step % self.every_n_steps == 0 or ending
        if due and step != self._written_step:
            self._written_step = step
            self._write(trainer, self.folder / _name(step))

    def _keep_buffers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As a complete optimizer step leaves them."""
        if trainer.accumulate_grad_batches > 1:
            self._buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write also where SIGTERM cuts a validation short; a resumed run does not take that up again."""
        if trainer.received_sigterm:
            self._write_at_the_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write also where a validation ends the run (early stopping)."""
        if trainer.should_stop:
            self._write_at_the_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write also where an epoch's end ends the run, which is where early stopping looks by default."""
        if trainer.should_stop:
            self._write_at_the_end(trainer)

    def _write_at_the_end(self, trainer: Trainer) -> None:
        real = not trainer.sanity_checking and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if real and trainer.state.fn == TrainerFn.FITTING and trainer.global_step != self._written_step:
            self._written_step = trainer.global_step
            self._write(trainer, self.folder / _name(trainer.global_step))

    def _write(self, trainer: Trainer, target: Path) -> None:
        scratch = target.with_name(f".{target.name}.partial")
        trainer.save_checkpoint(scratch)
        if not trainer.is_global_zero:
            return
        if scratch.is_file():
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(scratch, target)
        for old in sorted(self.folder.glob(PATTERN))[: -self.keep]:
            if old != target:
                old.unlink()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take back the batches of an optimizer step that is not complete, and what they moved."""
        # Another callback may save before this one has seen that the step is complete.
        batches = self._batches_of_step if trainer.global_step == self._last_step else 0
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            for kind in counts:
                counts[kind] -= batches
        if batches:
            state = checkpoint["state_dict"]
            state.update({name: value for name, value in self._buffers.items() if name in state})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on after Ctrl-C or SIGTERM, and from which step."""
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.is_global_zero:
            newest = max(self.folder.glob(PATTERN), default=None)
            hint = f"go on from {newest.name} with --ckpt_path last" if newest else "there is no checkpoint yet"
            print(f"interrupted at step {trainer.global_step}; {hint}", file=sys.stderr)


def _name(step: int) -> str:
    return f"step_{step:08d}.ckpt"


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that loads; damaged ones are passed over with a warning."""
    for path in sorted(checkpoint_folder(run_dir).glob(PATTERN), reverse=True):
        try:
            read_checkpoint(path)
        except ValueError as error:
            rank_zero_warn(f"Passing over a damaged checkpoint: {error}")
        else:
            return path
    return None


def read_checkpoint(path: Path, *, key: str = "ckpt_path") -> dict[str, Any]:
    """Open a Lightning checkpoint without unpickling objects.

    Raises:
        ValueError: If the file is missing, truncated or not such a checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"{key}: expected a checkpoint file or 'last', got {str(path)!r}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{key}: expected a whole Lightning checkpoint, got {path} ({reason_of(error)})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "loops", "optimizer_states"} <= set(checkpoint):
        raise ValueError(f"{key}: expected a Lightning checkpoint, got {path}, which is something else")
    return checkpoint
