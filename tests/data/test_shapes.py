import itertools
from collections import Counter

import pytest
import torch

from softgen.data import Shapes, description_of, shapes_prompts, shapes_vocabulary
from softgen.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SIZES,
    TASKS,
    TEMPLATES,
    AskedObject,
    Description,
    all_descriptions,
    descriptions,
    is_held_out,
)
from softgen.data.shape_drawing import COLOUR_RGB, coverage
from softgen.data.shapes import Scene, ShapesSource


def train_source(n: int = 600, *, size: int = 32, seed: int = 0) -> ShapesSource:
    return ShapesSource(n, image_size=size, split="train", seed=seed)


def words(description: Description) -> set[str]:
    """Every choice that a description states: kinds, colours, sizes, count, relation, background."""
    asked = description.objects
    stated = {*(a.kind for a in asked), *(a.colour for a in asked), *(a.size for a in asked)}
    return {str(word) for word in (*stated, description.count, description.relation, description.background)}


def test_samples_depend_on_seed_split_and_index_alone() -> None:
    whole = train_source().fetch(range(64))
    one = train_source().fetch([17])
    torch.testing.assert_close(one["image"][0], whole["image"][17], rtol=0, atol=0)
    assert one["prompt"] == [whole["prompt"][17]]
    backwards = train_source().fetch(list(range(63, -1, -1)))
    assert torch.equal(backwards["image"].flip(0), whole["image"])
    other = train_source(seed=1).fetch(range(64))
    assert not torch.equal(other["image"], whole["image"])
    assert other["prompt"] != whole["prompt"]


def test_batches_hold_images_and_prompts() -> None:
    data = Shapes(train_samples=20, val_samples=7, batch_size=4, image_size=24)
    assert (data.has_prompts, data.has_images, data.num_classes, data.image_size) == (True, True, 0, 24)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"ordinal", "index", "image", "prompt"}
    assert batch["image"].shape == (4, 3, 24, 24)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0
    assert batch["image"].max() <= 1
    assert [type(prompt) for prompt in batch["prompt"]] == [str] * 4
    assert (len(data.train_source()), len(data.val_source())) == (20, 7)


def test_the_vocabulary_is_small_and_prompts_are_short() -> None:
    vocabulary = shapes_vocabulary()
    assert len(vocabulary) == 38
    captions = [description.caption for task in TASKS for description in all_descriptions(task)]
    prompts = [template.format(caption) for caption in captions for template in TEMPLATES]
    assert max(len(prompt.split()) for prompt in prompts) == 14
    assert {word for prompt in prompts for word in prompt.split()} == set(vocabulary)


def test_every_prompt_is_read_back_exactly() -> None:
    count = 0
    for task in TASKS:
        for description in all_descriptions(task):
            for template in TEMPLATES:
                assert description_of(template.format(description.caption)) == description
                count += 1
    assert count == 5 * (60 + 720 + 420 + 360 + 320 + 2400)


def test_captions_of_each_task() -> None:
    circle, square = AskedObject("circle"), AskedObject("square")
    expected = {
        "a circle": Description("single_object", (circle,)),
        "a photo of a small ring on a grey background": Description(
            "single_object", (AskedObject("ring", size="small"),), background="grey"
        ),
        "a circle and a large square": Description("two_object", (circle, AskedObject("square", size="large"))),
        "three red crosses": Description("counting", (AskedObject("cross", "red"),), count=3),
        "a picture of two circles": Description("counting", (circle,), count=2),
        "a large cyan triangle": Description("colors", (AskedObject("triangle", "cyan", "large"),)),
        "a circle left of a square": Description("position", (circle, square), relation="left of"),
        "a red circle and a blue square": Description(
            "color_attr", (AskedObject("circle", "red"), AskedObject("square", "blue"))
        ),
    }
    assert {prompt: description_of(prompt) for prompt in expected} == expected


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog", "a photo of", "five circles", "A circle", "a circle ", "a photo of a photo of a circle", "{}"],
)
def test_a_prompt_outside_of_the_grammar_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"^prompt: expected a caption of Shapes, such as '.*', got ") as caught:
        description_of(prompt)
    assert str(caught.value).endswith(f", got '{prompt}'")


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^task: expected one of single_object, .*, got 'colours'$"):
        all_descriptions("colours")


