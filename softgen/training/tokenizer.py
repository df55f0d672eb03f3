"""Stage 1: train an image tokenizer."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from softgen.data.base import Batch, ImageDataModule
from softgen.data.token_cache import TokenCache
from softgen.distributed import sum_over_ranks
from softgen.pretrained import Pretrained
from softgen.random import SampleRandom
from softgen.relaxation import perplexity
from softgen.tokenizers.conv_vq import ConvVQTokenizer
from softgen.training.optimization import OptimizerConfig
from softgen.training.stage import Stage, check_image_size


class TokenizerTraining(Stage):
    """Trains a VQ tokenizer: L_mse + w_l1 L_l1 + w_commit |z - sg(e)|^2, codes by moving averages.

    Args:
        tokenizer: The tokenizer, e.g. `softgen.tokenizers.ConvVQTokenizer`.
        optimizer: Settings of encoder and decoder.
        warmup_steps: Steps without quantisation, after which the codes start from latents of one batch.
        l1_weight: w_l1, at least 0.
        commitment_weight: w_commit, at least 0.
        codebook_decay: Of the codes' moving averages, in [0, 1).
        dead_below: A code is revived when its average count falls below this share of the mean count.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        tokenizer: ConvVQTokenizer,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3),  # noqa: B008 - frozen
        warmup_steps: int = 100,
        l1_weight: float = 0.1,
        commitment_weight: float = 0.25,
        codebook_decay: float = 0.98,
        dead_below: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        for name, value in (("l1_weight", l1_weight), ("commitment_weight", commitment_weight)):
            if not value >= 0:
                raise ValueError(f"model.{name}: expected a number of at least 0, got {value}")
        if not 0 <= codebook_decay < 1:
            raise ValueError(f"model.codebook_decay: expected a number in [0, 1), got {codebook_decay}")
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps: expected at least 0, got {warmup_steps}")
        if not 0 <= dead_below < 1:
            raise ValueError(f"model.dead_below: expected a number in [0, 1), got {dead_below}")
        self.tokenizer = tokenizer
        self._codes_started = False
        self.warmup_steps = warmup_steps
        self.l1_weight = l1_weight
        self.commitment_weight = commitment_weight
        self.codebook_decay = codebook_decay
        self.dead_below = dead_below

    @property
    def product(self) -> Pretrained:
        """The tokenizer."""
        return self.tokenizer

    def check_data(self, data: ImageDataModule) -> None:
        """Images must have the tokenizer's size."""
        if not data.has_images or isinstance(data, TokenCache):
            raise ValueError(f"data: expected images, got {type(data).__name__}")
        check_image_size(data, self.tokenizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Encode, quantise with a straight-through gradient, decode, compare."""
        images = batch["image"]
        latents = self.tokenizer.latents(images)
        if self.global_step < self.warmup_steps:
            return self.report(batch, self._reconstruction_losses(latents, images), {})
        flat = latents.detach().flatten(0, 1)
        noise = self.noise(batch, "codebook")
        if not self._codes_started:
            self._codes_started = True
            self.tokenizer.quantizer.reset_to(_pick(flat, self.tokenizer.num_codes, noise))
        tokens = self.tokenizer.quantize(latents.detach())
        codes = self.tokenizer.codebook[tokens]
        losses = self._reconstruction_losses(latents + (codes - latents).detach(), images)
        losses["commitment"] = self.commitment_weight * (latents - codes).square().sum(-1).mean()
        usage = self.tokenizer.quantizer.update(
            flat,
            tokens.flatten(),
            candidates=_pick(flat, self.tokenizer.num_codes, noise),
            decay=self.codebook_decay,
            dead_below=self.dead_below,
        )
        logs = {"codebook_used": usage.used, "perplexity": usage.perplexity, "revived": usage.revived.float()}
        return self.report(batch, losses, logs)

    def on_fit_start(self) -> None:
        """Warn of a run that ends before it quantises anything."""
        if self.trainer.estimated_stepping_batches <= self.warmup_steps:
            rank_zero_warn(
                f"model.warmup_steps: {self.warmup_steps} steps without quantisation fill the whole run; "
                "its codes will be random"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep whether the codes have started."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["codes_started"] = self._codes_started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore whether the codes have started."""
        super().on_load_checkpoint(checkpoint)
        self._codes_started = bool(checkpoint.get("codes_started", False))

    def _reconstruction_losses(self, embeddings: Tensor, images: Tensor) -> dict[str, Tensor]:
        decoded = self.tokenizer.decode_raw(embeddings)
        return {"mse": F.mse_loss(decoded, images), "l1": self.l1_weight * F.l1_loss(decoded, images)}

    def on_validation_epoch_start(self) -> None:
        """Start counting which codes the held-out images use."""
        self._val_counts = torch.zeros(self.tokenizer.num_codes, device=self.device)

    def on_test_epoch_start(self) -> None:
        """As validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """As validation."""
        self.on_validation_epoch_end()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out error, and the codes in use."""
        tokens = self.tokenizer.encode(batch["image"])
        mse = F.mse_loss(self.tokenizer.decode(tokens), batch["image"])
        self.log("val/mse", mse, batch_size=len(batch["ordinal"]), sync_dist=True)
        self._val_counts.index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten(), dtype=torch.float32))

    def on_validation_epoch_end(self) -> None:
        """Log the share of codes that the held-out images use, and its perplexity."""
        counts = sum_over_ranks(self._val_counts)
        share = counts / counts.sum().clamp(min=1)
        self.log("val/codebook_used", (counts > 0).float().mean())
        self.log("val/perplexity", perplexity(share))

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Images and, below each row, their reconstructions."""
        images = batch["image"][:16]
        return torch.cat([images, self.tokenizer.decode(self.tokenizer.encode(images))])


def _pick(rows: Tensor, count: int, noise: SampleRandom) -> Tensor:
    """`count` rows at random, with repetition where there are fewer; each sample's noise serves its own share."""
    per_sample = -(-count // len(noise))
    choice = noise.integers(rows.shape[0], per_sample).flatten()[:count]
    return rows[choice]
