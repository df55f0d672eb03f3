"""Multi-step samplers of masked diffusion models and of autoregressive ones, with injectable noise.

Shape legend: B batch, N sites, K codes, L token positions.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from softgen.categorical import Draw, UniformSource, sample_categorical
from softgen.guidance import check_guidance, guided_logits
from softgen.masking import Schedule, masked_fraction
from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.relaxation import gumbel_noise


class Sampler(Protocol):
    """What draws tokens from a masked diffusion model."""

    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Tokens (B, N) for the B conditions."""
        ...


def reveal_counts(schedule: Schedule, *, num_sites: int, steps: int, unit: str = "sites") -> list[int]:
    """How many sites, or other units, each step reveals; sums to `num_sites`, at least 1 each.

    Raises:
        ValueError: If there are more steps than sites, or fewer than one.
    """
    if not 1 <= steps <= num_sites:
        raise ValueError(f"steps: expected 1 to {num_sites} (the number of {unit}), got {steps}")
    progress = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    left = (masked_fraction(schedule, progress) * num_sites).round().long().tolist()
    counts, masked = [], num_sites
    for step, target in enumerate(left):
        steps_after = steps - step - 1
        target = max(steps_after, min(target, masked - 1)) if steps_after else 0
        counts.append(masked - target)
        masked = target
    return counts


@dataclass(frozen=True)
class MaskGITSampler:
    """The sampler of MaskGIT (arXiv 2202.04200): reveal the most confident sites first.

    Args:
        steps: Number of steps; each is one pass, or two in one batch with guidance.
        schedule: Sites left masked over time.
        temperature: Of the drawn codes.
        confidence_noise: Scale of the Gumbel noise on the log-probabilities that rank the sites; anneals to 0.
        guidance: Scale s of classifier-free guidance; 1 is off.
        guidance_schedule: `constant`, or `linear` from 1 at the first step to the scale at the last.
        draw: How codes are drawn, see `sample_categorical`.
    """

    steps: int = 8
    schedule: Schedule = "arccos"
    temperature: float = 1.0
    confidence_noise: float = 4.5
    guidance: float = 1.0
    guidance_schedule: Literal["constant", "linear"] = "constant"
    draw: Draw = "inverse_cdf"

    def __post_init__(self) -> None:
        if self.guidance_schedule not in ("constant", "linear"):
            raise ValueError(f"guidance_schedule: expected constant or linear, got {self.guidance_schedule!r}")
        if not 0 <= self.confidence_noise < math.inf:
            raise ValueError(f"confidence_noise: expected a finite number of at least 0, got {self.confidence_noise}")

    def plan(self, model: MaskedDiffusionModel) -> list[int]:
        """How many sites each step reveals.

        Raises:
            ValueError: The model cannot be guided, or has fewer sites than there are steps.
        """
        check_guidance(model, self.guidance)
        return reveal_counts(self.schedule, num_sites=model.num_sites, steps=self.steps)

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N) for the B conditions. Noise a step: the codes' draws, then N for the ranking."""
        counts = self.plan(model)
        tokens = _all_masked(model, condition)
        for step, count in enumerate(counts):
            masked = tokens == model.mask_id
            logits = guided_logits(model, model.embed(tokens), condition, scale=self._scale(step))
            drawn = sample_categorical(logits, noise, temperature=self.temperature, draw=self.draw)
            confidence = logits.float().log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            ranking_noise = self.confidence_noise * (1 - (step + 1) / self.steps)
            confidence = confidence + ranking_noise * gumbel_noise(noise.uniform(model.num_sites))
            confidence = confidence.masked_fill(~masked, -math.inf)
            chosen = confidence.topk(count, dim=-1).indices
            tokens = tokens.scatter(-1, chosen, drawn.gather(-1, chosen))
        return tokens

    def _scale(self, step: int) -> float:
        if self.guidance_schedule == "constant" or self.steps == 1:
            return self.guidance
        return 1 + (self.guidance - 1) * step / (self.steps - 1)


