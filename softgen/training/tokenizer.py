"""Stage 1: train an image tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from softgen.data.base import Batch, ImageDataModule
from softgen.data.token_cache import check_shows_images
from softgen.random import SampleRandom
from softgen.tokenizers.baseline_quantizers import HardQuantizer
from softgen.tokenizers.codebook import EMACodebook
from softgen.tokenizers.conv_vq import ConvVQTokenizer
from softgen.tokenizers.soft_quantizer import SoftQuantizer
from softgen.tokenizers.softvq import SoftVQ
from softgen.training.adversarial import Adversarial
from softgen.training.alignment import Align, AlignmentTerm
from softgen.training.code_usage import CodeStage
from softgen.training.optimization import OptimizerConfig, ParameterGroup
from softgen.training.perceptual import Perceptual
from softgen.training.reconstruction import ReconstructionLosses
from softgen.training.stage import check_image_size

_STATISTICS_IMAGES = 4096


@dataclass(frozen=True)
class _Quantised:
    """What the decoder takes, (B, N, D), with the quantiser's own losses and logs."""

    embeddings: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class TokenizerTraining(CodeStage):
    """Trains a tokenizer: reconstruction losses, what its quantiser needs, and alignment with a frozen network.

    Hard codes (`ConvVQTokenizer`, or `SoftVQ` with `quantization: vq`) add w_commit |z - sg(e)|^2 and follow the
    latents by moving averages. `SoftVQ`'s soft codes are differentiable and need nothing but, if wanted,
    w_kl (H(q) - H(E q)). When the training of a `SoftVQ` ends, the mean and deviation of its latents are measured and
    saved with it.

    Args:
        tokenizer: The tokenizer, e.g. `softgen.tokenizers.ConvVQTokenizer`, or `softgen.tokenizers.SoftVQ`.
        optimizer: Settings of encoder and decoder.
        warmup_steps: Of hard codes: steps without quantisation, after which the codes start from latents of one batch.
        mse_weight: Of the squared error, images in [0, 1]; at least 0.
        l1_weight: w_l1, at least 0.
        perceptual: A perceptual loss; None for none.
        adversarial: A discriminator; None for none.
        align: Alignment of latents with a frozen network's features; None for none.
        kl_weight: w_kl, of soft codes; 0.01 in SoftVQ-VAE.
        commitment_weight: w_commit, of hard codes; at least 0.
        codebook_decay: Of the hard codes' moving averages, in [0, 1).
        dead_below: A hard code is revived when its average count falls below this share of the mean count.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        tokenizer: ConvVQTokenizer | SoftVQ,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3),  # noqa: B008 - frozen
        warmup_steps: int = 100,
        mse_weight: float = 1.0,
        l1_weight: float = 0.1,
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
        align: Align | None = None,
        kl_weight: float = 0.0,
        commitment_weight: float = 0.25,
        codebook_decay: float = 0.98,
        dead_below: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        for name, value in (("kl_weight", kl_weight), ("commitment_weight", commitment_weight)):
            if not value >= 0:
                raise ValueError(f"model.{name}: expected a number of at least 0, got {value}")
        if not 0 <= codebook_decay < 1:
            raise ValueError(f"model.codebook_decay: expected a number in [0, 1), got {codebook_decay}")
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps: expected at least 0, got {warmup_steps}")
        if not 0 <= dead_below < 1:
            raise ValueError(f"model.dead_below: expected a number in [0, 1), got {dead_below}")
        if not isinstance(tokenizer, (ConvVQTokenizer, SoftVQ)):
            raise ValueError(
                f"model.tokenizer: expected a ConvVQTokenizer or a SoftVQ, got a {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        if kl_weight and not isinstance(tokenizer.quantizer, SoftQuantizer):
            raise ValueError(f"model.kl_weight: expected 0 for a tokenizer without soft codes, got {kl_weight}")
        self.reconstruction = ReconstructionLosses(
            image_size=tokenizer.image_size,
            mse_weight=mse_weight,
            l1_weight=l1_weight,
            perceptual=perceptual,
            adversarial=adversarial,
        )
        for name, module in self.reconstruction.frozen_modules.items():
            self.hold_frozen(name, module)
        self.alignment = self._alignment(align)
        self._codes_started = False
        self.warmup_steps = warmup_steps
        self.kl_weight = kl_weight
        self.commitment_weight = commitment_weight
        self.codebook_decay = codebook_decay
        self.dead_below = dead_below

    def _alignment(self, align: Align | None) -> AlignmentTerm | None:
        if align is None:
            return None
        tokenizer = self.tokenizer
        length, dim = (
            (tokenizer.num_latents, tokenizer.latent_dim)
            if isinstance(tokenizer, SoftVQ)
            else (tokenizer.num_sites, tokenizer.code_dim)
        )
        shared = self.reconstruction.shared_features(align.features)
        config = align if shared is None else Align(shared, align.weight, align.how, align.hidden)
        term = AlignmentTerm(
            config, image_size=tokenizer.image_size, num_latents=length, latent_dim=dim, key="model.align"
        )
        self.hold_frozen("aligned_features", term.features)
        return term

    @property
    def product(self) -> ConvVQTokenizer | SoftVQ:
        """The tokenizer."""
        return self.tokenizer

    @property
    def _hard(self) -> EMACodebook | None:
        """The codebook of hard codes, if the tokenizer has them."""
        quantizer = self.tokenizer.quantizer
        if isinstance(quantizer, HardQuantizer):
            return quantizer.codebook
        return quantizer if isinstance(quantizer, EMACodebook) else None

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """`product`, and where there are any `alignment` and `discriminator`."""
        yield from super().parameter_groups()
        if self.alignment is not None:
            yield ParameterGroup("alignment", list(self.alignment.parameters_trained()), self.optimizer_config)
        yield from self.reconstruction.parameter_groups()

    def setup(self, stage: str) -> None:
        """As every stage; and refuse a precision in which codes or automatic weights cannot be had."""
        super().setup(stage)
        precision = str(self.trainer.precision)
        self.reconstruction.check_precision(precision)
        if self.alignment is not None and precision in ("16-true", "bf16-true"):
            raise ValueError(f"trainer.precision: expected 32-true or a mixed one for model.align, got {precision}")
        if self._hard is not None and precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"trainer.precision: expected 32-true or bf16-mixed for codes that are moving averages, got {precision}"
            )

    def check_data(self, data: ImageDataModule) -> None:
        """Images must have the tokenizer's size."""
        check_shows_images(data)
        check_image_size(data, self.tokenizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Encode, quantise, decode, compare."""
        images = batch["image"]
        quantised = self._quantise(batch, self._latents(images))
        maps = None if self.alignment is None else self.alignment.look(images)
        terms = self.reconstruction(
            self.tokenizer.decode_raw(quantised.embeddings),
            images,
            step=self.global_step,
            noise=self.noise(batch, "discriminator"),
            known={self.alignment.features: maps} if self.alignment is not None and maps is not None else {},
        )
        losses = {**terms.losses, **quantised.losses}
        if self.alignment is not None:
            assert maps is not None
            losses["alignment"] = self.alignment(quantised.embeddings, maps, seed=self.seed, step=self.global_step)
        return self.report(batch, losses, {**quantised.logs, **terms.logs})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A discriminator that has not started stays as it is."""
        self.reconstruction.hold(self.global_step)

    def _latents(self, images: Tensor) -> Tensor:
        """What is quantised, (B, N, D)."""
        if isinstance(self.tokenizer, ConvVQTokenizer):
            return self.tokenizer.latents(images)
        raw = self.tokenizer.raw_latents(images)
        return self.tokenizer.quantizer.prepare(raw) if isinstance(self.tokenizer.quantizer, HardQuantizer) else raw

    def _quantise(self, batch: Batch, latents: Tensor) -> _Quantised:
        quantizer, codebook = self.tokenizer.quantizer, self._hard
        if codebook is not None:
            return self._quantise_hard(batch, latents, codebook)
        embeddings: Tensor = quantizer(latents)
        if not self.kl_weight:
            return _Quantised(embeddings)
        assert isinstance(quantizer, SoftQuantizer)
        return _Quantised(embeddings, {"kl": self.kl_weight * quantizer.kl(latents)})

    def _quantise_hard(self, batch: Batch, latents: Tensor, codebook: EMACodebook) -> _Quantised:
        """The nearest codes with a straight-through gradient; moves the codes."""
        if self.global_step < self.warmup_steps:
            return _Quantised(latents)
        flat = latents.detach().flatten(0, 1)
        noise = self.noise(batch, "codebook")
        num_codes = len(codebook.codes)
        if not self._codes_started:
            self._codes_started = True
            codebook.reset_to(_pick(flat, num_codes, noise))
        tokens = codebook.nearest(latents.detach())
        codes = codebook.codes[tokens]
        usage = codebook.update(
            flat,
            tokens.flatten(),
            candidates=_pick(flat, num_codes, noise),
            decay=self.codebook_decay,
            dead_below=self.dead_below,
        )
        return _Quantised(
            latents + (codes - latents).detach(),
            {"commitment": self.commitment_weight * (latents - codes).square().sum(-1).mean()},
            {"codebook_used": usage.used, "perplexity": usage.perplexity, "revived": usage.revived.float()},
        )

    def on_fit_start(self) -> None:
        """Warn of a run that ends before it quantises anything."""
        if self._hard is not None and self.trainer.estimated_stepping_batches <= self.warmup_steps:
            rank_zero_warn(
                f"model.warmup_steps: {self.warmup_steps} steps without quantisation fill the whole run; "
                "its codes will be random"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep whether the codes have started, in an optimizer step that is complete."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["codes_started"] = self._codes_started and self.global_step > self.warmup_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore whether the codes have started."""
        super().on_load_checkpoint(checkpoint)
        self._codes_started = bool(checkpoint.get("codes_started", False))

    @property
    def code_shape(self) -> tuple[int, int] | None:
        """See the base class."""
        quantizer = self.tokenizer.quantizer
        if isinstance(quantizer, SoftQuantizer):
            return len(quantizer.embedding), quantizer.num_codes
        return None if self._hard is None else (1, len(self._hard.codes))

    def codes_of(self, images: Tensor) -> Tensor:
        """See the base class: the nearest codes, of soft ones the likeliest."""
        if isinstance(self.tokenizer, ConvVQTokenizer):
            return self.tokenizer.encode(images).view(1, -1)
        return self._codes(self.tokenizer.raw_latents(images))

    def _codes(self, raw: Tensor) -> Tensor:
        quantizer = self.tokenizer.quantizer
        assert isinstance(quantizer, (SoftQuantizer, HardQuantizer))
        return quantizer.codes(raw)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out error, and the codes in use."""
        if isinstance(self.tokenizer, ConvVQTokenizer):
            tokens = self.tokenizer.encode(batch["image"])
            decoded = self.tokenizer.decode(tokens)
            self.count(tokens.view(1, -1))
        else:
            raw = self.tokenizer.raw_latents(batch["image"])
            decoded = self.tokenizer.decode(self.tokenizer.quantizer(raw))
            if self.code_shape is not None:
                self.count(self._codes(raw))
        mse = F.mse_loss(decoded, batch["image"])
        self.report_validation(batch, {"mse": mse})

    def finish(self) -> None:
        """Also measure what generators normalise the latents by."""
        super().finish()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(self.tokenizer, SoftVQ) and isinstance(data, ImageDataModule):
            with self.finished():
                images = self.batches_of(data.train_source(), limit=_STATISTICS_IMAGES)
                latents = torch.cat([self.tokenizer.encode(batch).flatten() for batch in images])
            self.tokenizer.set_statistics(mean=float(latents.mean()), std=max(float(latents.std()), 1e-6))

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
