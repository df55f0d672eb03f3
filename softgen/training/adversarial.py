"""A discriminator beside a tokenizer: hinge loss with DiffAugment, consistency and LeCAM.

Shape legend: B batch, M verdicts an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from softgen.categorical import UniformSource
from softgen.distributed import mean_over_ranks
from softgen.relaxation import widen
from softgen.training.augmentation import Augmentation, augment, augmentation_draws
from softgen.training.frozen_features import FrozenFeatures
from softgen.training.optimization import OptimizerConfig

AdversarialLoss = Literal["hinge", "non_saturating"]


@dataclass(frozen=True)
class Adversarial:
    """The adversarial loss of a tokenizer; the defaults are SoftVQ-VAE's, but for the steps.

    Two things of its published code are not settings here: it weighs the discriminator's own hinge by 0.2 beside
    consistency and LeCAM (here 1, as SFTok's), and brightens images in [-1, 1] by up to 0.5 either way (here images in
    [0, 1], as SFTok's: of their range twice as much).

    Attributes:
        weight: Of the tokenizer's term, at least 0; or `auto`: its gradient at the decoded images is held at
            `weight_ratio` times that of the other reconstruction losses (as VQGAN, arXiv 2012.09841, eq. 7, has it at
            the decoder's last layer).
        weight_ratio: For `auto`, above 0.
        start_step: Before this step there is no discriminator.
        critic_only_steps: Steps from there on in which the discriminator learns and is not listened to.
        features: Folder of a frozen network whose features are judged, see `open_features`; None judges pixels.
        channels: Width of the discriminator.
        loss: `hinge` or `non_saturating`.
        augment: What DiffAugment does to all that is judged: `translation`, `colour`, `cutout`.
        augment_probability: Of each kind, in [0, 1].
        cutout: Side of the square that is cut out, in [0, 1].
        consistency: Weight of the squared difference to the verdicts under stronger augmentation (always applied, a
            square of half the side with `cutout`; arXiv 2002.04724); at least 0, which it has to be without `augment`.
        lecam: Weight of LeCAM's regularisation (arXiv 2104.03310), at least 0.
        lecam_decay: Of its moving averages, in [0, 1).
        optimizer: Settings of the discriminator, which Adam trains alone.
    """

    weight: float | Literal["auto"] = 0.2
    weight_ratio: float = 1.0
    start_step: int = 0
    critic_only_steps: int = 0
    features: str | FrozenFeatures | None = None
    channels: int = 64
    loss: AdversarialLoss = "hinge"
    augment: Sequence[Augmentation] = ("translation", "colour", "cutout")
    augment_probability: float = 0.5
    cutout: float = 0.2
    consistency: float = 4.0
    lecam: float = 0.001
    lecam_decay: float = 0.999
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4, betas=(0.9, 0.95)))

    def check(self, *, key: str) -> None:
        """Refuse impossible settings.

        Raises:
            ValueError: Naming the key, what was expected and what was got.
        """
        if self.weight != "auto" and not self.weight >= 0:
            raise ValueError(f"{key}.weight: expected auto or a number of at least 0, got {self.weight}")
        if not self.weight_ratio > 0:
            raise ValueError(f"{key}.weight_ratio: expected a number above 0, got {self.weight_ratio}")
        for name in ("start_step", "critic_only_steps", "consistency", "lecam"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{key}.{name}: expected at least 0, got {getattr(self, name)}")
        if self.channels < 1:
            raise ValueError(f"{key}.channels: expected at least 1, got {self.channels}")
        if self.loss not in get_args(AdversarialLoss):
            raise ValueError(f"{key}.loss: expected one of {', '.join(get_args(AdversarialLoss))}, got {self.loss!r}")
        for kind in self.augment:
            if kind not in get_args(Augmentation):
                raise ValueError(f"{key}.augment: expected of {', '.join(get_args(Augmentation))}, got {kind!r}")
        for name in ("augment_probability", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{key}.{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.lecam_decay < 1:
            raise ValueError(f"{key}.lecam_decay: expected a number in [0, 1), got {self.lecam_decay}")
        if self.consistency and not self.augment:
            raise ValueError(f"{key}.consistency: expected 0 where nothing is augmented, got {self.consistency}")
        self.optimizer.check(key=f"{key}.optimizer")
        if self.optimizer.muon_lr is not None:
            raise ValueError(f"{key}.optimizer.muon_lr: expected none, got {self.optimizer.muon_lr}")


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of pixels (arXiv 1611.07004): three convolutions, two of stride 2, and a verdict.

    Args:
        channels: Of the first convolution; the others have twice and four times as many.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
            nn.GroupNorm(1, 2 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * channels, 4 * channels, 3, padding=1),
            nn.GroupNorm(1, 4 * channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * channels, 1, 3, padding=1),
        )

    def forward(self, seen: Sequence[Tensor]) -> Tensor:
        """Verdicts (B, M), float32: positive means real; of one map, the images (B, 3, H, W) in [0, 1]."""
        (images,) = seen
        return widen(self.body(2 * images - 1).flatten(1))


class FeatureDiscriminator(nn.Module):
    """Judges every position of a frozen network's maps, each layer by a head of its own (arXiv 2301.09515).

    Args:
        shapes: (C, h, w) of the maps.
        channels: Inner width of the heads.
    """

    def __init__(self, shapes: Sequence[torch.Size], *, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, shape[0]),
                nn.Conv2d(shape[0], channels, 1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(1, channels),
                nn.LeakyReLU(0.2),
                nn.Conv2d(channels, 1, 1),
            )
            for shape in shapes
        )

    def forward(self, seen: Sequence[Tensor]) -> Tensor:
        """Verdicts (B, M), float32: positive means real; of maps (B, C, h, w)."""
        return torch.cat([widen(head(layer).flatten(1)) for head, layer in zip(self.heads, seen, strict=True)], dim=1)


@dataclass(frozen=True)
class AdversarialTerms:
    """One step's terms.

    Attributes:
        generator: What the tokenizer is to lower, not yet weighted; scalar, None where it is not listened to.
        critic: What the discriminator is to lower; scalar.
        logs: Numbers to watch.
    """

    generator: Tensor | None
    critic: Tensor
    logs: Mapping[str, Tensor]


class AdversarialCritic(nn.Module):
    """The discriminator, LeCAM's averages, and what they make of real and decoded images.

    Args:
        config: Checked settings.
        features: The frozen network that `config.features` names; held elsewhere.
        image_size: Pixels a side.
    """

    lecam_real: Tensor
    lecam_fake: Tensor

    def __init__(self, config: Adversarial, *, features: FrozenFeatures | None, image_size: int) -> None:
        super().__init__()
        self.config = config
        # In a tuple: not registered, so out of checkpoints and of what is trained.
        self._features = (features,)
        self.discriminator: nn.Module = (
            PatchDiscriminator(channels=config.channels)
            if features is None
            else FeatureDiscriminator(features.shapes(image_size), channels=config.channels)
        )
        self.register_buffer("lecam_real", torch.zeros(()))
        self.register_buffer("lecam_fake", torch.zeros(()))

    def forward(self, decoded: Tensor, images: Tensor, noise: UniformSource, *, listen: bool) -> AdversarialTerms:
        """Judge both, under the same augmentation.

        Args:
            decoded: (B, 3, H, W), with gradient.
            images: (B, 3, H, W) in [0, 1].
            noise: One stream a sample.
            listen: Whether the tokenizer gets a term.
        """
        draws = augmentation_draws(noise)
        fake = self._seen(decoded if listen else decoded.detach(), draws)
        with torch.no_grad():
            real = self._seen(images, draws)
        generator = None
        if listen:
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            generator = self._generator_loss(functional_call(self.discriminator, frozen, (fake,)))
        on_real = self.discriminator(real)
        on_fake = self.discriminator([layer.detach() for layer in fake])
        critic = self._critic_loss(on_real, on_fake)
        if self.config.consistency:
            critic = critic + self.config.consistency * self._consistency(decoded, images, noise, on_real, on_fake)
        if self.config.lecam:
            critic = critic + self.config.lecam * self._lecam(on_real, on_fake)
        right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return AdversarialTerms(generator, critic, {"discriminator_accuracy": right.detach()})

    def idle(self) -> Tensor:
        """Zero, with a gradient of zero for every weight of the discriminator: DDP expects one at every step."""
        return torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum() * 0

    def _seen(self, images: Tensor, draws: Tensor, *, strong: bool = False) -> tuple[Tensor, ...]:
        changed = augment(
            images,
            draws,
            kinds=self.config.augment,
            probability=1.0 if strong else self.config.augment_probability,
            cutout=0.5 if strong else self.config.cutout,
        )
        (features,) = self._features
        return (changed,) if features is None else features(changed)

    def _generator_loss(self, on_fake: Tensor) -> Tensor:
        return -on_fake.mean() if self.config.loss == "hinge" else F.softplus(-on_fake).mean()

    def _critic_loss(self, on_real: Tensor, on_fake: Tensor) -> Tensor:
        if self.config.loss == "hinge":
            return (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()) / 2
        return (F.softplus(-on_real).mean() + F.softplus(on_fake).mean()) / 2

    def _consistency(
        self, decoded: Tensor, images: Tensor, noise: UniformSource, on_real: Tensor, on_fake: Tensor
    ) -> Tensor:
        with torch.no_grad():
            draws = augmentation_draws(noise)
            both = self._seen(torch.cat([images, decoded.detach()]), torch.cat([draws, draws]), strong=True)
        return F.mse_loss(self.discriminator(both), torch.cat([on_real, on_fake]))

    def _lecam(self, on_real: Tensor, on_fake: Tensor) -> Tensor:
        """Keep verdicts on one side from running away from the mean verdict on the other."""
        with torch.no_grad():
            step = 1 - self.config.lecam_decay
            self.lecam_real.lerp_(mean_over_ranks(on_real.mean()), step)
            self.lecam_fake.lerp_(mean_over_ranks(on_fake.mean()), step)
        real = F.relu(on_real - self.lecam_fake).square().mean()
        return real + F.relu(self.lecam_real - on_fake).square().mean()
