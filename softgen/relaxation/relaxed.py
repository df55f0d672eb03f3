"""The ways to make sampled codes differentiable, as one choice: soft, straight-through, truncated, annealed."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.relaxation.expectation import probabilities
from softgen.relaxation.gumbel import gumbel_softmax_st

Kind = Literal["soft", "gumbel_st", "st", "soft_topk", "annealed"]


@dataclass(frozen=True)
class Relaxation:
    """How logits become the probabilities that an expected embedding is taken under.

    Attributes:
        kind: `soft`: softmax, the paper's choice. `gumbel_st`: a Gumbel sample forward, the relaxed sample's gradient.
            `st`: the sampled tokens forward, the gradient of the expectation. `soft_topk`: softmax over the likeliest
            codes. `annealed`: softmax whose temperature falls, so that it ends nearly one-hot.
        temperature: Divides the logits, above 0; of `annealed` the temperature at the first step.
        final_temperature: Of `annealed` at its last step, above 0.
        anneal_steps: Steps that the fall takes, at least 1.
        top_k: Codes that `soft_topk` keeps, at least 2: the share of a single one is always 1, and has no gradient.
    """

    kind: str = "soft"
    temperature: float = 1.0
    final_temperature: float = 0.3
    anneal_steps: int = 1000
    top_k: int = 8

    def check(self, *, key: str) -> None:
        """Refuse impossible settings.

        Raises:
            ValueError: Naming the key, what was expected and what was got.
        """
        kinds: tuple[str, ...] = get_args(Kind)
        if self.kind not in kinds:
            raise ValueError(
                f"{key}.kind: expected one of {', '.join(kinds)} (hard tokens have no gradient), got {self.kind!r}"
            )
        for name in ("temperature", "final_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{key}.{name}: expected a number above 0, got {getattr(self, name)}")
        for name, least in (("anneal_steps", 1), ("top_k", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{key}.{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def needs_noise(self) -> bool:
        """Whether `relax` draws a Gumbel sample."""
        return self.kind == "gumbel_st"

    def relax(self, logits: Tensor, *, tokens: Tensor, uniform: Tensor | None = None, step: int = 0) -> Tensor:
        """Probabilities (..., K), differentiable in the logits.

        Args:
            logits: (..., K).
            tokens: Codes sampled from them, (...), for `st`.
            uniform: Uniform draws of the logits' shape, for `gumbel_st`.
            step: Optimizer steps done, for `annealed`.
        """
        if self.kind == "gumbel_st":
            assert uniform is not None
            return gumbel_softmax_st(logits, uniform=uniform, temperature=self.temperature)
        if self.kind == "soft_topk":
            return _keep_likeliest(probabilities(logits, temperature=self.temperature), self.top_k)
        probs = probabilities(logits, temperature=self.temperature_at(step))
        if self.kind == "st":
            hard = F.one_hot(tokens, logits.shape[-1]).to(probs.dtype)
            return hard + (probs - probs.detach())
        return probs

    def temperature_at(self, step: int) -> float:
        """The temperature at a step; it falls geometrically under `annealed`, else it is constant."""
        if self.kind != "annealed":
            return self.temperature
        progress = min(1.0, step / self.anneal_steps)
        return float(self.temperature * (self.final_temperature / self.temperature) ** progress)


def _keep_likeliest(probs: Tensor, count: int) -> Tensor:
    count = min(count, probs.shape[-1])
    values, codes = probs.topk(count, dim=-1)
    kept = torch.zeros_like(probs).scatter(-1, codes, values)
    return kept / kept.sum(dim=-1, keepdim=True)