@pytest.mark.parametrize("task", TASKS)
def test_a_share_of_each_task_is_held_out_and_no_word_of_it(task: str) -> None:
    held_out, training = descriptions(task, held_out=True), descriptions(task, held_out=False)
    assert sorted(map(repr, (*held_out, *training))) == sorted(map(repr, all_descriptions(task)))
    assert 0.10 <= len(held_out) / len(all_descriptions(task)) <= 0.16
    everything = set().union(*map(words, all_descriptions(task)))
    assert set().union(*map(words, training)) == everything
    assert set(KINDS) <= everything
    assert set(BACKGROUNDS) <= everything


def test_words_of_each_task() -> None:
    def stated(task: str) -> set[str]:
        return set().union(*map(words, descriptions(task, held_out=False)))

    assert set(COLOURS) <= stated("counting") & stated("colors") & stated("color_attr")
    assert {"2", "3", "4"} <= stated("counting")
    assert set(RELATIONS) <= stated("position")
    assert set(SIZES) <= stated("single_object") & stated("two_object") & stated("colors")


def test_the_order_of_words_does_not_move_a_description_across_the_split() -> None:
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    for task in ("two_object", "position", "color_attr"):
        for d in all_descriptions(task):
            turned = Description(task, d.objects[::-1], relation=mirrored[d.relation], background=d.background)
            assert is_held_out(d) == is_held_out(turned)


def test_a_held_out_combination_is_held_out_on_every_background() -> None:
    for task in ("counting", "colors", "position", "color_attr"):
        for d in all_descriptions(task):
            plain = Description(task, d.objects, count=d.count, relation=d.relation)
            assert is_held_out(d) == is_held_out(plain)


def test_training_never_shows_what_is_held_out_and_validation_nothing_else() -> None:
    data = Shapes(train_samples=5000, val_samples=600)
    train, val = data.train_source(), data.val_source()
    trained = [description_of(prompt) for prompt in train.fetch(range(5000))["prompt"]]
    held_out = [description_of(prompt) for prompt in val.fetch(range(600))["prompt"]]
    assert not any(map(is_held_out, trained))
    assert all(map(is_held_out, held_out))
    assert [description.task for description in held_out] == [TASKS[i % 6] for i in range(600)]
    assert len({description.core for description in held_out}) > 100


def test_validation_is_the_same_for_every_seed() -> None:
    first, second = (Shapes(seed=seed, val_samples=12).val_source().fetch(range(12)) for seed in (0, 5))
    assert first["prompt"] == second["prompt"]
    assert torch.equal(first["image"], second["image"])


def test_training_shows_the_tasks_alike_and_states_details_half_of_the_time() -> None:
    n = 6000
    seen = [description_of(prompt) for prompt in train_source(n).fetch(range(n))["prompt"]]
    counts = Counter(description.task for description in seen)
    assert set(counts) == set(TASKS)
    assert max(abs(count - n / 6) for count in counts.values()) < 5 * (n * 5 / 36) ** 0.5
    no_background = sum(description.background is None for description in seen) / n
    assert abs(no_background - 0.5) < 0.05


def test_task_weights() -> None:
    data = Shapes(train_samples=900, task_weights={"counting": 2, "position": 1.0, "colors": 0})
    counts = Counter(description_of(prompt).task for prompt in data.train_source().fetch(range(900))["prompt"])
    assert set(counts) == {"counting", "position"}
    assert abs(counts["counting"] - 600) < 5 * (900 * 2 / 9) ** 0.5


def agrees(scene: Scene) -> bool:
    """Whether the picture shows exactly what is asked for."""
    d, shown = scene.description, scene.objects
    asked = [d.objects[0]] * d.count if d.count > 1 else list(d.objects)
    same = len(asked) == len(shown) and all(
        a.kind == s.kind and a.colour in (None, s.colour) for a, s in zip(asked, shown, strict=True)
    )
    if d.task == "counting":
        same = same and len({s.colour for s in shown}) == 1
    if d.relation is None:
        return same
    dx, dy = shown[0].x - shown[1].x, shown[0].y - shown[1].y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[d.relation]
    across = dy if d.relation in ("left of", "right of") else dx
    return same and along > shown[0].radius + shown[1].radius and abs(across) <= 0.5 * along + 1e-5


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_show_exactly_what_is_asked_for(split: str) -> None:
    source = ShapesSource(1500, image_size=32, split=split, seed=3)
    scenes = source.scenes(range(1500))
    assert [scene.prompt for scene in scenes] == source.fetch(range(1500))["prompt"]
    assert all(description_of(scene.prompt) == scene.description for scene in scenes)
    assert all(map(agrees, scenes))
    radii = {size: [] for size in (*SIZES, None)}
    for scene in scenes:
        if scene.description.task in ("single_object", "colors"):
            radii[scene.description.objects[0].size].append(scene.objects[0].radius)
    assert max(radii["small"]) < 0.17
    assert min(radii["large"]) > 0.2
    assert min(radii[None]) < 0.17 < 0.2 < max(radii[None])


