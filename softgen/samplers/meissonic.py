"""The sampler that Meissonic (arXiv 2410.08261) was published with, which is aMUSEd's.

Shape legend: B batch, N sites, S steps.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softgen.categorical import UniformSource, invert_cdf
from softgen.guidance import check_guidance
from softgen.masking import masked_fraction
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.models.meissonic import Meissonic
from softgen.relaxation import gumbel_noise, probabilities


@dataclass(frozen=True)
class MeissonicSampler:
    """Draws every masked token at each step, and masks the least certain again.

    Published settings: 64 steps at 1024 pixels, 48 at 512, guidance 9, confidence noise from 2 to 0.

    Args:
        steps: S; the model is told how many are left.
        schedule: Tokens left masked over time, at least one until the last step: `cosine` or `linear`.
        guidance: s of u + s (c - u), at least 0; 1 is off.
        confidence_noise: Scale of the Gumbel noise on the log-probabilities that rank the tokens, at the first and the
            last step and linear between; the published `temperature`, of which a lone number T stands for T to 0.01.
        greedy: Take the likeliest code instead of drawing.
    """

    steps: int = 64
    schedule: Literal["cosine", "linear"] = "cosine"
    guidance: float = 9.0
    confidence_noise: tuple[float, float] = (2.0, 0.0)
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule: expected cosine or linear, got {self.schedule!r}")
        if len(self.confidence_noise) != 2 or not all(0 <= scale < math.inf for scale in self.confidence_noise):
            raise ValueError(f"confidence_noise: expected two numbers of at least 0, got {self.confidence_noise}")

    def confidence_scales(self) -> Tensor:
        """Scale of the noise at each step, (S,)."""
        return torch.linspace(*self.confidence_noise, self.steps)

    def masked_after(self, step: int, left: int, *, num_sites: int) -> int:
        """Tokens masked after a step, from 0, that found `left` of them masked."""
        if step == self.steps - 1:
            return 0
        share = masked_fraction(self.schedule, torch.tensor(step + 1) / self.steps)
        return max(1, min(left - 1, int(num_sites * share)))

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N).

        Noise a step: N for the codes unless greedy, then N for the ranking but for the last step.

        Raises:
            ValueError: If the model is of another family, or has no null condition for the guidance.
        """
        if not isinstance(model, Meissonic):
            raise ValueError(f"sampler: expected a Meissonic model, got {type(model).__name__}")
        check_guidance(model, self.guidance)
        tokens = torch.full((len(condition), model.num_sites), model.mask_id, device=condition.dropped.device)
        left, scales = model.num_sites, self.confidence_scales().tolist()
        for step in range(self.steps):
            masked = tokens == model.mask_id
            probs = probabilities(self._guided(model, tokens, condition, timestep=float(self.steps - 1 - step)))
            drawn = probs.argmax(dim=-1) if self.greedy else invert_cdf(probs, noise.uniform(model.num_sites))
            tokens = torch.where(masked, drawn, tokens)
            # One masked token stays masked, as published, until the last step.
            left = self.masked_after(step, left, num_sites=model.num_sites)
            if left == 0:
                break
            confidence = probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).log()
            confidence = confidence + scales[step] * gumbel_noise(noise.uniform(model.num_sites))
            confidence = confidence.masked_fill(~masked, math.inf)
            least = confidence.topk(left, dim=-1, largest=False).indices
            tokens = tokens.scatter(-1, least, model.mask_id)
        return tokens

    def _guided(self, model: Meissonic, tokens: Tensor, condition: Condition, *, timestep: float) -> Tensor:
        embeddings = model.embed(tokens)
        if self.guidance == 1:
            return model.predict(embeddings, condition, timestep=timestep).logits
        both = type(condition).cat([condition, condition.drop()])
        conditional, unconditional = model.predict(torch.cat([embeddings] * 2), both, timestep=timestep).logits.chunk(2)
        return torch.lerp(unconditional, conditional, self.guidance)
