"""The sampler that MaskGIT's PyTorch checkpoints (arXiv 2310.14400) were measured with.

Shape legend: B batch, N sites, S steps.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softgen.categorical import UniformSource, invert_cdf
from softgen.guidance import check_guidance
from softgen.masking import Schedule, masked_fraction
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Condition
from softgen.models.maskgit import MaskGIT
from softgen.relaxation import gumbel_noise


def published_reveal_counts(schedule: Schedule, *, num_sites: int, steps: int) -> list[int]:
    """Tokens that each step reveals: the schedule read as the share of a step, not as what is still masked.

    Raises:
        ValueError: If there are fewer than two steps or more than sites.
    """
    if not 2 <= steps <= num_sites:
        raise ValueError(f"steps: expected 2 to {num_sites} (the number of sites), got {steps}")
    share = masked_fraction(schedule, torch.linspace(1, 0, steps))
    counts = (share / share.sum() * num_sites).round().clamp(min=1).long().tolist()
    counts[-1] += num_sites - sum(counts)
    while counts[-1] < 1:  # many steps, each with one at least: the largest give some back
        counts[counts.index(max(counts))] -= 1
        counts[-1] += 1
    return [int(count) for count in counts]


@dataclass(frozen=True)
class PublishedMaskGITSampler:
    """Guidance that grows, and a temperature that multiplies.

    Published settings: 8 steps, guidance 3, confidence noise 4.5 at 256 pixels; 15 steps, 2.8 and 7 at 512.

    Args:
        steps: S, at least 2; each is two passes in one batch.
        schedule: Its values over the steps are the shares of tokens that each reveals.
        guidance: w, at least 0: step i uses (1 + w_i) c - w_i u with w_i = w i / (S - 1).
        temperature: Multiplies the logits, as the published option does.
        confidence_noise: Scale of the Gumbel noise on the log-probabilities that rank the tokens; anneals to 0.
        greedy: Take the likeliest code instead of drawing.
    """

    steps: int = 8
    schedule: Schedule = "arccos"
    guidance: float = 3.0
    temperature: float = 1.0
    confidence_noise: float = 4.5
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps: expected at least 2, got {self.steps}")
        masked_fraction(self.schedule, torch.zeros(()))  # refuses a schedule that is unknown
        for name in ("guidance", "temperature", "confidence_noise"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")

    @torch.no_grad()
    def __call__(self, model: MaskedDiffusionModel, condition: Condition, noise: UniformSource) -> Tensor:
        """Sample tokens (B, N). Noise a step: N for the codes unless greedy, then N for the ranking.

        Raises:
            ValueError: If the model is of another family.
        """
        if not isinstance(model, MaskGIT):
            raise ValueError(f"sampler: expected a MaskGIT model, got {type(model).__name__}")
        check_guidance(model, self.guidance)
        counts = published_reveal_counts(self.schedule, num_sites=model.num_sites, steps=self.steps)
        shape, device = (len(condition), model.num_sites), condition.dropped.device
        tokens = torch.full(shape, model.mask_id, device=device)
        masked = torch.ones(shape, dtype=torch.bool, device=device)
        both = type(condition).cat([condition, condition.drop()])
        for step, count in enumerate(counts):
            progress = step / (self.steps - 1)
            embeddings = model.embed(tokens)
            conditional, unconditional = model.published_logits(torch.cat([embeddings] * 2), both).chunk(2)
            logits = torch.lerp(unconditional, conditional, 1 + self.guidance * progress).float()
            log_probs = (logits * self.temperature).log_softmax(dim=-1)
            if self.greedy:
                drawn = log_probs.argmax(dim=-1)
            else:
                drawn = invert_cdf(log_probs.exp(), noise.uniform(model.num_sites))
            confidence = log_probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            ranking = gumbel_noise(noise.uniform(model.num_sites))
            confidence = confidence + self.confidence_noise * (1 - progress) * ranking
            chosen = confidence.masked_fill(~masked, -math.inf).topk(count, dim=-1).indices
            tokens = tokens.scatter(-1, chosen, drawn.gather(-1, chosen))
            masked = masked.scatter(-1, chosen, value=False)
        return tokens.clamp(max=model.num_codes - 1)
