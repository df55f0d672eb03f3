"""MaskGen's published sampler (arXiv 2501.07730), which has the skeleton of TiTok's.

Shape legend: B batch, N sites, K codes, S steps.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softgen.categorical import UniformSource
from softgen.masking import Schedule, mask_least_confident, masked_fraction
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.models.maskgen import MaskGen
from softgen.relaxation import gumbel_noise

GuidanceDecay = Literal["cosine", "flippedcosine", "linear", "none"]


@dataclass(frozen=True)
class MaskGenSampler:
    """Draws all masked tokens, then masks the least confident ones again. The defaults are the published settings.

    Args:
        steps: S.
        schedule: Tokens left masked over time.
        guidance: g, at least 0. Logits are c + w (c - u), with w after a share r = (s + 1) / S of the steps by:
        guidance_decay: `none`: g. `linear`: 1 + (g - 1) r. `cosine`: 1 + (g - 1)(1 - cos(pi r^power)) / 2.
            `flippedcosine`: 1 + (g - 1) cos(pi r^power) / 2.
        guidance_power: Of the cosines, above 0.
        randomize_temperature: T: Gumbel noise on codes and on confidence is scaled by T (1 - r).
        anneal: Divide the logits by 0.5 + 0.8 (1 - r).
        prob_sorting: Whether the confidence gets noise.
        aesthetic_score: That the model is told; by default its own. 6.5 in the published samples.
    """

    steps: int = 16
    schedule: Schedule = "arccos"
    guidance: float = 12.0
    guidance_decay: GuidanceDecay = "cosine"
    guidance_power: float = 1.0
    randomize_temperature: float = 2.0
    anneal: bool = True
    prob_sorting: bool = True
    aesthetic_score: float | None = 6.5

    def __post_init__(self) -> None:
        if self.guidance_decay not in get_args(GuidanceDecay):
            raise ValueError(
                f"guidance_decay: expected one of {', '.join(get_args(GuidanceDecay))}, got {self.guidance_decay!r}"
            )
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        masked_fraction(self.schedule, torch.zeros(()))  # refuses a schedule that is unknown
        if not 0 < self.guidance_power < math.inf:
            raise ValueError(f"guidance_power: expected a finite number above 0, got {self.guidance_power}")
        for name in ("guidance", "randomize_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")

    def weight(self, progress: float) -> float:
        """The weight w after a share r of the steps."""
        if self.guidance_decay == "none":
            return self.guidance
        if self.guidance_decay == "linear":
            return 1 + (self.guidance - 1) * progress
        wave = math.cos(math.pi * progress**self.guidance_power)
        return 1 + (self.guidance - 1) * ((1 - wave) if self.guidance_decay == "cosine" else wave) / 2

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N). Noise a step: (N, K) for the codes, then with `prob_sorting` N for the confidence.

        A step with no noise to scale, the last one, draws it all the same.

        Raises:
            ValueError: If the model is of another family, or has no null condition for the guidance.
        """
        if not isinstance(model, MaskGen):
            raise ValueError(f"sampler: expected a MaskGen model, got {type(model).__name__}")
        if not model.has_null_condition and any(self.weight((step + 1) / self.steps) for step in range(self.steps)):
            raise ValueError(
                "guidance: expected 0 with the decay none, since this model has no null condition, got "
                f"{self.guidance} with {self.guidance_decay}"
            )
        tokens = torch.full((len(condition), model.num_sites), model.mask_id, device=condition.dropped.device)
        for step in range(self.steps):
            progress = (step + 1) / self.steps
            temperature = self.randomize_temperature * (1 - progress)
            masked = tokens == model.mask_id
            logits = self._guided(model, tokens, condition, weight=self.weight(progress))
            if self.anneal:
                logits = logits / (0.5 + 0.8 * (1 - progress))
            gumbel = gumbel_noise(noise.uniform(model.num_sites, model.num_codes))
            drawn = (logits + temperature * gumbel).argmax(dim=-1)
            confidence = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).masked_fill(~masked, math.inf)
            drawn = torch.where(masked, drawn, tokens)
            if self.prob_sorting:
                confidence = confidence + temperature * gumbel_noise(noise.uniform(model.num_sites))
            if step == self.steps - 1:
                return drawn
            share = masked_fraction(self.schedule, torch.tensor(progress, dtype=torch.float64))
            kept = math.floor(model.num_sites * share)
            tokens = mask_least_confident(drawn, confidence, masked, kept=kept, mask_id=model.mask_id)
        raise AssertionError

    def _guided(self, model: MaskGen, tokens: Tensor, condition: Condition, *, weight: float) -> Tensor:
        """Logits c + w (c - u), float32."""
        embeddings, score = model.embed(tokens), self.aesthetic_score
        if weight == 0:
            return model.predict(embeddings, condition, aesthetic_score=score).logits.float()
        both = type(condition).cat([condition, condition.drop()])
        logits = model.predict(torch.cat([embeddings] * 2), both, aesthetic_score=score).logits
        conditional, unconditional = logits.float().chunk(2)
        return torch.lerp(unconditional, conditional, 1 + weight)
