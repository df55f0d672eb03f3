"""Averaged weights of the product alone, right after a resume and in validation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from softgen.pretrained import Pretrained
from softgen.training.stage import Stage


class StudentEMA(Callback):
    """Exponential moving average of the stage's product (the student, in distillation).

    Validation, and the model that is left at the end, use the average. Checkpoints hold the raw weights in the
    module's state and the average in this callback's, whenever they are written. It is kept in float32 at least: half
    precision would round its small steps away.

    Args:
        decay: In [0, 1); the average of step t uses min(decay, (1 + t) / (10 + t)).
        device: Where the average is kept, such as `cpu`, which frees as much of an accelerator's memory as the product
            takes and costs a copy of its weights an optimizer step; by default where the weights are.
    """

    def __init__(self, *, decay: float = 0.9999, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"StudentEMA.decay: expected a number in [0, 1), got {decay}")
        if device is not None:
            try:
                torch.device(device)
            except RuntimeError as error:
                raise ValueError(f"StudentEMA.device: expected a device of torch, got {device!r}") from error
        self.decay = decay
        self.device = device
        self.updates = 0
        self._last_step = 0
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] | None = None
        self._is_restored = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the current weights, or from those that a checkpoint restored."""
        live = _floating(pl_module)
        if not self._is_restored:
            self.updates = 0
            self._average = {name: value.detach().to(_wide(value), copy=True) for name, value in live.items()}
        self._is_restored = False
        missing = next((name for name in live if name not in self._average), None)
        if missing is not None:
            raise ValueError(
                f"ckpt_path: expected a checkpoint with an average of {missing}, which this run trains, got none"
            )
        self._average = {
            name: self._average[name].to(self.device or value.device, _wide(value)) for name, value in live.items()
        }

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What was restored is not for the next run."""
        self._is_restored = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step to count from; a resumed run knows it only now."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the average, once an optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = _floating(pl_module)
        if self.device is None:
            averages = [self._average[name] for name in live]
            torch._foreach_lerp_(averages, [value.to(_wide(value)) for value in live.values()], 1 - decay)
        else:
            for name, value in live.items():
                self._average[name].lerp_(value.to(self.device, _wide(value)), 1 - decay)
        self.updates += 1

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Within, the product has the averaged weights; afterwards it has those that it had before."""
        already = self._raw is not None
        self._swap_in(pl_module)
        try:
            yield
        finally:
            if not already:
                self._swap_out(pl_module)

    def _copied(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device or value.device, copy=True)

    def _swap_in(self, pl_module: LightningModule) -> None:
        if not self._average or self._raw is not None:
            return
        live = _floating(pl_module)
        self._raw = {name: self._copied(value) for name, value in live.items()}
        _copy_into(live, self._average)
        _product(pl_module).on_weights_averaged()

    def _swap_out(self, pl_module: LightningModule) -> None:
        if self._raw is not None:
            _copy_into(_floating(pl_module), self._raw)
            self._raw = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the raw weights."""
        self._swap_out(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self._swap_in(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the raw weights."""
        self._swap_out(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average."""
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the raw weights."""
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint written during validation still holds the raw weights."""
        if self._raw is None:
            return
        for name, module in pl_module.named_modules():
            if module is _product(pl_module):
                checkpoint["state_dict"].update({f"{name}.{key}": value for key, value in self._raw.items()})
                return

    def state_dict(self) -> dict[str, Any]:
        """The average itself, no copy, and the number of updates."""
        return {"updates": self.updates, "average": dict(self._average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.updates = int(state_dict["updates"])
        self._average = {name: value.clone() for name, value in state_dict["average"].items()}
        self._is_restored = True


@contextmanager
def averaged_product(trainer: Trainer, pl_module: LightningModule) -> Iterator[Pretrained]:
    """Within, the stage's product has its averaged weights, if the trainer keeps an average."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StudentEMA):
            with callback.averaged(pl_module):
                yield _product(pl_module)
            return
    yield _product(pl_module)


def _product(pl_module: LightningModule) -> Pretrained:
    assert isinstance(pl_module, Stage)
    return pl_module.product


def _floating(pl_module: LightningModule) -> dict[str, Tensor]:
    """Live parameters and buffers that an average makes sense for, by name."""
    product = _product(pl_module)
    trained = {name: value for name, value in product.named_parameters() if value.requires_grad}
    buffers = {name: value for name, value in product.named_buffers() if value.is_floating_point()}
    if buffers:
        # Constants such as attention masks, which hold infinities, are in no state dict.
        saved = product.state_dict(keep_vars=True).keys()
        buffers = {name: value for name, value in buffers.items() if name in saved}
    return {**trained, **buffers}


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


@torch.no_grad()
def _copy_into(live: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in live.items():
        value.copy_(values[name])
