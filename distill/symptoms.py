"""What the logged values say is wrong, in one line each."""

import math
from collections.abc import Iterable, Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from distill.objectives.base import Objective
from distill.weighting import MAX_WEIGHT

_LARGEST_MARGIN = 6.0
"""Margin over temperature at which a warning is due: a softmax scales the gradient of such a site by about exp(-6)."""
_MARGIN_TO_AIM_AT = 2.5
"""Margin over temperature that the warning proposes: at 7.5 a reward gave half as much on shapes as at 2.5."""


def warn_of_cut_weights(objectives: Iterable[Objective], metrics: Mapping[str, Tensor]) -> None:
    """Say which automatic weights are cut, so that they no longer keep the ratio that was asked for."""
    for objective in objectives:
        weight = metrics.get(f"train/{objective.name}_weight")
        if weight is not None and float(weight) >= MAX_WEIGHT:
            rank_zero_warn(
                f"{objective.name}: its automatic weight is at its largest, {MAX_WEIGHT:g}; its gradient stays "
                f"below {objective.weight_ratio:g} times (weight_ratio) that of the first objective"
            )


def warn_of_lost_gradients(objectives: Iterable[Objective], metrics: Mapping[str, Tensor], *, step: int) -> None:
    """Say which soft embeddings pass hardly any gradient, since the student's logits are too far apart.

    Di[M]O's gradient, that of the auxiliary model at the student's logits, does not end where the student is certain:
    it goes on driving them apart, until no gradient behind a softmax can bring them together again.

    Args:
        objectives: Those with a relaxation are looked at.
        metrics: With `val/margin`, see `softgen.relaxation.Sharpness`.
        step: Optimizer steps of the student done, for a temperature that falls.
    """
    margin = float(metrics["val/margin"])
    for objective in objectives:
        if objective.relaxation is None:
            continue
        temperature = objective.relaxation.temperature_at(step)
        if margin / temperature > _LARGEST_MARGIN:
            key = f"{type(objective).__name__}.relaxation.temperature"
            rank_zero_warn(
                f"{objective.name}: at half of the sites the largest logit is {margin:.0f} above the second, so that "
                f"hardly any gradient passes the softmax at temperature {temperature:g}; raise {key} and "
                f"model.temperature together, to {math.ceil(margin / _MARGIN_TO_AIM_AT)} for example"
            )
