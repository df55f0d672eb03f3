"""Train a CLIP on captioned images (arXiv 2103.00020), with open_clip's model and loss."""

import importlib
from typing import Any

import torch
from torch import Tensor

from softgen.data.base import Batch, ImageDataModule
from softgen.models.open_clip_models import OpenCLIP
from softgen.pretrained import Pretrained
from softgen.relaxation import full_precision
from softgen.training.optimization import OptimizerConfig
from softgen.training.stage import Stage


class CLIPTraining(Stage):
    """The contrastive loss over all processes' batches; its folder opens as a reward, `local-dir:<run_dir>/model`.

    Validation reports retrieval within a batch: the share of images whose own caption is the nearest one, and the
    reverse. A caption that occurs twice counts as right wherever it stands.

    Args:
        model: What is trained.
        optimizer: Settings of its parameters.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        model: OpenCLIP,
        optimizer: OptimizerConfig = OptimizerConfig(  # noqa: B008 - frozen
            lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, warmup_steps=100, decay="cosine"
        ),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        self.model = model
        self._loss: Any = None

    @property
    def product(self) -> Pretrained:
        """The CLIP model."""
        return self.model

    def setup(self, stage: str) -> None:
        """Also open_clip's loss, which gathers the features of all processes."""
        super().setup(stage)
        self._loss = importlib.import_module("open_clip").ClipLoss(
            gather_with_grad=True, rank=self.trainer.global_rank, world_size=self.trainer.world_size
        )

    def check_data(self, data: ImageDataModule) -> None:
        """It needs captioned images of the model's size."""
        if not (data.has_prompts and data.has_images):
            raise ValueError(f"data: expected captioned images, got a {type(data).__name__}")
        if data.image_size != self.model.image_size:
            raise ValueError(
                f"data.image_size: expected {self.model.image_size} pixels as the model has, got {data.image_size}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        self.model.limit_logit_scale()
        images, texts = self.model.encode_images(batch["image"]), self.model.encode_prompts(batch["prompt"])
        scale = self.model.logit_scale
        with full_precision(images):  # a hundred times what half precision would round off
            loss = self._loss(images, texts, scale)
        return self.report(batch, {"clip": loss}, {"logit_scale": scale.detach()})

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Retrieval within the batch, both ways."""
        images, texts = self.model.encode_images(batch["image"]), self.model.encode_prompts(batch["prompt"])
        with full_precision(images):
            similarity = images @ texts.T
        ids = {prompt: index for index, prompt in enumerate(batch["prompt"])}
        same = torch.tensor([ids[prompt] for prompt in batch["prompt"]], device=similarity.device)
        to_text, to_image = similarity.argmax(dim=1), similarity.argmax(dim=0)
        values = {
            "image_to_text": (same[to_text] == same).float().mean(),
            "text_to_image": (same[to_image] == same).float().mean(),
        }
        self.report_validation(batch, values)

    def preview(self, batch: Batch) -> Tensor | None:
        """There is no picture."""
        return None
