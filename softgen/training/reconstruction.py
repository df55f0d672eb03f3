"""What a decoded image is compared with its original by: pixels, a frozen network's features, a discriminator."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.categorical import UniformSource
from softgen.distributed import mean_over_ranks
from softgen.relaxation import widen
from softgen.training.adversarial import Adversarial, AdversarialCritic
from softgen.training.frozen_features import FrozenFeatures, open_features
from softgen.training.optimization import ParameterGroup
from softgen.training.perceptual import FeatureDistance, Perceptual, open_perceptual

MAX_WEIGHT = 1000.0
"""Largest automatic weight."""


@dataclass(frozen=True)
class ReconstructionTerms:
    """Weighted losses by name, whose sum is lowered, and numbers to log."""

    losses: Mapping[str, Tensor]
    logs: Mapping[str, Tensor]


class ReconstructionLosses(nn.Module):
    """w_mse |x - y|^2 + w_l1 |x - y| + perceptual + adversarial; means over pixels, images in [0, 1].

    SoftVQ-VAE's squared error is that of images in [-1, 1]: w_mse = 4 here.

    Args:
        image_size: Pixels a side.
        mse_weight: At least 0.
        l1_weight: At least 0.
        perceptual: None leaves it out.
        adversarial: None leaves it out.
        key: The config key above these arguments, for error messages.

    Raises:
        ValueError: If a setting is out of range or a network cannot be opened.
    """

    def __init__(
        self,
        *,
        image_size: int,
        mse_weight: float = 1.0,
        l1_weight: float = 0.0,
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
        key: str = "model",
    ) -> None:
        super().__init__()
        for name, value in (("mse_weight", mse_weight), ("l1_weight", l1_weight)):
            if not value >= 0:
                raise ValueError(f"{key}.{name}: expected a number of at least 0, got {value}")
        compared = mse_weight > 0 or l1_weight > 0 or perceptual is not None
        if not compared and adversarial is None:
            raise ValueError(
                f"{key}.mse_weight: expected more than 0 where l1_weight is 0 and there is neither perceptual nor "
                f"adversarial, got {mse_weight}"
            )
        if not compared and adversarial is not None and adversarial.weight == "auto":
            raise ValueError(
                f"{key}.adversarial.weight: expected a number, since auto balances against mse, l1 or perceptual, and "
                "none of them is on, got 'auto'"
            )
        self.mse_weight, self.l1_weight = mse_weight, l1_weight
        self.perceptual, self.adversarial = perceptual, adversarial
        # A plain dict: the stage holds these frozen, outside of parameters and checkpoints.
        self._frozen: dict[str, nn.Module] = {}
        if perceptual is not None:
            perceptual.check(key=f"{key}.perceptual")
            self._frozen["perceptual"] = open_perceptual(perceptual.network, key=f"{key}.perceptual.network")
        self.critic: AdversarialCritic | None = None
        if adversarial is not None:
            adversarial.check(key=f"{key}.adversarial")
            features = None
            if adversarial.features is not None:
                features = open_features(adversarial.features, key=f"{key}.adversarial.features").eval()
                self._frozen["judged_features"] = features
            self.critic = AdversarialCritic(adversarial, features=features, image_size=image_size)

    @property
    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """The networks that are looked through, for the stage to hold."""
        return dict(self._frozen)

    def shared_features(self, source: str | FrozenFeatures) -> FrozenFeatures | None:
        """The network that the perceptual loss opened from the same source, if it did."""
        network = self._frozen.get("perceptual")
        if not isinstance(network, FeatureDistance) or self.perceptual is None:
            return None
        return network.features if source is network.features or source == self.perceptual.network else None

    def check_precision(self, precision: str) -> None:
        """Refuse what a discriminator cannot be trained in: half precision, and a gradient scaler beside `auto`.

        Raises:
            ValueError: Naming the precision.
        """
        if self.adversarial is not None and precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"trainer.precision: expected 32-true or a mixed one for model.adversarial, got {precision}"
            )
        if self.adversarial is not None and self.adversarial.weight == "auto" and precision == "16-mixed":
            raise ValueError(
                "trainer.precision: expected 32-true or bf16-mixed for model.adversarial.weight auto, got 16-mixed"
            )

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """The discriminator's, held until its first step."""
        if self.critic is not None:
            config = self.critic.config
            yield ParameterGroup(
                "discriminator", list(self.critic.parameters()), config.optimizer, first_step=config.start_step
            )

    def hold(self, step: int) -> None:
        """Before an optimizer step: without gradients Adam leaves a discriminator that has not started as it is."""
        if self.critic is not None and step < self.critic.config.start_step:
            for parameter in self.critic.parameters():
                parameter.grad = None

    def forward(
        self,
        decoded: Tensor,
        images: Tensor,
        *,
        step: int,
        noise: UniformSource,
        known: Mapping[nn.Module, Sequence[Tensor]] | None = None,
    ) -> ReconstructionTerms:
        """The terms of a step.

        Args:
            decoded: (B, 3, H, W), not clamped.
            images: (B, 3, H, W) in [0, 1].
            step: Of the optimizer.
            noise: Of the augmentation, one stream a sample.
            known: Maps of the images that a frozen network has given already, by that network.
        """
        losses = {}
        if self.mse_weight:
            mse = F.mse_loss(decoded, images)
            losses["mse"] = mse if self.mse_weight == 1 else self.mse_weight * mse
        if self.l1_weight:
            losses["l1"] = self.l1_weight * F.l1_loss(decoded, images)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual.at(step) * self._distance(decoded, images, known or {})
        if self.critic is None:
            return ReconstructionTerms(losses, {})
        return self._with_adversary(losses, decoded, images, step=step, noise=noise)

    def _distance(self, decoded: Tensor, images: Tensor, known: Mapping[nn.Module, Sequence[Tensor]]) -> Tensor:
        network = self._frozen["perceptual"]
        if isinstance(network, FeatureDistance):
            distance: Tensor = network(decoded, images, known.get(network.features))
        else:
            distance = network(decoded, images)
        return distance

    def _with_adversary(
        self, losses: dict[str, Tensor], decoded: Tensor, images: Tensor, *, step: int, noise: UniformSource
    ) -> ReconstructionTerms:
        assert self.critic is not None
        config = self.critic.config
        if step < config.start_step:
            return ReconstructionTerms({**losses, "discriminator": self.critic.idle()}, {})
        terms = self.critic(decoded, images, noise, listen=step >= config.start_step + config.critic_only_steps)
        logs = dict(terms.logs)
        if terms.generator is not None and config.weight == "auto":
            losses, weight = _balanced(losses, terms.generator, decoded, ratio=config.weight_ratio)
            logs["adversarial_weight"] = weight
        elif terms.generator is not None:
            assert config.weight != "auto"
            losses = {**losses, "adversarial": config.weight * terms.generator}
        return ReconstructionTerms({**losses, "discriminator": terms.critic}, logs)


def _balanced(
    losses: Mapping[str, Tensor], generator: Tensor, decoded: Tensor, *, ratio: float
) -> tuple[dict[str, Tensor], Tensor]:
    """All terms with the adversarial one at its automatic weight, and that weight.

    The gradients are taken at the decoded images and handed on as they are: nothing is run backwards twice.
    """
    total = torch.stack([loss.float() for loss in losses.values()]).sum()
    (anchor,) = torch.autograd.grad(total, decoded)
    (gradient,) = torch.autograd.grad(generator, decoded)
    with torch.no_grad():
        norms = [mean_over_ranks(widen(value).square().sum()).sqrt() for value in (anchor, gradient)]
        tiny = torch.finfo(norms[1].dtype).tiny
        weight = torch.where(norms[1] > 0, (ratio * norms[0] / norms[1].clamp(min=tiny)).clamp(max=MAX_WEIGHT), 0.0)
        pull = anchor + weight * gradient
    values = {name: loss.detach() for name, loss in losses.items()}
    # Its value is that of the term; its gradient is that of all terms.
    carried = (decoded * pull).sum()
    values["adversarial"] = weight * generator.detach() + (carried - carried.detach())
    return values, weight
