"""MaskBit's published sampler (arXiv 2409.16211).

Shape legend: B batch, N sites, C codes.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softgen.categorical import UniformSource, sample_categorical
from softgen.guidance import guided_logits
from softgen.masking import Schedule, masked_fraction
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.relaxation import gumbel_noise

GuidanceSchedule = Literal["cosine", "linear", "none"]
_LEAST_RATIO = 1e-6

# Bits, steps: guidance, power of its schedule, confidence noise.
_PUBLISHED = {
    (10, 64): (6.4, 2.5, 10.5),
    (12, 64): (7.1, 3.0, 8.2),
    (14, 64): (7.1, 3.0, 7.8),
    (14, 128): (7.1, 3.0, 9.0),
    (14, 256): (5.8, 3.0, 10.3),
    (16, 64): (6.5, 2.5, 7.5),
    (18, 64): (5.7, 2.5, 8.5),
}


@dataclass(frozen=True)
class MaskBitSampler:
    """Draws every masked site at each step, and masks the least certain again, over tokens and groups alike.

    Guidance is c + s_i (c - u), so that 0 is off, unlike s of the other samplers, which is 1 + s here.

    Args:
        steps: S; with more steps than sites the last of them have nothing left to do and are left out.
        schedule: Sites left masked over time; at least one while steps are left and more than one is masked.
        guidance: s, at least 0.
        guidance_schedule: `cosine`: s_i = s (1 - cos(pi (i / S)^power)) / 2. `linear`: s i / S. `none`: s.
        guidance_power: Of `cosine`, above 0; the published `scale_pow`.
        temperature: Divides the logits, above 0.
        anneal_temperature: Take 0.5 + 0.8 (1 - q) after a share q of the steps, whatever `temperature`.
        confidence_noise: Scale of the Gumbel noise on the log-probabilities that rank the sites, which falls as 1 - q;
            the published `randomize_temperature`.
        greedy: Take the likeliest code instead of drawing.

    Raises:
        ValueError: If a setting is out of range.
    """

    steps: int = 64
    schedule: Schedule = "arccos"
    guidance: float = 7.1
    guidance_schedule: GuidanceSchedule = "cosine"
    guidance_power: float = 3.0
    temperature: float = 1.0
    anneal_temperature: bool = False
    confidence_noise: float = 7.8
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if self.guidance_schedule not in get_args(GuidanceSchedule):
            raise ValueError(
                f"guidance_schedule: expected {', '.join(get_args(GuidanceSchedule))}, got {self.guidance_schedule!r}"
            )
        for name in ("guidance_power", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        for name in ("guidance", "confidence_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        masked_fraction(self.schedule, torch.zeros(1))

    @classmethod
    def published(cls, bits: int, *, steps: int = 64) -> "MaskBitSampler":
        """The settings that a published checkpoint was measured with; Frechet distances to ImageNet at 256 pixels.

        | bits | steps | guidance | power | confidence noise | distance |
        |---|---|---|---|---|---|
        | 10 | 64 | 6.4 | 2.5 | 10.5 | 1.68 |
        | 12 | 64 | 7.1 | 3.0 | 8.2 | 1.65 |
        | 14 | 64 | 7.1 | 3.0 | 7.8 | 1.62 |
        | 14 | 128 | 7.1 | 3.0 | 9.0 | 1.56 |
        | 14 | 256 | 5.8 | 3.0 | 10.3 | 1.52 |
        | 16 | 64 | 6.5 | 2.5 | 7.5 | 1.64 |
        | 18 | 64 | 5.7 | 2.5 | 8.5 | 1.67 |

        Raises:
            ValueError: If none were published for those bits and steps.
        """
        if (bits, steps) not in _PUBLISHED:
            known = ", ".join(f"{bits} bits in {steps}" for bits, steps in _PUBLISHED)
            raise ValueError(f"bits and steps: expected one of {known} steps, got {bits} bits in {steps}")
        guidance, power, noise = _PUBLISHED[bits, steps]
        return cls(steps=steps, guidance=guidance, guidance_power=power, confidence_noise=noise)

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N) for the B conditions.

        Noise a step: N for the codes unless greedy, then N for the ranking but for the last step.

        Raises:
            ValueError: If guidance is asked of a model without a null condition.
        """
        if self.guidance and not model.has_null_condition:
            raise ValueError(f"guidance: expected 0, since this model has no null condition, got {self.guidance}")
        shape, device = (len(condition), model.num_sites), condition.dropped.device
        tokens = torch.full(shape, model.mask_id, device=device)
        left = model.num_sites
        for step in range(self.steps):
            masked = tokens == model.mask_id
            logits = guided_logits(model, model.embed(tokens), condition, scale=1 + self._guidance(step)).float()
            logits = logits / self._temperature(step)
            drawn = sample_categorical(logits, noise, temperature=0 if self.greedy else 1)
            tokens = torch.where(masked, drawn, tokens)
            left = self._masked_after(step, left, num_sites=model.num_sites)
            if left == 0:
                break
            confidence = logits.log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            scale = self.confidence_noise * (1 - (step + 1) / self.steps)
            confidence = confidence + scale * gumbel_noise(noise.uniform(model.num_sites))
            confidence = confidence.masked_fill(~masked, math.inf)
            least = confidence.topk(left, dim=-1, largest=False).indices
            tokens = tokens.scatter(-1, least, model.mask_id)
        return tokens

    def _guidance(self, step: int) -> float:
        progress = step / self.steps
        if self.guidance_schedule == "cosine":
            return self.guidance * 0.5 * (1 - math.cos(math.pi * progress**self.guidance_power))
        return self.guidance * progress if self.guidance_schedule == "linear" else self.guidance

    def _temperature(self, step: int) -> float:
        return 0.5 + 0.8 * (1 - (step + 1) / self.steps) if self.anneal_temperature else self.temperature

    def _masked_after(self, step: int, left: int, *, num_sites: int) -> int:
        """Sites masked after a step that found `left` of them masked."""
        if step == self.steps - 1:
            return 0
        ratio = remasked_share(self.schedule, torch.tensor((step + 1) / self.steps))
        # The published code would mask everything again where one site is left.
        return min(max(1, int(ratio * num_sites)), left - 1)


def remasked_share(schedule: Schedule, progress: Tensor) -> Tensor:
    """Share of sites that are masked after a share `progress` of the steps, at least 1e-6 as published; any shape."""
    return masked_fraction(schedule, progress).clamp(_LEAST_RATIO, 1)
