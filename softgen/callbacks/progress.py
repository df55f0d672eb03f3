"""One progress bar over the steps of a run, whatever the number of epochs."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from softgen.training.stage import Stage


class StepProgress(ProgressBar):
    """Shows steps done, losses and the time left, on stderr.

    Args:
        refresh_every: Steps between refreshes; each reads the losses from the device.
    """

    def __init__(self, *, refresh_every: int = 10) -> None:
        super().__init__()
        self.refresh_every = refresh_every
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls it on every rank but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step that the run resumes from."""
        total = trainer.estimated_stepping_batches
        self._bar = tqdm(
            total=None if total == float("inf") else int(total),
            initial=trainer.global_step,
            desc=type(pl_module).__name__,
            disable=not self._enabled,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Advance, and show the losses now and then."""
        assert self._bar is not None
        step = trainer.global_step
        self._bar.update(step - self._bar.n)
        if self._enabled and step % self.refresh_every == 0:
            assert isinstance(pl_module, Stage)
            losses = {name: f"{loss.item():.4g}" for name, loss in pl_module.latest_losses.items()}
            self._bar.set_postfix(losses, refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error has a line of its own."""
        self.on_train_end(trainer, pl_module)
