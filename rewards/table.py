"""A table of images, prompts and rewards."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rewards.errors import one_line
from rewards.registry import build, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.base import Reward

T = TypeVar("T")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def print_scores(
    images: Sequence[Path],
    *,
    rewards: Sequence[tuple[str, dict[str, Any]]],
    prompts: Sequence[str],
    paired: bool = False,
    device: str = "cpu",
    tabs: bool = False,
) -> None:
    """Print a table: a row for each image and prompt, the scores in front.

    Args:
        images: Image files, each scored at its own size.
        rewards: A name of `rewards.available()` or the dotted path of a class, and its arguments. Opened one after the
            other, so that one at a time is in memory.
        prompts: Every image is scored under each; for a reward that takes labels, class names or numbers.
        paired: Score the first image under the first prompt, the second under the second, and so on.
        device: Where to compute.
        tabs: Separate columns by tabs instead of filling them up with spaces.

    Raises:
        ValueError: A file is not an image, or a reward or its arguments do not fit.
    """
    if paired and len(prompts) != len(images):
        raise ValueError(f"--paired: expected a prompt for each of the {len(images)} images, got {len(prompts)}")
    if missing := [str(path) for path in images if not path.is_file()]:
        raise ValueError(f"images: expected files, got {', '.join(missing)}")
    for name, options in rewards:
        prepare(name, **options)
    import torch

    from rewards.compute import present_device

    target = present_device(device, key="--device")
    pixels = [read_image(path).to(target) for path in images]
    columns: dict[str, list[str]] = {}
    for name, options in rewards:
        judge = build(name, **options).to(target).eval()
        if judge.name in columns:
            raise ValueError(
                f"--reward: expected names that are unique, got {judge.name!r} twice (see the option name)"
            )
        with torch.no_grad():
            scores = [_score(judge, image, prompt) for image, prompt in _rows(pixels, prompts, paired=paired)]
        columns[judge.name] = [f"{float(score):.6f}" for score in scores]
        del judge  # before the next one is opened
    named = [(str(path), prompt) for path, prompt in _rows(images, prompts, paired=paired)]
    rows = [(*columns, "image", "prompt")]
    rows += [(*scores, *row) for *scores, row in zip(*columns.values(), named, strict=True)]
    if tabs:
        print("\n".join("\t".join(row) for row in rows))
    else:
        print_table(rows)


def read_image(path: Path) -> "Tensor":
    """Read an image file as (3, H, W) float32 in [0, 1], turned as its EXIF says; grey is repeated to 3 channels.

    Raises:
        ValueError: The file cannot be read.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            pixels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # PIL reports a broken png by SyntaxError
        raise ValueError(f"images: expected an image, got '{path}', which cannot be read ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _score(judge: "Reward", image: "Tensor", prompt: str) -> "Tensor":
    try:
        return judge(image[None], [prompt])
    except RuntimeError as error:
        size = f"{image.shape[1]}x{image.shape[2]}"
        raise ValueError(
            f"reward {judge.name}: expected to score images of {size}, got an error ({one_line(error)})"
        ) from error


def _rows(images: Sequence[T], prompts: Sequence[str], *, paired: bool) -> Iterator[tuple[T, str]]:
    """Each image with each prompt, or with its own."""
    if paired:
        yield from zip(images, prompts, strict=True)
    else:
        yield from ((image, prompt) for image in images for prompt in prompts)
