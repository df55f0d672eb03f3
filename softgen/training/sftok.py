"""SFTok's training (arXiv 2512.16910): warm-up, distribution alignment, fine-tuning."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.data.base import Batch, ImageDataModule
from softgen.data.token_cache import check_shows_images
from softgen.loading import load_tokenizer
from softgen.pretrained import Pretrained
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.optvq import straight_through
from softgen.tokenizers.sftok import SFTok
from softgen.tokenizers.sftok_decoder import MaskSchedule, SelfForced, check_self_forcing, proxy_loss, self_forced_input
from softgen.training.adversarial import Adversarial
from softgen.training.code_usage import CodeStage
from softgen.training.optimization import OptimizerConfig, ParameterGroup
from softgen.training.perceptual import Perceptual
from softgen.training.reconstruction import ReconstructionLosses
from softgen.training.stage import check_image_size

Phase = Literal["warm_up", "alignment", "fine_tuning"]


class SFTokTraining(CodeStage):
    """One of the three stages; each starts from the product of the one before.

    `warm_up`: every proxy masked; the decoder learns the teacher's proxies in one step. `alignment`: some proxies are
    shown, of which a share `replace_prob` is the model's own first prediction and the rest the teacher's; it learns the
    teacher's. `fine_tuning`: those shown are all the model's own, and decoder and pixel decoder learn the images, with
    the others frozen; the published one has all three of squared error, a perceptual and an adversarial loss.

    Args:
        tokenizer: An SFTok, or the folder or hub id of one.
        teacher: Folder or hub id of the tokenizer whose codes the proxies are, one a patch, or that tokenizer:
            MaskGIT's VQGAN, or a `ConvVQTokenizer`. Its weights stay as they are. Fine-tuning needs it where the
            tokenizer has no pixel decoder yet, to start from its.
        phase: The stage.
        from_scratch: Whether `alignment` may start from an untrained tokenizer, without the warm-up.
        optimizer: Settings of what is trained.
        replace_prob: Of `alignment`, in [0, 1]; 1 in the paper, 0 for its baseline, which shows the teacher's proxies.
        mask_schedule: See `self_forced_input`.
        mask_power: Of the schedule.
        min_ratio: Least share of proxies masked.
        max_ratio: Largest share.
        quantizer_weight: Of the quantiser's loss, at least 0.
        commitment_weight: Within it, at least 0.
        mse_weight: Of the squared error of `fine_tuning`, at least 0.
        l1_weight: Of its absolute error, at least 0.
        perceptual: Its perceptual loss; None for none.
        adversarial: Its discriminator; None for none.
        seed: Seed of all randomness in training.
    """

    def __init__(
        self,
        *,
        tokenizer: str | SFTok,
        teacher: str | ImageTokenizer | None = None,
        phase: Phase = "warm_up",
        from_scratch: bool = False,
        optimizer: OptimizerConfig = OptimizerConfig(  # noqa: B008 - frozen
            lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4
        ),
        replace_prob: float = 1.0,
        mask_schedule: MaskSchedule = "arccos",
        mask_power: float = 1.0,
        min_ratio: float = 0.0,
        max_ratio: float = 1.0,
        quantizer_weight: float = 1.0,
        commitment_weight: float = 0.25,
        mse_weight: float = 1.0,
        l1_weight: float = 0.0,
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, seed=seed)
        if phase not in get_args(Phase):
            raise ValueError(f"model.phase: expected one of {', '.join(get_args(Phase))}, got {phase!r}")
        check_self_forcing(
            replace_prob=replace_prob,
            schedule=mask_schedule,
            power=mask_power,
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            key="model.",
        )
        for name, value in (("quantizer_weight", quantizer_weight), ("commitment_weight", commitment_weight)):
            if not value >= 0:
                raise ValueError(f"model.{name}: expected a number of at least 0, got {value}")
        for name, term in (("perceptual", perceptual), ("adversarial", adversarial)):
            if term is not None and phase != "fine_tuning":
                raise ValueError(f"model.{name}: expected none before fine_tuning, got one for {phase}")
        opened = load_tokenizer(tokenizer, key="model.tokenizer") if isinstance(tokenizer, str) else tokenizer
        if not isinstance(opened, SFTok):
            raise ValueError(f"model.tokenizer: expected an SFTok, got a {type(opened).__name__}")
        if isinstance(teacher, str):
            teacher = load_tokenizer(teacher, key="model.teacher")
        _check_before(opened, phase, from_scratch=from_scratch)
        needs_pixels = phase == "fine_tuning" and opened.config["pixel_decoder"] is None
        if teacher is not None:
            opened.check_proxies(teacher, key="model.teacher")
            self.hold_frozen("teacher", teacher)
        elif phase != "fine_tuning" or needs_pixels:
            raise ValueError(f"model.teacher: expected the tokenizer of the proxy codes for {phase}, got none")
        if needs_pixels:
            assert teacher is not None
            opened = opened.with_pixels(teacher, key="model.teacher")
        self.tokenizer, self.phase = opened, phase
        self.reconstruction = ReconstructionLosses(
            image_size=opened.image_size,
            mse_weight=mse_weight,
            l1_weight=l1_weight,
            perceptual=perceptual,
            adversarial=adversarial,
        )
        for name, module in self.reconstruction.frozen_modules.items():
            self.hold_frozen(name, module)
        self.replace_prob, self.mask_schedule, self.mask_power = replace_prob, mask_schedule, mask_power
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self.quantizer_weight, self.commitment_weight = quantizer_weight, commitment_weight
        opened.requires_grad_(requires_grad=False)
        for parameter in self._trained():
            parameter.requires_grad = True

    def _trained(self) -> Iterator[nn.Parameter]:
        tokenizer = self.tokenizer
        parts: list[nn.Module] = [tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder]
        if self.phase == "fine_tuning":
            parts = [tokenizer.decoder, tokenizer.pixel_quantize, tokenizer.pixel_decoder]
        else:
            yield tokenizer.latent_tokens
        for part in parts:
            yield from part.parameters()

    @property
    def teacher(self) -> ImageTokenizer | None:
        """The frozen tokenizer of the proxy codes."""
        teacher = self.frozen("teacher")
        assert teacher is None or isinstance(teacher, ImageTokenizer)
        return teacher

    @property
    def product(self) -> Pretrained:
        """The tokenizer."""
        return self.tokenizer

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """`product`, and in fine-tuning the `discriminator` where there is one."""
        yield from super().parameter_groups()
        yield from self.reconstruction.parameter_groups()

    def setup(self, stage: str) -> None:
        """As every stage; and refuse a precision in which the automatic weight cannot be had."""
        super().setup(stage)
        self.reconstruction.check_precision(str(self.trainer.precision))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A discriminator that has not started stays as it is."""
        self.reconstruction.hold(self.global_step)

    @property
    def code_shape(self) -> tuple[int, int]:
        """See the base class."""
        return 1, self.tokenizer.num_codes

    def codes_of(self, images: Tensor) -> Tensor:
        """See the base class."""
        return self._tokens(images).view(1, -1)

    def check_data(self, data: ImageDataModule) -> None:
        """Images must have the tokenizer's size."""
        check_shows_images(data)
        check_image_size(data, self.tokenizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Quantise, build the decoder's input, predict proxies or pixels."""
        images, tokenizer = batch["image"], self.tokenizer
        if self.phase == "fine_tuning":
            with torch.no_grad():
                latents = tokenizer.latents(images)
                tokens = tokenizer.assign(latents, transport=tokenizer.assignment == "published")
                codes = tokenizer.codebook[tokens]
            given = self._input(batch, codes, truth=None)
            pixels = tokenizer.pixels(tokenizer.decoder.proxy_logits(given.tokens, codes))
            terms = self.reconstruction(pixels, images, step=self.global_step, noise=self.noise(batch, "discriminator"))
            return self.report(batch, terms.losses, terms.logs)
        truth = self._truth(images)
        latents = tokenizer.latents(images)
        codes = tokenizer.codebook[tokenizer.assign(latents.detach(), transport=True)]
        assigned = straight_through(latents, codes, commitment=self.commitment_weight)
        if self.phase == "warm_up":
            logits = tokenizer.decoder.proxy_logits(self._all_masked(truth), assigned.embeddings)
            losses = {"proxies": proxy_loss(logits, truth)}
        else:
            given = self._input(batch, assigned.embeddings.detach(), truth=truth)
            logits = tokenizer.decoder.proxy_logits(given.tokens, assigned.embeddings)
            losses = {"proxies": proxy_loss(logits, truth, given.masked)}
        losses["quantizer"] = self.quantizer_weight * assigned.loss
        return self.report(batch, losses, {"accuracy": (logits.argmax(dim=-1) == truth).float().mean()})

    def _input(self, batch: Batch, codes: Tensor, *, truth: Tensor | None) -> SelfForced:
        decoder = self.tokenizer.decoder
        hidden = torch.full((len(codes), decoder.num_proxies), decoder.mask_id, device=codes.device)
        with torch.no_grad():
            guided = decoder.proxy_logits(hidden, codes).argmax(dim=-1)
        # Older versions of torch would hand the pass with gradients the casts of this one, which have none.
        torch.clear_autocast_cache()
        return self_forced_input(
            guided,
            self.noise(batch, "proxies"),
            mask_id=decoder.mask_id,
            truth=truth,
            replace_prob=self.replace_prob,
            schedule=self.mask_schedule,
            power=self.mask_power,
            min_ratio=self.min_ratio,
            max_ratio=self.max_ratio,
        )

    def _all_masked(self, truth: Tensor) -> Tensor:
        return torch.full_like(truth, self.tokenizer.decoder.mask_id)

    @torch.no_grad()
    def _truth(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        return self.teacher.encode(images)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out error of the reconstructions, and how many proxies are the teacher's after one step and after all.

        Codes are the nearest, or by transport over the batch where the tokenizer was built with `eval: published`.
        """
        images, tokenizer = batch["image"], self.tokenizer
        tokens = self._tokens(images)
        self.count(tokens.view(1, -1))
        codes = tokenizer.codebook[tokens]
        values = {"mse": F.mse_loss(self._decode(codes), images)}
        if self.teacher is not None:
            truth = self._truth(images)
            for name, steps in (("first", 1), ("last", tokenizer.steps)):
                refined = tokenizer.refine(codes, steps=steps).tokens
                values[f"{name}_step_accuracy"] = (refined == truth).float().mean()
        self.report_validation(batch, values)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Images and, below each row, their reconstructions."""
        images = batch["image"][:16]
        return torch.cat([images, self._decode(self._codes(images))])

    def _tokens(self, images: Tensor) -> Tensor:
        """Codes (B, L)."""
        tokenizer = self.tokenizer
        return tokenizer.assign(tokenizer.latents(images), transport=tokenizer.assignment == "published")

    def _codes(self, images: Tensor) -> Tensor:
        return self.tokenizer.codebook[self._tokens(images)]

    def _decode(self, codes: Tensor) -> Tensor:
        """Images by the pixel decoder; before there is one, by the teacher from the proxies."""
        if self.tokenizer.config["pixel_decoder"] is not None:
            return self.tokenizer.decode_embeddings(codes)
        assert self.teacher is not None
        return self.teacher.decode(self.tokenizer.refine(codes).tokens)


def _check_before(tokenizer: SFTok, phase: Phase, *, from_scratch: bool) -> None:
    """Raise ValueError for a stage without the one before it."""
    before: Mapping[Phase, Phase] = {"alignment": "warm_up", "fine_tuning": "alignment"}
    if phase not in before or not tokenizer.untrained or (phase == "alignment" and from_scratch):
        return
    hint = " (from_scratch: true takes it)" if phase == "alignment" else ""
    raise ValueError(
        f"model.tokenizer: expected the product of {before[phase]} for {phase}, got an untrained SFTok{hint}"
    )