def test_objects_keep_apart_from_each_other_and_from_the_border() -> None:
    for scene in train_source(3000).scenes(range(3000)):
        for shown in scene.objects:
            assert shown.radius >= 0.15
            assert min(shown.x, shown.y, 1 - shown.x, 1 - shown.y) - shown.radius > 0.018
        for a, b in itertools.combinations(scene.objects, 2):
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
            assert gap > 0.047


def test_stated_backgrounds_and_colours_are_drawn() -> None:
    source = train_source(1200)
    images, scenes = source.fetch(range(1200))["image"], source.scenes(range(1200))
    level = images[:, :, 0, :].flatten(1).median(dim=1).values
    limits = {"white": (0.85, 1.0), "grey": (0.45, 0.65), "black": (0.0, 0.16)}
    seen = Counter()
    for index, scene in enumerate(scenes):
        background = scene.description.background
        if background is not None:
            low, high = limits[background]
            assert low <= level[index] <= high
            seen[background] += 1
        shown = scene.objects[0]
        if shown.kind != "ring":
            pixel = images[index, :, int(shown.y * 32), int(shown.x * 32)]
            nearest = (COLOUR_RGB - pixel).abs().sum(dim=1).argmin()
            assert COLOURS[int(nearest)] == shown.colour
    assert min(seen.values()) > 50
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("kind", "area"),
    [("circle", 3.14159), ("square", 3.0976), ("triangle", 1.73205), ("cross", 2.2576), ("ring", 2.29209)],
)
def test_covered_area(kind: str, area: float) -> None:
    covered = coverage(
        torch.tensor([KINDS.index(kind)]), torch.tensor([[0.4, 0.55]]), torch.tensor([0.3]), image_size=256
    )
    assert covered.shape == (1, 256, 256)
    assert float(covered.mean()) == pytest.approx(area * 0.09, rel=5e-3)
    columns, rows = covered[0].sum(dim=0).nonzero() / 256, covered[0].sum(dim=1).nonzero() / 256
    assert abs(float(columns.min() + columns.max()) / 2 - 0.4) < 0.01
    assert abs(float(rows.min() + rows.max()) / 2 - 0.55) < 0.01


def test_sizes_show_the_same_scene() -> None:
    small, large = (train_source(30, size=size).fetch(range(30)) for size in (32, 64))
    assert small["prompt"] == large["prompt"]
    pooled = torch.nn.functional.avg_pool2d(large["image"], 2)
    assert (pooled - small["image"]).abs().mean() < 0.01


def test_prompts_are_held_out_balanced_and_distinct() -> None:
    prompts = shapes_prompts(240)
    assert prompts == shapes_prompts(300)[:240]
    assert [entry.description.task for entry in prompts] == [TASKS[i % 6] for i in range(240)]
    assert len({entry.prompt for entry in prompts}) == 240
    for entry in prompts:
        assert description_of(entry.prompt) == entry.description
        assert is_held_out(entry.description)
    repeated = [entry.prompt for entry in shapes_prompts(6 * 46)[::6]]
    assert len(set(repeated)) == 45
    assert repeated[45] == repeated[0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^n: expected at least 1, got 0$"):
        shapes_prompts(0)
    with pytest.raises(ValueError, match=r"^data.train_samples: expected at least 1, got 0$"):
        Shapes(train_samples=0)
    with pytest.raises(ValueError, match=r"^data.val_samples: expected at least 1, got -1$"):
        Shapes(val_samples=-1)
    with pytest.raises(ValueError, match=r"^data.image_size: expected at least 16, got 8$"):
        Shapes(image_size=8)
    with pytest.raises(ValueError, match=r"^data.task_weights: expected tasks among single_object, .*, got 'colour'$"):
        Shapes(task_weights={"colour": 1.0})
    for weights in ({}, {"colors": 0.0}, {"colors": 1.0, "counting": -0.5}):
        with pytest.raises(
            ValueError, match=r"^data.task_weights: expected shares of at least 0, not all 0, got {.*}$"
        ):
            Shapes(task_weights=weights)
