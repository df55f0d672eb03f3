"""Leaves the finished product in the run folder, ready for the next stage."""

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from softgen.callbacks.ema import StudentEMA
from softgen.pretrained import check_target
from softgen.training.stage import Stage


class ExportModel(Callback):
    """Writes `<run_dir>/model` (config.json + safetensors) when fitting ends, with averaged weights if kept.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, *, run_dir: str) -> None:
        self.folder = Path(run_dir) / "model"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now, not after hours, whether the folder can be written."""
        check_target(self.folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on rank 0."""
        assert isinstance(pl_module, Stage)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step == 0:
            rank_zero_warn(f"Nothing was trained: {self.folder} is left as it was")
            return
        self._save(trainer, pl_module)
        print(f"model: {self.folder}", file=sys.stderr)

    def _save(self, trainer: Trainer, pl_module: Stage) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StudentEMA):
                with callback.averaged(pl_module):
                    pl_module.product.save_pretrained(self.folder, tokenizer=pl_module.tokenizer_beside)
                return
        pl_module.product.save_pretrained(self.folder, tokenizer=pl_module.tokenizer_beside)
