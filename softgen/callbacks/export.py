"""Leaves the finished product in the run folder, ready for the next stage."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from softgen.callbacks.ema import StudentEMA
from softgen.training.stage import Stage


class ExportModel(Callback):
    """Writes `<run_dir>/model` (config.json + safetensors) when fitting ends, with averaged weights if kept.

    Args:
        run_dir: The run's folder.
    """

    def __init__(self, *, run_dir: str) -> None:
        self.folder = Path(run_dir) / "model"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on rank 0."""
        assert isinstance(pl_module, Stage)
        if not trainer.is_global_zero:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StudentEMA):
                with callback.averaged(pl_module):
                    pl_module.product.save_pretrained(self.folder, tokenizer=pl_module.tokenizer_beside)
                return
        pl_module.product.save_pretrained(self.folder, tokenizer=pl_module.tokenizer_beside)
