import re
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.utilities import dim_zero_sum

from softgen.data.scenes import TASKS, ShownObject, description_of, shapes_prompts
from softgen.data.shapes import Scene, ShapesSource
from softgen.metrics import ShapesGenEval, detect_shapes, shapes_correct
from softgen.metrics.shapes_geneval import relations, shows


def real(n: int, *, seed: int, split: str = "train", size: int = 32) -> tuple[Tensor, list[Scene]]:
    source = ShapesSource(n, image_size=size, split=split, seed=seed)
    return source.fetch(range(n))["image"], source.scenes(range(n))


def degraded(images: Tensor, *, blur: float, noise: float) -> Tensor:
    """A Gaussian blur of so many pixels, then Gaussian noise, as a decoder of tokens may add."""
    taps = torch.exp(-torch.arange(-3.0, 4.0).square() / (2 * blur**2))
    kernel = torch.outer(taps, taps) / taps.sum().square()
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    blurred = F.conv2d(padded, kernel.expand(3, 1, 7, 7), groups=3)
    return (blurred + noise * torch.randn_like(blurred)).clamp(0, 1)


def shown(kind: str, colour: str = "red", x: float = 0.5, y: float = 0.5, radius: float = 0.1) -> ShownObject:
    return ShownObject(kind, colour, x=x, y=y, radius=radius)


def rates(images: Tensor, scenes: list[Scene]) -> tuple[dict[str, float], dict[str, float]]:
    """Each task's share of right pictures accepted, and of wrong ones (other scenes' descriptions) accepted."""
    accepted: Counter[str] = Counter()
    total: Counter[str] = Counter()
    wrongly: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    found = detect_shapes(images)
    for index, (scene, objects) in enumerate(zip(scenes, found, strict=True)):
        total[scene.description.task] += 1
        accepted[scene.description.task] += shows(scene.description, objects)
        for step in range(1, 20):
            other = scenes[(index + step) % len(scenes)].description
            if not shows(other, scene.objects):
                wrong[other.task] += 1
                wrongly[other.task] += shows(other, objects)
    assert min(total[task] for task in TASKS) > 40
    assert min(wrong[task] for task in TASKS) > 400
    return {task: accepted[task] / total[task] for task in TASKS}, {task: wrongly[task] / wrong[task] for task in TASKS}


@pytest.mark.parametrize(
    ("n", "seed", "split", "size"), [(1200, 0, "train", 32), (720, 1, "val", 32), (300, 2, "train", 64)]
)
def test_real_pictures_are_accepted_and_wrong_prompts_are_not(n: int, seed: int, split: str, size: int) -> None:
    right, wrong = rates(*real(n, seed=seed, split=split, size=size))
    assert min(right.values()) > 0.99, right
    assert max(wrong.values()) < 0.01, wrong


@pytest.mark.parametrize(("blur", "noise", "least"), [(0.7, 0.03, 0.99), (1.0, 0.05, 0.98), (1.3, 0.02, 0.98)])
def test_blurred_and_noisy_pictures(blur: float, noise: float, least: float) -> None:
    images, scenes = real(480, seed=3)
    right, wrong = rates(degraded(images, blur=blur, noise=noise), scenes)
    assert min(right.values()) > least, right
    assert max(wrong.values()) < 0.01, wrong


def test_every_object_is_found_where_it_is() -> None:
    images, scenes = real(300, seed=4)
    for scene, found in zip(scenes, detect_shapes(images), strict=True):
        assert len(found) == len(scene.objects)
        assert [s.radius for s in found] == sorted((s.radius for s in found), reverse=True)
        for truth in scene.objects:
            near = min(found, key=lambda s: abs(s.x - truth.x) + abs(s.y - truth.y))
            assert (near.kind, near.colour) == (truth.kind, truth.colour)
            assert abs(near.x - truth.x) < 0.02
            assert abs(near.y - truth.y) < 0.02
            assert abs(near.radius - truth.radius) < 0.02


def test_nothing_is_found_in_empty_or_noisy_pictures() -> None:
    plain = torch.stack([torch.full((3, 32, 32), level) for level in (0.0, 0.3, 0.55, 1.0)])
    noise = (0.5 + 0.1 * torch.randn(16, 3, 32, 32)).clamp(0, 1)
    assert detect_shapes(torch.cat([plain, noise])) == [[]] * 20


def test_a_speck_and_a_shapeless_patch_are_not_counted() -> None:
    images, scenes = real(60, seed=5)
    index = next(i for i, scene in enumerate(scenes) if scene.description.task == "counting")
    image = images[index].clone()
    before = detect_shapes(image[None])[0]
    red = torch.tensor((0.9, 0.1, 0.1))
    image[:, 0:2, 0:2] = red[:, None, None]
    assert detect_shapes(image[None])[0] == before
    lines = torch.full((3, 32, 32), 0.9)
    lines[:, 4:28, 15:17] = red[:, None, None]
    assert detect_shapes(lines[None]) == [[]]


def test_touching_objects_of_two_colours_are_two() -> None:
    image = torch.full((3, 32, 32), 0.9)
    image[:, 10:20, 6:16] = torch.tensor((0.9, 0.1, 0.1))[:, None, None]
    image[:, 10:20, 16:26] = torch.tensor((0.1, 0.25, 0.9))[:, None, None]
    assert {(s.kind, s.colour) for s in detect_shapes(image[None])[0]} == {("square", "red"), ("square", "blue")}


