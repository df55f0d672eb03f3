"""Pictures of coloured shapes with captions that a program can verify: text-to-image in small, without a download."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softgen.data.base import ImageDataModule, TrainVal
from softgen.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SIZES,
    TASKS,
    TEMPLATES,
    Description,
    ShownObject,
    descriptions,
)
from softgen.data.shape_drawing import BACKGROUND_GREY, COLOUR_RGB, MAX_OBJECTS, Pictures, draw
from softgen.data.shape_layout import LAYOUT_DRAWS, lay_out
from softgen.data.split import SPLIT_SEED
from softgen.random import SampleRandom, derive_seed

_COLOUR_JITTER = 0.015

# Radii are multiples of this fraction of the side (1 pixel at 32), and backgrounds are exact: what little models can
# learn at this scale is what goes together, not the geometry of every edge.
_RADIUS_STEP = 1 / 32

_RADII = torch.tensor((5.0, 6.5))  # in steps, small and large


@dataclass(frozen=True)
class Scene:
    """The truth about one sample: its prompt, what that asks for, and what the picture shows."""

    prompt: str
    description: Description
    objects: tuple[ShownObject, ...]


class ShapesSource:
    """Pictures drawn when they are fetched: sample i depends on the seed, the split and i alone.

    Args:
        length: Number of samples.
        image_size: Height and width of the pictures in pixels.
        split: "train" shows descriptions that are not held out, in `task_weights`; "val" the held-out ones, sample i
            of task i mod 6.
        seed: Seed of the samples.
        task_weights: Share of each task in training, in the order of `TASKS`, in any unit.
    """

    def __init__(
        self, length: int, *, image_size: int, split: str, seed: int, task_weights: Sequence[float] = (1.0,) * 6
    ) -> None:
        self.length = length
        self.image_size = image_size
        self.split = split
        self.seed = seed
        self._table = _Table(held_out=split == "val", task_weights=task_weights)

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: Sequence[int]) -> dict[str, Any]:
        """`image` (B, 3, H, H) float32 in [0, 1] and `prompt`, B strings."""
        rows, templates, pictures = self._sample(indices)
        return {"image": draw(pictures, image_size=self.image_size), "prompt": self._prompts(rows, templates)}

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The prompts of the samples at `indices`, without their pictures."""
        rows, templates, _ = self._sample(indices)
        return self._prompts(rows, templates)

    def scenes(self, indices: Sequence[int]) -> list[Scene]:
        """The truth about the samples at `indices`."""
        rows, templates, pictures = self._sample(indices)
        prompts = self._prompts(rows, templates)
        return [
            Scene(prompt, self._table.descriptions[row], _shown(pictures, index))
            for index, (prompt, row) in enumerate(zip(prompts, rows.tolist(), strict=True))
        ]

    def _prompts(self, rows: Tensor, templates: Tensor) -> list[str]:
        pairs = zip(rows.tolist(), templates.tolist(), strict=True)
        return [TEMPLATES[template].format(self._table.captions[row]) for row, template in pairs]

    def _sample(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Pictures]:
        """Rows of the table (B,), templates (B,) and pictures."""
        noise = SampleRandom(derive_seed(self.seed, "shapes", self.split), indices, device=torch.device("cpu"))
        wording, looks = torch.split(noise.uniform(2 + _LOOKS_DRAWS), [2, _LOOKS_DRAWS], dim=1)
        choice = wording[:, 0].double()
        if self.split == "val":
            choice = (torch.as_tensor(indices) % len(TASKS) + choice) / len(TASKS)
        rows = self._table.choose(choice)
        return rows, (wording[:, 1] * len(TEMPLATES)).long(), self._table.pictures(rows, looks)


