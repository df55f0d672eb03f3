"""The sampler of TiTok's generators (arXiv 2406.07550); MaskGen's and SFTok's decoder share its skeleton.

Shape legend: B batch, N sites, K codes, S steps.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from softgen.categorical import UniformSource
from softgen.guidance import check_guidance
from softgen.masking import mask_least_confident
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.relaxation import gumbel_noise

GuidanceDecay = Literal["constant", "linear", "power-cosine"]


@dataclass(frozen=True)
class TiTokSampler:
    """Draws all masked sites, then masks the least confident ones again.

    Published settings: L-32 noise 9.5, guidance 4.5, linear, 8 steps; B-64 noise 11, guidance 3, linear, 8 steps; S-128
    noise 2.8, guidance 6.9, power-cosine with power 3, 64 steps; SFTok's generator noise 1, guidance 4.5, constant, 8
    steps; all with annealing.

    Args:
        steps: S.
        guidance: g, at least 0.
        guidance_decay: c + g (c - u) at every step for `constant`; c + (g s / S)(c - u) at step s for `linear`;
            u + w (c - u) with w = 1 + (g - 1)(1 - cos(pi (s / S)^power)) / 2 for `power-cosine`.
        guidance_power: Of `power-cosine`.
        randomize_temperature: T: Gumbel noise on codes and on confidence is scaled by T (1 - r), r = (s + 1) / S.
        anneal: Divide the logits by 0.5 + 0.8 (1 - r).
    """

    steps: int = 8
    guidance: float = 4.5
    guidance_decay: GuidanceDecay = "linear"
    guidance_power: float = 3.0
    randomize_temperature: float = 9.5
    anneal: bool = True

    def __post_init__(self) -> None:
        if self.guidance_decay not in get_args(GuidanceDecay):
            raise ValueError(
                f"guidance_decay: expected one of {', '.join(get_args(GuidanceDecay))}, got {self.guidance_decay!r}"
            )
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        for name in ("guidance", "guidance_power", "randomize_temperature"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N). Noise a step: (N, K) for the codes, then N for the confidence.

        A step with no noise to scale, the last one, draws it all the same.
        """
        # 1 is off where the scale is that of u + s (c - u), 0 where it is added to 1.
        check_guidance(model, self.guidance + (0 if self.guidance_decay == "power-cosine" else 1))
        tokens = torch.full((len(condition), model.num_sites), model.mask_id, device=condition.dropped.device)
        for step in range(self.steps):
            progress = (step + 1) / self.steps
            temperature = self.randomize_temperature * (1 - progress)
            masked = tokens == model.mask_id
            logits = self._guided(model, model.embed(tokens), condition, step)
            if self.anneal:
                logits = logits / (0.5 + 0.8 * (1 - progress))
            gumbel = gumbel_noise(noise.uniform(model.num_sites, model.num_codes))
            drawn = (logits + temperature * gumbel).argmax(dim=-1)
            score = logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            drawn = torch.where(masked, drawn, tokens)
            ranking = temperature * gumbel_noise(noise.uniform(model.num_sites))
            confidence = score.masked_fill(~masked, math.inf) + ranking
            if step == self.steps - 1:
                return drawn
            kept = math.floor(model.num_sites * math.acos(progress) / (math.pi / 2))
            tokens = mask_least_confident(drawn, confidence, masked, kept=kept, mask_id=model.mask_id)
        raise AssertionError

    def _guided(self, model: MaskedDiffusionModel, embeddings: Tensor, condition: Condition, step: int) -> Tensor:
        """Logits u + s (c - u), float32, with this family's s."""
        share = step / self.steps
        if self.guidance_decay == "power-cosine":
            scale = 1 + (self.guidance - 1) * (1 - math.cos(math.pi * share**self.guidance_power)) / 2
        else:
            scale = 1 + self.guidance * (share if self.guidance_decay == "linear" else 1)
        if scale == 1:
            conditional: Tensor = model(embeddings, condition)
            return conditional.float()
        both = type(condition).cat([condition, condition.drop()])
        conditional, unconditional = model(torch.cat([embeddings, embeddings]), both).chunk(2)
        return torch.lerp(unconditional, conditional, scale).float()