@pytest.mark.parametrize(
    ("prompt", "objects", "expected"),
    [
        ("a circle", [shown("circle", "blue"), shown("ring")], True),
        ("a small circle on a white background", [shown("circle", radius=0.4)], True),
        ("a circle", [shown("ring")], False),
        ("a circle and a ring", [shown("ring"), shown("circle"), shown("circle")], True),
        ("a circle and a ring", [shown("circle"), shown("circle")], False),
        ("two circles", [shown("circle"), shown("circle", "blue"), shown("ring")], True),
        ("two circles", [shown("circle")] * 3, False),
        ("two red circles", [shown("circle"), shown("circle", "blue")], False),
        ("two red circles", [shown("circle"), shown("circle")], True),
        ("two red circles", [shown("circle"), shown("circle"), shown("circle", "blue")], False),
        ("a red circle", [shown("circle", "blue"), shown("circle", "red")], True),
        ("a red circle", [shown("circle", "blue"), shown("ring", "red")], False),
        ("a red circle and a blue ring", [shown("circle"), shown("ring", "blue")], True),
        ("a red circle and a blue ring", [shown("circle", "blue"), shown("ring")], False),
        ("a circle left of a ring", [shown("circle", x=0.2), shown("ring", x=0.8)], True),
        ("a circle left of a ring", [shown("circle", x=0.8), shown("ring", x=0.2)], False),
        ("a circle below a ring", [shown("circle", y=0.8), shown("ring", y=0.2)], True),
        ("a circle above a ring", [shown("circle", y=0.8), shown("ring", y=0.2)], False),
        ("a circle left of a ring", [shown("circle", x=0.2)], False),
        # The larger circle counts, and it is on the right.
        ("a circle left of a ring", [shown("circle", x=0.1), shown("circle", x=0.9, radius=0.2), shown("ring")], False),
    ],
)
def test_rules(prompt: str, objects: list[ShownObject], expected: bool) -> None:
    assert shows(description_of(prompt), objects) is expected


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-0.5, 0.0, {"left of"}),
        (0.5, 0.1, {"right of"}),
        (0.0, -0.3, {"above"}),
        (0.3, 0.3, {"right of", "below"}),
        (0.039, 0.0, set()),  # within the margin: 0.1 of two widths of 0.2
        (0.0, 0.0, set()),
        (0.081, 0.0, {"right of"}),  # 0.041 of 0.081 is left
        (0.079, 0.0, set()),  # 0.039 of 0.079
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    assert relations(shown("circle", x=0.5 + dx, y=0.5 + dy), shown("ring")) == expected


def test_the_metric_is_each_tasks_share_and_their_mean() -> None:
    source = ShapesSource(120, image_size=32, split="val", seed=0)
    batch = source.fetch(range(120))
    metric = ShapesGenEval()
    metric.update(batch["image"][:50], batch["prompt"][:50])
    metric.update(batch["image"][50:], batch["prompt"][50:])
    perfect = metric.compute()
    assert list(perfect) == [*TASKS, "overall"]
    assert {name: float(value) for name, value in perfect.items()} == dict.fromkeys(perfect, 1.0)

    metric.reset()
    blank = batch["image"].clone()
    blank[0::6] = 0.9  # no picture of single_object
    blank[2:60:6] = 0.9  # half of those of counting
    metric.update(blank, batch["prompt"])
    partly = {name: float(value) for name, value in metric.compute().items()}
    assert partly["single_object"] == 0.0
    assert partly["counting"] == 0.5
    assert partly["overall"] == pytest.approx(4.5 / 6)


def test_tasks_without_prompts_are_left_out() -> None:
    source = ShapesSource(12, image_size=32, split="val", seed=0)
    batch = source.fetch([0, 3, 6])
    metric = ShapesGenEval()
    metric.update(batch["image"], batch["prompt"])
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "single_object": 1.0,
        "colors": 1.0,
        "overall": 1.0,
    }


def test_states_are_sums_over_processes() -> None:
    source = ShapesSource(60, image_size=32, split="val", seed=0)
    batch = source.fetch(range(60))
    images = batch["image"].clone()
    images[::4] = 0.5
    whole, first, second = ShapesGenEval(), ShapesGenEval(), ShapesGenEval()
    whole.update(images, batch["prompt"])
    first.update(images[:25], batch["prompt"][:25])
    second.update(images[25:], batch["prompt"][25:])
    assert first._reductions == {"correct": dim_zero_sum, "total": dim_zero_sum}
    assert torch.equal(first.correct + second.correct, whole.correct)
    assert torch.equal(first.total + second.total, whole.total)


def test_prompts_of_the_evaluation_are_accepted() -> None:
    prompts = [entry.prompt for entry in shapes_prompts(12)]
    correct = shapes_correct(torch.full((12, 3, 32, 32), 0.5), prompts)
    assert correct.dtype == torch.bool
    assert correct.tolist() == [False] * 12


def test_bad_input_is_refused() -> None:
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"^prompts: expected 2, one an image, got 1$"):
        ShapesGenEval().update(images, ["a circle"])
    with pytest.raises(ValueError, match=re.escape("such as 'a photo of a red circle', got 'a dog'")):
        ShapesGenEval().update(images, ["a circle", "a dog"])
    with pytest.raises(ValueError, match=r"^images: expected shape \(B, 3, H, H\), got \(2, 1, 32, 32\)$"):
        detect_shapes(images[:, :1])
    with pytest.raises(ValueError, match=r"^images: expected finite values in \[0, 1\], got others$"):
        detect_shapes(images.fill_(torch.nan))
    with pytest.raises(ValueError, match=r"^generated images: expected at least 1, got 0$"):
        ShapesGenEval().compute()
