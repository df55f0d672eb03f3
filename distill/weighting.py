"""Adding up objectives whose gradients differ in scale."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.objectives.base import Objective, ObjectiveLosses, with_value_and_gradient
from softgen.distributed import mean_over_ranks
from softgen.relaxation import full_precision, widen

MAX_WEIGHT = 1000.0
"""Largest automatic weight; the paper's largest fixed one is 200."""


@dataclass(frozen=True)
class WeightedTerm:
    """An objective's term of the summed loss, and the weight that it had."""

    loss: Tensor
    weight: Tensor | float


def weigh(
    results: Mapping[str, ObjectiveLosses], objectives: Mapping[str, Objective], logits: Tensor
) -> dict[str, WeightedTerm]:
    """Weigh the generator's terms.

    With fixed weights this is a product. An objective of weight `auto` is scaled so that the norm of its gradient at
    the student's logits is `weight_ratio` times that of the first objective's. The weight never exceeds `MAX_WEIGHT`,
    and is 0 where the gradient is: an objective that is satisfied is left alone. The gradients are taken at the logits
    and handed on as they are, so that nothing behind the logits is run backwards twice.

    Under gradient accumulation each micro-batch has a weight of its own.

    Args:
        results: What the objectives returned, by name; the first is the anchor.
        objectives: The objectives, by name.
        logits: The student's, (B, N, K), which every term depends on.
    """
    if all(objectives[name].weight != "auto" for name in results):
        return {name: _fixed(objectives[name], result.generator) for name, result in results.items()}
    with full_precision(logits):  # as in the backward pass after the step, which autocast does not reach either
        gradients = {
            name: torch.autograd.grad(result.generator, logits, retain_graph=False)[0]
            for name, result in results.items()
        }
    anchor: Tensor | None = None
    terms: dict[str, WeightedTerm] = {}
    for name, result in results.items():
        objective, gradient = objectives[name], gradients[name]
        norm = mean_over_ranks(widen(gradient).square().sum()).sqrt()
        if objective.weight == "auto":
            assert anchor is not None, "SoftDiMO refuses an automatic weight on the first objective"
            wanted = objective.weight_ratio * anchor / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            weight: Tensor | float = torch.where(norm > 0, wanted.clamp(max=MAX_WEIGHT), 0.0)
        else:
            weight = objective.weight
        if anchor is None:
            anchor = norm * weight
        value = result.generator.detach() * weight
        terms[name] = WeightedTerm(with_value_and_gradient(logits, gradient * weight, value), weight)
    return terms


def _fixed(objective: Objective, loss: Tensor) -> WeightedTerm:
    assert objective.weight != "auto"
    return WeightedTerm(objective.weight * loss, objective.weight)