@dataclass(frozen=True)
class HaltonSampler:
    """Reveals positions in the order of a Halton sequence, spread over the image (arXiv 2503.17076).

    Args:
        steps: Number of steps.
        schedule: Sites left masked over time.
        temperature: Of the drawn codes.
        guidance: Scale s of classifier-free guidance; 1 is off.
        draw: How codes are drawn, see `sample_categorical`.
    """

    steps: int = 8
    schedule: Schedule = "arccos"
    temperature: float = 1.0
    guidance: float = 1.0
    draw: Draw = "inverse_cdf"

    def plan(self, model: MaskedDiffusionModel) -> list[int]:
        """How many positions each step reveals.

        Raises:
            ValueError: The model cannot be guided, has fewer positions than there are steps, or no square grid of them.
        """
        check_guidance(model, self.guidance)
        if math.isqrt(model.num_tokens) ** 2 != model.num_tokens:
            raise ValueError(f"HaltonSampler: expected a square grid of tokens, got {model.num_tokens} tokens")
        return reveal_counts(self.schedule, num_sites=model.num_tokens, steps=self.steps, unit="tokens")

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N) for the B conditions. All sites of a position are revealed together.

        Noise a step: the draws of the codes that it reveals.
        """
        counts, side = self.plan(model), math.isqrt(model.num_tokens)
        tokens = _all_masked(model, condition)
        sites = torch.arange(model.num_sites, device=tokens.device).view(model.num_tokens, -1)
        order = halton_order(side, side).to(tokens.device)
        first = 0
        for count in counts:
            chosen = sites[order[first : first + count]].flatten()
            logits = guided_logits(model, model.embed(tokens), condition, scale=self.guidance)[:, chosen]
            tokens[:, chosen] = sample_categorical(logits, noise, temperature=self.temperature, draw=self.draw)
            first += count
        return tokens


def halton_order(height: int, width: int) -> Tensor:
    """Row-major positions of a grid in the order in which a Halton sequence of bases 2 and 3 first visits them.

    Returns:
        A permutation of 0..height*width-1, int64.
    """
    seen: dict[int, None] = {}
    index = 1
    while len(seen) < height * width:
        row = _radical_inverse_cell(index, base=2, cells=height)
        column = _radical_inverse_cell(index, base=3, cells=width)
        seen.setdefault(row * width + column)
        index += 1
    return torch.tensor(list(seen))


def _radical_inverse_cell(index: int, *, base: int, cells: int) -> int:
    """Which of `cells` equal cells of [0, 1) the radical inverse falls in; exact, as floats are not in base 3."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator * cells // denominator


@dataclass(frozen=True)
class AutoregressiveSampler:
    """Draws site after site in raster order, with cached keys and values: a pass of one position a site.

    Args:
        temperature: Of the drawn codes; 0 takes the likeliest.
        guidance: Scale s of classifier-free guidance, u + s (c - u) on the logits; 1 is off.
    """

    temperature: float = 1.0
    guidance: float = 1.0

    @torch.no_grad()
    def __call__(self, model: AutoregressiveTransformer, condition: Condition, noise: UniformSource) -> Tensor:
        """Tokens (B, N).

        Raises:
            ValueError: If guidance is asked of a model without a null condition.
        """
        check_guidance(model, self.guidance)
        guided = self.guidance != 1
        asked = type(condition).cat([condition, condition.drop()]) if guided else condition
        caches = model.new_caches()
        drawn: list[Tensor] = []
        for _ in range(model.num_sites):
            previous = drawn[-1] if drawn else None
            if previous is not None and guided:
                previous = torch.cat([previous, previous])
            logits = model.next_logits(previous, asked, caches)
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = torch.lerp(unconditional, conditional, self.guidance)
            drawn.append(sample_categorical(logits, noise, temperature=self.temperature)[:, 0])
        return torch.stack(drawn, dim=1)


def _all_masked(model: MaskedDiffusionModel, condition: Condition) -> Tensor:
    shape = (len(condition), model.num_sites)
    return torch.full(shape, model.mask_id, dtype=torch.long, device=condition.dropped.device)
