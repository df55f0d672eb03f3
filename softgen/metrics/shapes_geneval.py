"""Does a picture of `Shapes` show what its prompt asks for? Decided by a program, in the manner of GenEval."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from softgen.data.scenes import TASKS, AskedObject, Description, ShownObject, description_of
from softgen.metrics.shape_detection import detect_shapes

POSITION_MARGIN = 0.1
"""GenEval's: offsets shrink by this share of the two widths before a relation is read off them."""


def shows(description: Description, objects: Sequence[ShownObject]) -> bool:
    """Whether these objects are what a description asks for, by GenEval's rules (arXiv 2310.11513).

    | task | rule |
    |---|---|
    | single_object, two_object | each kind asked for is there, of any colour |
    | counting | exactly that many of the kind, and each of the colour if one is stated |
    | colors, color_attr | each kind asked for is there in its colour |
    | position | the relation holds between the largest objects of the two kinds, see `relations` |

    Other objects do no harm. A stated size and a stated background are not verified.
    """
    if description.task == "counting":
        asked = description.objects[0]
        same_kind = [shown for shown in objects if shown.kind == asked.kind]
        return len(same_kind) == description.count and all(_matches(asked, shown) for shown in same_kind)
    matching = [[shown for shown in objects if _matches(asked, shown)] for asked in description.objects]
    if not all(matching):
        return False
    if description.relation is None:
        return True
    first, second = (max(group, key=lambda shown: shown.radius) for group in matching)
    return description.relation in relations(first, second)


def _matches(asked: AskedObject, shown: ShownObject) -> bool:
    return shown.kind == asked.kind and asked.colour in (None, shown.colour)


def relations(first: ShownObject, second: ShownObject) -> frozenset[str]:
    """How the first object lies to the second: none to two of `RELATIONS`, by GenEval's rule.

    The offset between the centres is shrunk along each axis by 0.1 of the sum of both widths. A relation holds where
    what is left along its axis is more than half of the whole distance.
    """
    offset = (first.x - second.x, first.y - second.y)
    slack = POSITION_MARGIN * 2 * (first.radius + second.radius)
    dx, dy = (math.copysign(max(abs(part) - slack, 0.0), part) for part in offset)
    half = math.hypot(*offset) / 2
    held = (("left of", -dx), ("right of", dx), ("above", -dy), ("below", dy))
    return frozenset(name for name, part in held if part > half)


def shapes_correct(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether each picture shows what its prompt asks for, see `shows`.

    Args:
        images: (B, 3, H, H) in [0, 1].
        prompts: B prompts of the grammar of `Shapes`.

    Returns:
        (B,) bool on the CPU.

    Raises:
        ValueError: A prompt is not of the grammar, there is not one for each image, or the images have another shape.
    """
    if len(prompts) != len(images):
        raise ValueError(f"prompts: expected {len(images)}, one an image, got {len(prompts)}")
    wanted = [description_of(prompt) for prompt in prompts]
    found = detect_shapes(images)
    return torch.tensor([shows(*pair) for pair in zip(wanted, found, strict=True)], dtype=torch.bool)


class ShapesGenEval(Metric):
    """GenEval on `Shapes` (tasks and rules of arXiv 2310.11513): the share of pictures that show what was asked for.

    Pictures are verified by `softgen.metrics.shape_detection`, without a network, so that the value is exact for given
    pictures; rules are those of `shows`. Use the prompts of `softgen.data.shapes_prompts`, at a stated number of them.

    Args:
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: In `update`, a prompt is not of the grammar of `Shapes`, or there is not one for each image; in
            `compute`, there are no images.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", default=torch.zeros(len(TASKS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros(len(TASKS), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add pictures (B, 3, H, H) in [0, 1] and their B prompts."""
        correct = shapes_correct(images, prompts).long().to(self.correct.device)
        tasks = [TASKS.index(description_of(prompt).task) for prompt in prompts]
        task = torch.tensor(tasks, dtype=torch.int64, device=self.correct.device)
        self.correct.index_add_(0, task, correct)
        self.total.index_add_(0, task, torch.ones_like(correct))

    def compute(self) -> dict[str, Tensor]:
        """Each task's accuracy and `overall`, their mean with equal weights: float32 scalars in [0, 1].

        A task of which there were no prompts is left out, of the mean too.
        """
        correct, total = self.correct.cpu().double(), self.total.cpu()  # MPS has no float64
        seen = total > 0
        if not bool(seen.any()):
            raise ValueError("generated images: expected at least 1, got 0")
        accuracy = correct / total.clamp(min=1)
        shares = {task: accuracy[i] for i, task in enumerate(TASKS) if bool(seen[i])}
        shares["overall"] = accuracy[seen].mean()
        return {task: share.float().to(self.total.device) for task, share in shares.items()}
