"""Grids of samples, written as PNG at every validation and by `predict`."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from softgen.images import save_grid
from softgen.training.stage import Stage


class SampleGrid(Callback):
    """Writes `<run_dir>/samples/step_000123.png` from the first validation batch, with averaged weights.

    Args:
        run_dir: The run's folder.
        columns: Images a row.
    """

    def __init__(self, *, run_dir: str, columns: int = 16) -> None:
        if columns < 1:
            raise ValueError(f"samples.columns: expected at least 1, got {columns}")
        self.folder = Path(run_dir) / "samples"
        self.columns = columns

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Draw the grid once a validation, on rank 0."""
        if batch_idx != 0 or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Stage)
        with trainer.precision_plugin.forward_context():  # a callback stands outside of it
            images = pl_module.preview(batch)
        if images is None:
            return
        save_grid(images, self.folder / f"step_{trainer.global_step:06d}.png", columns=self.columns)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Write what was predicted, one grid a batch, on rank 0."""
        if outputs is not None and trainer.is_global_zero:
            save_grid(outputs, self.folder / f"predict_{batch_idx:05d}.png", columns=self.columns)
