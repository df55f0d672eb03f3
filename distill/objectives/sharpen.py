"""Sharpening: lowers the entropy of the student's distributions, the control that a GAN has to beat."""

from typing import Literal

import torch

from distill.objectives.base import DistillState, Objective, ObjectiveLosses
from softgen.relaxation import probabilities


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
        return ObjectiveLosses(generator=torch.special.entr(probabilities(state.logits)).sum(dim=-1).mean())
