"""What every training stage shares: what it produces, what it holds frozen, its randomness and its optimizer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from softgen.data.base import Batch, ImageDataModule
from softgen.data.token_cache import TokenCache
from softgen.distributed import sum_over_ranks
from softgen.models.base import ImageCodeModel
from softgen.models.conditions import Asked
from softgen.pretrained import Pretrained, fingerprint
from softgen.random import SampleRandom, derive_seed
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer
from softgen.training.optimization import OptimizerConfig, ParameterGroup, build_optimizer, hidden_matrices, lr_factor

S = TypeVar("S", bound="Stage")
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "momentum")
"""Of the optimizer's groups, by the configuration."""


class Stage(LightningModule, ABC):
    """Base of the Lightning modules.

    Args:
        optimizer: Settings of the product's parameters.
        seed: Seed of all randomness in training; the command line links it to `--seed`.
    """

    def __init__(self, *, optimizer: OptimizerConfig, seed: int) -> None:
        super().__init__()
        optimizer.check(key="model.optimizer")
        self.optimizer_config = optimizer
        self.seed = seed
        # A plain dict: registered nowhere, so out of checkpoints, of DDP's buckets and of `train()`.
        self._frozen: dict[str, nn.Module] = {}
        self._fingerprints: dict[str, str] = {}
        self._group_settings: list[dict[str, Any]] = []
        self._latest_losses: dict[str, Tensor] = {}
        self._latest_logs: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def product(self) -> Pretrained:
        """What the stage trains and leaves in `model/`: the average of its weights is kept."""

    @property
    def tokenizer_beside(self) -> ImageTokenizer | ContinuousTokenizer | None:
        """The tokenizer to save beside the product, so that one path is enough."""
        return None

    @property
    def beside(self) -> Mapping[str, Pretrained]:
        """What else is left in the run folder for a later run to go on from, by the name of its folder."""
        return {}

    @abstractmethod
    def preview(self, batch: Batch) -> Tensor | None:
        """Images (n, 3, H, W) in [0, 1] that show the state of the training, or None where there is no picture."""

    def setup(self, stage: str) -> None:
        """Refuse data that does not go with the models, before any work, and note which frozen modules the run uses.

        Later the trainer may change their type, and with it the fingerprints.
        """
        clip = self.trainer.gradient_clip_val
        if clip is not None and not clip >= 0:
            raise ValueError(f"trainer.gradient_clip_val: expected a number of at least 0, got {clip}")
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            self.check_data(data)
        if stage == "fit":
            for name, module in self._frozen.items():
                self._fingerprint(name, module)

    def on_train_start(self) -> None:
        """Optimizer and schedule as they are configured: a checkpoint restores its own rates and decays too."""
        schedule = self.lr_schedulers()
        if not self._group_settings or not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return  # those of a subclass, or of Lightning's search for a rate
        schedule.base_lrs = [settings["lr"] for settings in self._group_settings]
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * factor(schedule.last_epoch) for base, factor in rates]
        groups = schedule.optimizer.param_groups
        for group, settings, rate in zip(groups, self._group_settings, schedule._last_lr, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=rate)

    def on_train_end(self) -> None:
        """The product is finished."""
        self.finish()

    def finish(self) -> None:
        """Measure what belongs to the finished product; also called where a resumed run had nothing left to train."""

    def check_data(self, data: ImageDataModule) -> None:
        """Raise ValueError, naming the key, if the data does not go with the models."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What draws without a generator of its own, as dropout does, depends on seed, batch and process alone too."""
        torch.manual_seed(derive_seed(self.seed, "batch", self.trainer.fit_loop.total_batch_idx, self.global_rank))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """As the preview."""
        return self.preview(batch)

    def hold_frozen(self, name: str, module: nn.Module) -> None:
        """Hold a module in eval mode and without gradients to its weights, outside parameters and checkpoints."""
        self._frozen[name] = module.requires_grad_(requires_grad=False).eval()

    def frozen(self, name: str) -> nn.Module | None:
        """The frozen module of that name, None if there is none."""
        return self._frozen.get(name)

    @property
    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Everything that is held frozen, by name."""
        return dict(self._frozen)

    def _apply(self: S, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S:  # noqa: FBT001, FBT002
        for module in self._frozen.values():
            module._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def noise(self, batch: Batch, stream: str) -> SampleRandom:
        """This batch's draws of one named stream; a function of (seed, stream, sample's ordinal)."""
        return SampleRandom(derive_seed(self.seed, stream), batch["ordinal"], device=self.device)

    def asked_of(self, batch: Batch, model: ImageCodeModel) -> Asked:
        """What the batch asks of a model: its prompts or labels; zeros (B,) of an unconditional model."""
        if model.text_encoder is not None:
            prompts: list[str] = batch["prompt"]
            return prompts
        if model.num_classes == 0:
            return torch.zeros(len(batch["ordinal"]), dtype=torch.long, device=self.device)
        labels: Tensor = batch["label"]
        return labels

    def report(self, batch: Batch, losses: Mapping[str, Tensor], logs: Mapping[str, Tensor]) -> Tensor:
        """Log a step and return the summed loss. All of its values are watched for NaN and infinity."""
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self._latest_losses = {name: loss.detach() for name, loss in losses.items()}
        self._latest_logs = dict(logs)
        values = {f"train/{name}": value for name, value in self.latest_values.items()}
        self.log_dict(values, batch_size=len(batch["ordinal"]))
        return total

    def report_validation(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Log what validation measured of a batch as `val/<name>`: the mean over processes, each with the same weight.

        Lightning rounds the mean of uneven batch sizes down to a whole number.
        """
        size = sum_over_ranks(torch.tensor(len(batch["ordinal"]), device=self.device))
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=int(size), sync_dist=True)

    @property
    def latest_losses(self) -> Mapping[str, Tensor]:
        """The named losses of the last training step, detached, on their device."""
        return self._latest_losses

    @property
    def latest_values(self) -> Mapping[str, Tensor]:
        """The losses of the last training step, and what else it logged."""
        return {**self._latest_losses, **self._latest_logs}

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """The optimizer's groups; a stage with critics adds one each."""
        return [
            ParameterGroup(
                "product",
                list(self.product.parameters()),
                self.optimizer_config,
                matrices=hidden_matrices(self.product),
            )
        ]

    def configure_optimizers(self) -> Any:
        """One optimizer with named groups, one schedule a group."""
        groups = list(self.parameter_groups())
        # The fused kernel unscales gradients itself, after our clipping: not with a gradient scaler.
        optimizer = build_optimizer(groups, fused=self.trainer.precision != "16-mixed")
        self._group_settings = [
            {name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups
        ]
        total_steps = self._total_steps(groups)
        by_name = {
            group.name: lr_factor(group.config, total_steps=total_steps, first_step=group.first_step)
            for group in groups
        }
        factors = [by_name[param_group["name"]] for param_group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self, groups: Iterable[ParameterGroup]) -> int:
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            for group in groups:
                if group.config.decay != "constant":
                    raise ValueError(
                        f"trainer.max_steps: expected a number of steps, since the decay of {group.name} is "
                        f"{group.config.decay}, got none"
                    )
            return 1
        return int(total)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of each named group on its own."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm: expected norm, got {gradient_clip_algorithm}")
        by_name: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            by_name.setdefault(group["name"], []).extend(group["params"])
        for parameters in by_name.values():
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which frozen modules the run used."""
        checkpoint["frozen_fingerprints"] = {
            name: self._fingerprint(name, module) for name, module in self._frozen.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other frozen modules than the run began with.

        Raises:
            ValueError: Naming the module.
        """
        for name, expected in checkpoint.get("frozen_fingerprints", {}).items():
            got = self._fingerprint(name, self._frozen[name]) if name in self._frozen else "none"
            if got != expected:
                raise ValueError(
                    f"model.{name}: expected the {name} that the checkpoint was trained with ({expected}), got {got}"
                )

    def check_images(self, data: ImageDataModule, tokenizer: ImageTokenizer) -> None:
        """Raise ValueError unless the data has images of the size of the stage's tokenizer, or tokens that it made."""
        if not data.has_images:
            raise ValueError("data: expected images or tokens, got labels alone")
        if not isinstance(data, TokenCache):
            check_image_size(data, tokenizer)
        elif data.tokenizer_fingerprint != (wanted := self._fingerprint("tokenizer", tokenizer)):
            raise ValueError(
                f"data.root: expected tokens of the tokenizer {wanted}, "
                f"got tokens of {data.tokenizer_fingerprint} in {data.root}"
            )

    def _fingerprint(self, name: str, module: nn.Module) -> str:
        """Taken once, since it reads every weight."""
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(module)
        return self._fingerprints[name]


def check_image_size(data: ImageDataModule, tokenizer: ImageTokenizer | ContinuousTokenizer) -> None:
    """Raise ValueError unless the images have the tokenizer's size."""
    if data.image_size != tokenizer.image_size:
        raise ValueError(
            f"data.image_size: expected {tokenizer.image_size} pixels as the tokenizer has, got {data.image_size}"
        )


def check_conditions(data: ImageDataModule, model: ImageCodeModel) -> None:
    """Raise ValueError unless the data has the model's classes, or prompts; an unconditional model takes any."""
    if model.text_encoder is not None and not data.has_prompts:
        raise ValueError(f"data: expected prompts, since the model is text-conditional, got a {type(data).__name__}")
    if model.num_classes and data.num_classes != model.num_classes:
        raise ValueError(f"data.num_classes: expected {model.num_classes} as the model has, got {data.num_classes}")