class Shapes(ImageDataModule):
    """Pictures of 1 to 4 coloured shapes and their captions, drawn as they are needed.

    Circles, squares, triangles, crosses and rings in six colours, each in a quarter of its own, on white, grey or
    black. A caption asks for one of GenEval's six tasks (arXiv 2310.11513) and may name sizes and the background; what
    it does not name is drawn at random. `ShapesGenEval` verifies pictures against captions. Prompts have at most 14
    words of a vocabulary of 38 (`softgen.data.scenes.shapes_vocabulary`). Radii are 5 or 6.5 32nds of the side; the
    colours jitter.

    About 15 % of each task's descriptions are held out, the same for every seed, template and order of words:
    training never shows them, validation and `shapes_prompts` show nothing else. Validation is the same for every seed.

    Args:
        image_size: Height and width in pixels, at least 16; details are legible from 32.
        train_samples: Training samples; each is drawn again whenever it is asked for.
        val_samples: Held-out samples, sample i of task i mod 6.
        task_weights: Share of each task in training, by name, in any unit; tasks left out are not shown. None shows all
            six alike.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 is best here.
        seed: Seed of the training samples and of their order.

    Raises:
        ValueError: An argument is out of range.
    """

    num_classes = 0
    has_prompts = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        train_samples: int = 100_000,
        val_samples: int = 1000,
        task_weights: Mapping[str, float] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for key, count in (("train_samples", train_samples), ("val_samples", val_samples)):
            if count < 1:
                raise ValueError(f"data.{key}: expected at least 1, got {count}")
        if image_size < 16:
            raise ValueError(f"data.image_size: expected at least 16, got {image_size}")
        self.image_size = image_size
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.task_weights = _checked_weights(task_weights)

    def load_sources(self) -> TrainVal:
        """The training samples of this seed, and the held-out ones."""
        return TrainVal(
            train=ShapesSource(
                self.train_samples,
                image_size=self.image_size,
                split="train",
                seed=self.seed,
                task_weights=self.task_weights,
            ),
            val=ShapesSource(self.val_samples, image_size=self.image_size, split="val", seed=SPLIT_SEED),
        )


def _checked_weights(task_weights: Mapping[str, float] | None) -> tuple[float, ...]:
    if task_weights is None:
        return (1.0,) * len(TASKS)
    unknown = [task for task in task_weights if task not in TASKS]
    if unknown:
        raise ValueError(f"data.task_weights: expected tasks among {', '.join(TASKS)}, got '{unknown[0]}'")
    if not task_weights or min(task_weights.values()) < 0 or sum(task_weights.values()) <= 0:
        raise ValueError(f"data.task_weights: expected shares of at least 0, not all 0, got {dict(task_weights)}")
    return tuple(float(task_weights.get(task, 0.0)) for task in TASKS)


