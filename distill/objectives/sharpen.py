"""Sharpening: lowers the entropy of the student's distributions, the control that a GAN has to beat."""

from typing import Literal

from distill.objectives.base import DistillState, Objective, ObjectiveLosses
from softgen.relaxation import widen


class Sharpen(Objective):
    """The mean entropy over sites, in nats; a discriminator on soft embeddings lowers it too.

    Args:
        weight: Of this term, or `auto`.
        weight_ratio: For `auto`, above 0.
    """

    name = "sharpen"

    def __init__(self, *, weight: float | Literal["auto"] = 1.0, weight_ratio: float = 1.0) -> None:
        super().__init__(weight=weight, weight_ratio=weight_ratio)

    def forward(self, state: DistillState) -> ObjectiveLosses:
        """The mean entropy."""
        # Not -p log p from p: its gradient is NaN where a probability underflows to 0, as it does for a sharp student.
        log_probs = widen(state.logits).log_softmax(dim=-1)
        return ObjectiveLosses(generator=-(log_probs.exp() * log_probs).sum(dim=-1).mean())
