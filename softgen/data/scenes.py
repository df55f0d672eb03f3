"""The captions of `Shapes`: what a scene asks for, how that is said in words, and which scenes are held out.

Tasks are the six of GenEval (Ghosh et al. 2023, arXiv 2310.11513), on shapes in place of everyday objects.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from softgen.data.split import SPLIT_SEED
from softgen.random import derive_seed

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
KINDS = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "black")
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a drawing of {}")
HELD_OUT_SHARE = 0.15

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_PLURALS = {kind: "crosses" if kind == "cross" else f"{kind}s" for kind in KINDS}
_MIRRORED = {"right of": "left of", "below": "above"}


@dataclass(frozen=True)
class AskedObject:
    """One object of a description.

    Attributes:
        kind: One of `KINDS`.
        colour: One of `COLOURS`, or None where the caption states none.
        size: "small" or "large" among the sizes that fit the scene, or None where the caption states none.
    """

    kind: str
    colour: str | None = None
    size: str | None = None

    @property
    def words(self) -> str:
        """The object without its article, such as "small red circle"."""
        return " ".join(word for word in (self.size, self.colour, self.kind) if word is not None)


@dataclass(frozen=True)
class Description:
    """What a caption asks for.

    Attributes:
        task: One of `TASKS`.
        objects: One object asked for; two in `two_object`, `position` and `color_attr`, of different kinds.
        count: How many of the object, 2 to 4 in `counting`, else 1.
        relation: One of `RELATIONS`, of the first object to the second, in `position`; else None.
        background: One of `BACKGROUNDS`, or None where the caption states none.
    """

    task: str
    objects: tuple[AskedObject, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    @property
    def caption(self) -> str:
        """The description in words, without a template, such as "a circle left of a square"."""
        first = self.objects[0]
        if self.count > 1:
            words = [_NUMBERS[self.count], *([first.colour] if first.colour else []), _PLURALS[first.kind]]
            text = " ".join(words)
        else:
            text = f" {self.relation or 'and'} ".join(f"a {asked.words}" for asked in self.objects)
        return text if self.background is None else f"{text} on a {self.background} background"

    @property
    def num_objects(self) -> int:
        """Objects in the picture, 1 to 4."""
        return self.count if self.count > 1 else len(self.objects)

    @property
    def core(self) -> str:
        """What decides whether the description is held out: its meaning, whatever the order of its words.

        A stated background counts, and a stated size, in `single_object` and `two_object` alone: kinds alone would
        make too few descriptions there. In the other tasks a held-out core is never seen with any background.
        """
        with_details = self.task in ("single_object", "two_object")
        parts = [f"{asked.kind}/{asked.colour}/{asked.size if with_details else None}" for asked in self.objects]
        relation = self.relation
        if relation is None:
            parts.sort()
        elif relation in _MIRRORED:
            parts, relation = parts[::-1], _MIRRORED[relation]
        background = self.background if with_details else None
        return "|".join((self.task, *parts, str(self.count), str(relation), str(background)))


@dataclass(frozen=True)
class ShownObject:
    """An object of a picture.

    Attributes:
        kind: One of `KINDS`.
        colour: One of `COLOURS`.
        x: Middle of its bounding box, as a fraction of the width.
        y: Middle of its bounding box from the top, as a fraction of the height.
        radius: Half of its width, as a fraction of the image's; a square's half side is 0.88 of it.
    """

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt and what it asks for."""

    prompt: str
    description: Description


