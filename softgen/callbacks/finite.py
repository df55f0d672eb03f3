"""Stops a run whose loss, or one of the values behind it, is NaN or infinite, with its name and the step."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from softgen.distributed import max_over_ranks
from softgen.training.stage import Stage


class StopOnNonFinite(Callback):
    """Notes on the device the first optimizer step in which each value is not finite, and looks at them now and then.

    So a step never waits for the device, and no checkpoint is written after a bad step unseen. Before one is written,
    and at the end, the weights are looked at too: a finite loss may have a gradient that is not.

    Args:
        check_every: Optimizer steps between looks, at least 1.
    """

    def __init__(self, *, check_every: int = 20) -> None:
        if check_every < 1:
            raise ValueError(f"StopOnNonFinite.check_every: expected at least 1, got {check_every}")
        self.check_every = check_every
        self._first_bad: dict[str, Tensor] = {}
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin without notes."""
        self._first_bad = {}
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note this step's values."""
        assert isinstance(pl_module, Stage)
        is_complete = trainer.global_step != self._last_step  # or gradients accumulate
        self._last_step = trainer.global_step
        step = trainer.global_step + (not is_complete)
        for name, value in pl_module.latest_values.items():
            noted = self._first_bad.get(name)
            here = torch.where(torch.isfinite(value), -1, step)
            self._first_bad[name] = here if noted is None else torch.where(noted >= 0, noted, here)
        if (is_complete and step % self.check_every == 0) or trainer.should_stop:
            self._look()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never keep a checkpoint of a broken run."""
        self._look()
        _look_at_weights(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last look."""
        self._look()
        _look_at_weights(trainer, pl_module)

    def _look(self) -> None:
        # Over all processes: a loss that is broken on one of them stops them all, instead of leaving them waiting.
        worst = {name: max_over_ranks(step) for name, step in self._first_bad.items()}
        bad = {name: int(step) for name, step in worst.items() if int(step) >= 0}
        if bad:
            step = min(bad.values())
            names = ", ".join(name for name, first in bad.items() if first == step)
            raise ValueError(f"{names}: expected a finite value, got NaN or infinity at step {step}")


def _look_at_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    trained = {name: value.detach() for name, value in pl_module.named_parameters() if value.requires_grad}
    if not trained:
        return
    broken = max_over_ranks(torch.stack([~value.isfinite().all() for value in trained.values()]).int())
    if bool(broken.any()):
        name = next(name for name, bad in zip(trained, broken.tolist(), strict=True) if bad)
        raise ValueError(f"{name}: expected finite weights, got NaN or infinity after step {trainer.global_step}")
