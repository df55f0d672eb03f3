"""Stage 2 on continuous latents: a SiT learns the velocity from data to noise."""

from typing import get_args

import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor

from softgen.data.base import Batch, ImageDataModule
from softgen.data.batches import random_indices
from softgen.data.token_cache import check_shows_images
from softgen.flow import FlowSampler, TimeLaw, draw_times, interpolate, velocity_loss
from softgen.loading import check_latents, load_continuous_tokenizer
from softgen.models.conditions import ClassCondition
from softgen.models.sit import SiT
from softgen.random import SampleRandom
from softgen.tokenizers.continuous import ContinuousTokenizer
from softgen.training.optimization import OptimizerConfig
from softgen.training.stage import Stage, check_image_size

_CHECKED_IMAGES = 256


class FlowTraining(Stage):
    """Velocity matching (SiT, arXiv 2401.08740): |v(x_t, t, class) - (eps - x_0)|^2, x_0 the normalised latents.

    The latents are normalised by the mean and deviation that are saved with the tokenizer.

    Args:
        tokenizer: Folder or hub id of a continuous tokenizer, e.g. a `softgen.tokenizers.SoftVQ`, or the tokenizer
            itself. Its weights stay as they are.
        model: The network.
        optimizer: Settings of its parameters.
        time_law: Of t: `uniform`, or `logit_normal`.
        time_mean: Of its logit, for `logit_normal`; above 0 leans to noise.
        time_std: Of its logit, above 0.
        label_dropout: Share of samples trained without class, for guidance; in [0, 1].
        preview_steps: Heun steps of the preview.
        preview_guidance: Its guidance.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        tokenizer: str | ContinuousTokenizer,
        model: SiT,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4),  # noqa: B008 - frozen
        time_law: TimeLaw = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        label_dropout: float = 0.1,
        preview_steps: int = 25,
        preview_guidance: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        if time_law not in get_args(TimeLaw):
            raise ValueError(f"model.time_law: expected one of {', '.join(get_args(TimeLaw))}, got {time_law!r}")
        if not time_std > 0:
            raise ValueError(f"model.time_std: expected a number above 0, got {time_std}")
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"model.label_dropout: expected a number in [0, 1], got {label_dropout}")
        opened = (
            load_continuous_tokenizer(tokenizer, key="model.tokenizer") if isinstance(tokenizer, str) else tokenizer
        )
        check_latents(model, opened, key="model.tokenizer")
        if preview_guidance != 1 and not model.has_null_condition:
            raise ValueError(
                f"model.preview_guidance: expected 1, since the model has no classes, got {preview_guidance}"
            )
        if preview_steps < 1:
            raise ValueError(f"model.preview_steps: expected at least 1, got {preview_steps}")
        self.hold_frozen("tokenizer", opened)
        self.model = model
        self.time_law: TimeLaw = time_law
        self.time_mean, self.time_std = time_mean, time_std
        self.label_dropout = label_dropout if model.has_null_condition else 0.0
        self.preview_sampler = FlowSampler(steps=preview_steps, guidance=preview_guidance)

    @property
    def tokenizer(self) -> ContinuousTokenizer:
        """The frozen tokenizer."""
        tokenizer = self.frozen("tokenizer")
        assert isinstance(tokenizer, ContinuousTokenizer)
        return tokenizer

    @property
    def product(self) -> SiT:
        """The network."""
        return self.model

    @property
    def tokenizer_beside(self) -> ContinuousTokenizer:
        """The tokenizer of the latents."""
        return self.tokenizer

    def check_data(self, data: ImageDataModule) -> None:
        """Images of the tokenizer's size, with the model's classes."""
        check_shows_images(data)
        check_image_size(data, self.tokenizer)
        if self.model.num_classes and data.num_classes != self.model.num_classes:
            raise ValueError(
                f"data.num_classes: expected {self.model.num_classes} as the model has, got {data.num_classes}"
            )

    def on_fit_start(self) -> None:
        """Warn of latents that the tokenizer's statistics do not normalise."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            return
        source = data.train_source()
        batch = move_data_to_device(source.fetch(random_indices(len(source), limit=_CHECKED_IMAGES)), self.device)
        latents = self._latents(batch["image"])
        mean, std = float(latents.mean()), float(latents.std())
        if abs(mean) > 0.5 or not 0.5 < std < 2:
            rank_zero_warn(
                f"model.tokenizer: its normalised latents have mean {mean:.2f} and deviation {std:.2f} instead of 0 "
                "and 1; see latent_mean and latent_std in its config.json"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Encode, add noise, predict the velocity."""
        noise = self.noise(batch, "flow")
        condition = self._condition(batch).drop(noise.uniform() < self.label_dropout)
        return self.report(batch, {"velocity": self._loss(batch, condition, noise)}, {})

    def _loss(self, batch: Batch, condition: ClassCondition, noise: SampleRandom) -> Tensor:
        x_0 = self._latents(batch["image"])
        t = draw_times(self.time_law, noise, mean=self.time_mean, std=self.time_std)
        eps = noise.normal(*x_0.shape[1:])
        return velocity_loss(self.model(interpolate(x_0, eps, t), t, condition), x_0, eps)

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        return self.tokenizer.normalise(self.tokenizer.encode(images)).float()

    def _condition(self, batch: Batch) -> ClassCondition:
        if self.model.num_classes:
            return self.model.encode(batch["label"])
        return self.model.encode(torch.zeros(len(batch["ordinal"]), dtype=torch.long, device=self.device))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out loss under the same noise every time."""
        loss = self._loss(batch, self._condition(batch), self.noise(batch, "validation"))
        self.report_validation(batch, {"velocity": loss})

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Samples of the batch's classes."""
        small = {**batch, "ordinal": batch["ordinal"][:32]}
        condition = self._condition(batch)[:32]
        latents = self.preview_sampler(self.model, condition, self.noise(small, "preview"))
        return self.tokenizer.decode(self.tokenizer.denormalise(latents))