@cache
def all_descriptions(task: str) -> tuple[Description, ...]:
    """Every description of a task, held out or not, in a fixed order.

    Raises:
        ValueError: There is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got '{task}'")
    return tuple(
        Description(task, objects, count=count, relation=relation, background=background)
        for objects, count, relation in _scenes(task)
        for background in (None, *BACKGROUNDS)
    )


def _scenes(task: str) -> Iterator[tuple[tuple[AskedObject, ...], int, str | None]]:
    """Objects, count and relation of each description of a task."""
    sizes, colours = (None, *SIZES), (None, *COLOURS)
    kind_pairs = list(itertools.permutations(KINDS, 2))
    if task == "single_object":
        for kind, size in itertools.product(KINDS, sizes):
            yield (AskedObject(kind, size=size),), 1, None
    elif task == "two_object":
        for (a, b), size_a, size_b in itertools.product(kind_pairs, sizes, sizes):
            yield (AskedObject(a, size=size_a), AskedObject(b, size=size_b)), 1, None
    elif task == "counting":
        for kind, count, colour in itertools.product(KINDS, _NUMBERS, colours):
            yield (AskedObject(kind, colour),), count, None
    elif task == "colors":
        for kind, colour, size in itertools.product(KINDS, COLOURS, sizes):
            yield (AskedObject(kind, colour, size),), 1, None
    elif task == "position":
        for (a, b), relation in itertools.product(kind_pairs, RELATIONS):
            yield (AskedObject(a), AskedObject(b)), 1, relation
    else:
        for (a, b), (colour_a, colour_b) in itertools.product(kind_pairs, itertools.permutations(COLOURS, 2)):
            yield (AskedObject(a, colour_a), AskedObject(b, colour_b)), 1, None


@cache
def _held_out_cores(task: str) -> frozenset[str]:
    """The first 15 % of a task's cores in the order of a fixed hash."""
    cores = {description.core for description in all_descriptions(task)}
    order = sorted(cores, key=lambda core: derive_seed(SPLIT_SEED, "shapes", core))
    return frozenset(order[: round(HELD_OUT_SHARE * len(order))])


def is_held_out(description: Description) -> bool:
    """Whether no training image shows the description; the same for every seed, template and order of words."""
    return description.core in _held_out_cores(description.task)


@cache
def descriptions(task: str, *, held_out: bool) -> tuple[Description, ...]:
    """The held-out descriptions of a task, about 15 %, or those of training, in a fixed order.

    Raises:
        ValueError: There is no such task.
    """
    return tuple(description for description in all_descriptions(task) if is_held_out(description) == held_out)


@cache
def _by_caption() -> dict[str, Description]:
    return {description.caption: description for task in TASKS for description in all_descriptions(task)}


def description_of(prompt: str) -> Description:
    """What a prompt of the grammar asks for, held out or not.

    Raises:
        ValueError: The prompt is not of the grammar.
    """
    for template in reversed(TEMPLATES):
        prefix = template.format("")
        description = _by_caption().get(prompt.removeprefix(prefix)) if prompt.startswith(prefix) else None
        if description is not None:
            return description
    raise ValueError(f"prompt: expected a caption of Shapes, such as 'a photo of a red circle', got '{prompt}'")


@cache
def _held_out_prompts(task: str) -> tuple[ShapesPrompt, ...]:
    """Every held-out prompt of a task, in the order of a fixed hash."""
    prompts = [
        ShapesPrompt(template.format(description.caption), description)
        for description in descriptions(task, held_out=True)
        for template in TEMPLATES
    ]
    return tuple(sorted(prompts, key=lambda prompt: derive_seed(SPLIT_SEED, "shapes prompts", prompt.prompt)))


def shapes_prompts(n: int) -> list[ShapesPrompt]:
    """Held-out prompts for `ShapesGenEval`: prompt i is of task i mod 6.

    The list is the same on every call, and that of a smaller n is its beginning. A task's prompts differ until all
    of them have been given (the fewest are those of `single_object`, 45), then start again.

    Args:
        n: How many, at least 1; a multiple of 6 weighs all tasks alike.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    pools = [_held_out_prompts(task) for task in TASKS]
    return [pools[i % len(TASKS)][(i // len(TASKS)) % len(pools[i % len(TASKS)])] for i in range(n)]


@cache
def shapes_vocabulary() -> tuple[str, ...]:
    """Every word of the grammar, sorted: a tokenizer by words needs no more."""
    captions = itertools.chain(_by_caption(), (template.format("") for template in TEMPLATES))
    return tuple(sorted({word for caption in captions for word in caption.split()}))
