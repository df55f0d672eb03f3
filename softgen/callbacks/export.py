"""Leaves the finished product in the run folder, ready for the next stage."""

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from softgen.callbacks.ema import averaged_product
from softgen.pretrained import check_target
from softgen.training.stage import Stage


class ExportModel(Callback):
    """Writes `<run_dir>/model` (config.json + safetensors) when fitting ends, with averaged weights if kept.

    What the stage leaves beside its product, such as Di[M]O's auxiliary model, gets a folder of its own, with the
    weights as they are.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, *, run_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self._trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now, not after hours, whether the folders can be written."""
        assert isinstance(pl_module, Stage)
        for name in ("model", *pl_module.beside):
            check_target(self.run_dir / name)
        self._trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that resumes at its last step does not get here."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folders, on rank 0."""
        assert isinstance(pl_module, Stage)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = self.run_dir / "model"
        if trainer.global_step == 0:
            rank_zero_warn(f"Nothing was trained: {folder} is left as it was")
            return
        if not self._trained:
            pl_module.finish()
        if not trainer.is_global_zero:
            return
        for name, module in pl_module.beside.items():
            module.save_pretrained(self.run_dir / name)
        with averaged_product(trainer, pl_module) as product:
            product.save_pretrained(folder, tokenizer=pl_module.tokenizer_beside)
        print(f"model: {folder}", file=sys.stderr)
