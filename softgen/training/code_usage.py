"""Which codes held-out images use: logged in validation, and looked at once more when a tokenizer's stage ends.

Shape legend: C codebooks, K codes of each, N latents of one codebook.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor

from softgen.data.base import ImageDataModule, SampleSource
from softgen.data.batches import random_indices
from softgen.distributed import sum_over_ranks
from softgen.relaxation import perplexity
from softgen.training.stage import Stage

LEAST_USED = 0.6
"""Share of codes in use below which a stage ends with a warning."""
_TOKENS_A_CODE = 32  # that the share at the end is measured on, if there are as many held-out images


@dataclass(frozen=True)
class CodeUsage:
    """How codes are used.

    Attributes:
        used: Share of all codes that some latent takes, in [0, 1]; scalar.
        perplexity: exp(entropy) of the codes taken, in [1, K]; a mean over codebooks; scalar.
    """

    used: Tensor
    perplexity: Tensor


def code_usage(counts: Tensor) -> CodeUsage:
    """Usage from how often each code was taken, (C, K)."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return CodeUsage(
        used=(counts > 0).float().mean(), perplexity=torch.stack([perplexity(share) for share in shares]).mean()
    )


def count_codes(codes: Tensor, *, num_codes: int) -> Tensor:
    """How often each code was taken, (C, K) float32, by codes (C, N) int64."""
    counts = torch.zeros(len(codes), num_codes, dtype=torch.float32, device=codes.device)
    return counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.float32))


class CodeStage(Stage):
    """A stage whose product assigns codes to images."""

    _counts: Tensor | None = None

    @property
    @abstractmethod
    def code_shape(self) -> tuple[int, int] | None:
        """(C, K); None for a tokenizer without codes."""

    @abstractmethod
    def codes_of(self, images: Tensor) -> Tensor:
        """The codes (C, N) int64 of images (B, 3, H, W)."""

    def on_validation_epoch_start(self) -> None:
        """Start counting which codes the held-out images use."""
        shape = self.code_shape
        self._counts = None if shape is None else torch.zeros(shape, dtype=torch.float32, device=self.device)

    def on_test_epoch_start(self) -> None:
        """As validation."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """As validation."""
        self.on_validation_epoch_end()

    def count(self, codes: Tensor) -> None:
        """Count the codes (C, N) of a held-out batch."""
        assert self._counts is not None
        self._counts += count_codes(codes, num_codes=self._counts.shape[1])

    def on_validation_epoch_end(self) -> None:
        """Log the share of codes that the held-out images use, and its perplexity."""
        if self._counts is None:
            return
        usage = code_usage(sum_over_ranks(self._counts))
        self.log("val/codebook_used", usage.used)
        self.log("val/perplexity", usage.perplexity)

    def finish(self) -> None:
        """Warn of a codebook of which a large part lies idle, with the averaged weights that are left behind."""
        data = getattr(self.trainer, "datamodule", None)
        if self.code_shape is None or not isinstance(data, ImageDataModule):
            return
        seen, counts = 0, torch.zeros(self.code_shape, dtype=torch.float32, device=self.device)
        with self.finished():
            for images in self.batches_of(data.val_source()):
                counts += count_codes(self.codes_of(images), num_codes=counts.shape[1])
                seen += len(images)
                if counts.sum() >= _TOKENS_A_CODE * counts.numel():
                    break
        used = float(code_usage(counts).used)
        if seen and used < LEAST_USED:
            rank_zero_warn(
                f"tokenizer: {used:.1%} of its codes are used on {seen:,} held-out images, under {LEAST_USED:.0%}: "
                "fewer codes, or more steps, may serve as well"
            )

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Within, the product is as it will be left: averaged weights, eval mode, the trainer's precision."""
        from softgen.callbacks.ema import averaged_product  # it imports this package

        was_training = self.training
        self.eval()
        try:
            with (
                averaged_product(self.trainer, self),
                self.trainer.precision_plugin.forward_context(),
                torch.no_grad(),
            ):
                yield
        finally:
            self.train(was_training)

    def batches_of(self, source: SampleSource, *, limit: int | None = None) -> Iterator[Tensor]:
        """Images (B, 3, H, W) of a source on the stage's device, all or `limit` of them, whatever the data's order."""
        order = random_indices(len(source), limit=limit)
        for start in range(0, len(order), 64):
            yield move_data_to_device(source.fetch(order[start : start + 64])["image"], self.device)
