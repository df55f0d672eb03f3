"""The interface of objectives: a new idea is a new file, and a class_path in a YAML.

Shape legend: B batch, N sites, K codes, L vectors of width d.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softgen.data.base import Batch
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Asked, Condition
from softgen.models.generator import OneStepGenerator
from softgen.pretrained import Pretrained
from softgen.random import SampleRandom
from softgen.relaxation import Relaxation
from softgen.tokenizers.base import ImageTokenizer
from softgen.training.optimization import OptimizerConfig, ParameterGroup


@dataclass(frozen=True)
class DistillState:
    """One on-policy pass of the student, which every objective of the step shares.

    Attributes:
        student: The generator in training.
        teacher: Frozen; gradients reach its inputs, never its weights.
        tokenizer: Frozen; None only where neither a tokenizer was named nor the teacher's folder has one, so never for
            an objective with `needs_tokenizer`. Whoever decodes asks for `tokenizer.under(state.asked)` first.
        asked: Labels (B,) or B prompts; zeros for an unconditional model.
        condition: The same, as the models take it.
        logits: The student's, (B, N, K), with gradient.
        tokens: Codes sampled from them, (B, N).
        batch: What the data module gave.
        step: Optimizer steps done so far.
        student_step: Those of them in which the student was trained.
        noise: Makes the draws of a named stream, one row a sample.
    """

    student: OneStepGenerator
    teacher: MaskedDiffusionModel
    tokenizer: ImageTokenizer | None
    asked: Asked
    condition: Condition
    logits: Tensor
    tokens: Tensor
    batch: Batch
    step: int
    student_step: int
    noise: Callable[[str], SampleRandom]


@dataclass(frozen=True)
class ObjectiveLosses:
    """What one objective adds to a step.

    Attributes:
        generator: Scalar whose gradient moves the student, through `DistillState.logits`, before the weight.
        critic: Scalar whose gradient moves the critic alone, or None.
        logs: Scalars to log.
    """

    generator: Tensor
    critic: Tensor | None = None
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """One term of L_gen = sum_i w_i L_i, and the critic that it needs, if any.

    The two losses come from one call, so that whatever both need (Di[M]O's auxiliary logits) is computed once. The
    generator's term must not reach the critic's weights, nor the critic's term the student's: detach. Where any
    objective of the run has the weight `auto`, gradients are taken at `state.logits` and handed on from there: the
    generator's term must then depend on the student through these logits alone, and share no graph with the critic's.

    Args:
        weight: w_i, at least 0; or `auto`: the gradient at the student's logits is held at `weight_ratio` times the
            first objective's.
        weight_ratio: For `auto`, above 0; see `distill.weighting.weigh` for when the weight stays below it.

    Attributes:
        name: Used in logs, error messages and the names of optimizer groups; every class has one of its own.
        needs_images: Whether the batch must hold real images or tokens.
        needs_tokenizer: Whether images are encoded or decoded.
        relaxation: How the student's logits become embeddings, where they do.
        critic_only_steps: Steps at the start of a run in which only critics learn.
        default_optimizer: The student's settings, for a critic that has none of its own; set by `SoftDiMO`.
    """

    name: str
    needs_images: bool = False
    needs_tokenizer: bool = False
    relaxation: Relaxation | None = None
    critic_only_steps: int = 0
    default_optimizer: OptimizerConfig = OptimizerConfig()

    def __init__(self, *, weight: float | Literal["auto"] = 1.0, weight_ratio: float = 1.0) -> None:
        super().__init__()
        if weight != "auto" and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(f"{type(self).__name__}.weight: expected 'auto' or a number of at least 0, got {weight!r}")
        if not weight_ratio > 0:
            raise ValueError(f"{type(self).__name__}.weight_ratio: expected a number above 0, got {weight_ratio}")
        self.weight = weight
        self.weight_ratio = weight_ratio

    def setup(self, teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None) -> None:
        """Build the critic from the frozen teacher; called once, before the optimizer is made.

        Raises:
            ValueError: If this objective cannot work with these models.
        """

    @abstractmethod
    def forward(self, state: DistillState) -> ObjectiveLosses:
        """The losses of one step."""

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """The critic's optimizer groups; none for an objective without a critic."""
        return ()

    def frozen_modules(self) -> Mapping[str, nn.Module]:
        """Networks that the objective only looks through, by name.

        `SoftDiMO` freezes them, moves them along and keeps them out of checkpoints; they must not be registered here.
        """
        return {}

    def exports(self) -> Mapping[str, Pretrained]:
        """Critics that a later run can go on from, by the name of the folder that they are saved in."""
        return {}

    def metadata(self) -> Mapping[str, Any]:
        """Facts to keep with the student's weights; JSON values."""
        return {}

    def extra_repr(self) -> str:
        """The weight, for printing."""
        return f"weight={self.weight}"


def with_value_and_gradient(logits: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar that is `value` forward and whose gradient on `logits` is exactly `gradient`.

    Args:
        logits: Any shape, with gradient.
        gradient: The shape of the logits, without.
        value: Scalar, what the loss reads.
    """
    with torch.no_grad():
        offset = value - (logits * gradient).sum()
    return (logits * gradient).sum() + offset