class _Table:
    """Descriptions as tensors of D rows, so that a batch of scenes is made without a loop.

    Args:
        held_out: Whether the descriptions are those held out, or those of training.
        task_weights: Share of each task.
    """

    def __init__(self, *, held_out: bool, task_weights: Sequence[float]) -> None:
        by_task = [descriptions(task, held_out=held_out) for task in TASKS]
        self.descriptions = [description for group in by_task for description in group]
        self.captions = [description.caption for description in self.descriptions]
        self.kind = torch.tensor([_places([KINDS.index(a.kind) for a in d.objects], d) for d in self.descriptions])
        self.colour = torch.tensor(
            [_places([_index(COLOURS, a.colour) for a in d.objects], d) for d in self.descriptions]
        )
        self.size = torch.tensor([_places([_index(SIZES, a.size) for a in d.objects], d) for d in self.descriptions])
        self.background = torch.tensor([_index(BACKGROUNDS, d.background) for d in self.descriptions])
        self.relation = torch.tensor([_index(RELATIONS, d.relation) for d in self.descriptions])
        self.is_one_colour = torch.tensor([d.task == "counting" for d in self.descriptions])
        weights = [
            torch.tensor([_weight(d) for d in group], dtype=torch.float64) * (share / sum(map(_weight, group)))
            for group, share in zip(by_task, task_weights, strict=True)
        ]
        cumulative = torch.cat(weights).cumsum(0)
        self.cumulative = cumulative / cumulative[-1]

    def choose(self, draws: Tensor) -> Tensor:
        """Rows (B,) by their weights, for uniform draws (B,) in [0, 1); tasks follow each other in [0, 1)."""
        return torch.searchsorted(self.cumulative, draws, right=True).clamp_(max=len(self.captions) - 1)

    def pictures(self, rows: Tensor, draws: Tensor) -> Pictures:
        """Pictures that fit the descriptions at `rows` (B,), all else by uniform draws (B, _LOOKS_DRAWS)."""
        layout, colour, rgb, size, level, turns = torch.split(draws, _LOOKS, dim=1)
        kind = self.kind[rows]
        colour = torch.where(self.is_one_colour[rows, None], colour[:, :1], colour)
        colours = _stated_or(self.colour[rows], (colour * len(COLOURS)).long())
        jitter = (2 * rgb.view(-1, MAX_OBJECTS, 3) - 1) * _COLOUR_JITTER
        background = _stated_or(self.background[rows], (level[:, 0] * len(BACKGROUNDS)).long())
        return Pictures(
            kind=kind,
            colour=colours,
            rgb=(COLOUR_RGB[colours] + jitter).clamp(0, 1),
            centre=self._centres(rows, layout, turns),
            radius=self._radii(rows, size) * (kind >= 0),
            background=BACKGROUND_GREY[background][:, None].repeat(1, 3),
        )

    def _radii(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Radii (B, 4) of the stated size, or of any."""
        size = _stated_or(self.size[rows], (draws * len(SIZES)).long())
        return _RADII[size] * _RADIUS_STEP

    def _centres(self, rows: Tensor, layout: Tensor, turns: Tensor) -> Tensor:
        """Centres (B, 4, 2) as x and y, by the stated relation or turned around at random."""
        relation = self.relation[rows]
        is_related = relation >= 0
        centre = lay_out(self.kind[rows] >= 0, is_related=is_related, draws=layout)
        is_column = torch.where(is_related, relation >= RELATIONS.index("above"), turns[:, 0] < 0.5)
        is_reversed = torch.where(is_related, relation % 2 == 1, turns[:, 1] < 0.5)
        centre[..., 0] = torch.where(is_reversed[:, None], 1 - centre[..., 0], centre[..., 0])
        centre[..., 1] = torch.where(turns[:, 2:3] < 0.5, 1 - centre[..., 1], centre[..., 1])
        return torch.where(is_column[:, None, None], centre.flip(-1), centre)


# How the random draws of one picture are shared out, in the order of `_Table.pictures`.
_LOOKS = [LAYOUT_DRAWS, MAX_OBJECTS, 3 * MAX_OBJECTS, MAX_OBJECTS, 1, 3]
_LOOKS_DRAWS = sum(_LOOKS)


def _places(values: list[int], description: Description) -> list[int]:
    """The values of a description's objects in four places, -1 where there is no object."""
    shown = values * description.count
    return shown + [-1] * (MAX_OBJECTS - len(shown))


def _index(names: Sequence[str], name: str | None) -> int:
    return -1 if name is None else names.index(name)


def _weight(description: Description) -> float:
    """How often a description is shown among those of its task: what may be stated is stated half of the time."""
    weight = 1.0 if description.background is not None else float(len(BACKGROUNDS))
    for asked in description.objects:
        if asked.size is None:
            weight *= len(SIZES)
        if asked.colour is None and description.task == "counting":
            weight *= len(COLOURS)
    return weight


def _stated_or(stated: Tensor, drawn: Tensor) -> Tensor:
    return torch.where(stated >= 0, stated, drawn)


def _shown(pictures: Pictures, index: int) -> tuple[ShownObject, ...]:
    return tuple(
        ShownObject(
            kind=KINDS[kind],
            colour=COLOURS[int(pictures.colour[index, place])],
            x=float(pictures.centre[index, place, 0]),
            y=float(pictures.centre[index, place, 1]),
            radius=float(pictures.radius[index, place]),
        )
        for place, kind in enumerate(pictures.kind[index].tolist())
        if kind >= 0
    )
