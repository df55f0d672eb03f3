"""Shapes on the pixel grid: how much of each pixel a shape covers, and pictures of several shapes.

Lengths and positions are fractions of the image's side; x grows to the right, y downwards.
Shape legend: B pictures, M shapes, H pixels a side, 4 places for shapes in a picture.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softgen.data.scenes import COLOURS, KINDS

MAX_OBJECTS = 4

COLOUR_RGB = torch.tensor(
    (
        (0.90, 0.12, 0.12),  # red
        (0.12, 0.66, 0.20),  # green
        (0.12, 0.28, 0.90),  # blue
        (0.95, 0.84, 0.10),  # yellow
        (0.60, 0.16, 0.76),  # purple
        (0.12, 0.80, 0.86),  # cyan
    )
)
"""The pure colour of each name in `COLOURS`, (6, 3) in [0, 1]."""

BACKGROUND_GREY = torch.tensor((0.94, 0.55, 0.08))
"""The grey level of each name in `BACKGROUNDS`, (3,) in [0, 1]."""

# In units of a shape's radius, half the larger side of its bounding box but for the square.
SQUARE_HALF_SIDE = 0.88
CROSS_HALF_WIDTH = 0.34
RING_HOLE = 0.52
TRIANGLE_TOP, TRIANGLE_BOTTOM = -math.sqrt(3) / 2, math.sqrt(3) / 2

assert len(COLOUR_RGB) == len(COLOURS)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What B pictures show, in numbers.

    Attributes:
        kind: (B, 4) int64, indices into `KINDS`; -1 where there is no object.
        colour: (B, 4) int64, indices into `COLOURS`.
        rgb: (B, 4, 3), the objects' colours in [0, 1].
        centre: (B, 4, 2), x and y of the middle of each bounding box.
        radius: (B, 4).
        background: (B, 3), in [0, 1].
    """

    kind: Tensor
    colour: Tensor
    rgb: Tensor
    centre: Tensor
    radius: Tensor
    background: Tensor


def signed_distance(kind: int, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance to a shape's edge, negative inside; a lower bound of it beyond outer corners.

    Args:
        kind: Index into `KINDS`.
        x: Horizontal distance from the centre, any shape.
        y: Vertical distance from the centre, shape of `x`.
        radius: The shape's radius in the same unit, broadcast against `x`.
    """
    name = KINDS[kind]
    if name == "circle":
        return torch.hypot(x, y) - radius
    if name == "ring":
        middle, half_width = (1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2
        return (torch.hypot(x, y) - middle * radius).abs_() - half_width * radius
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    if name == "cross":
        across, along = torch.aminmax(torch.stack((x.abs(), y.abs())), dim=0)
        return torch.maximum(along - radius, across - CROSS_HALF_WIDTH * radius)
    # An equilateral triangle that points up: two slanted edges and the base.
    slanted = x.abs() * (math.sqrt(3) / 2) - (y - TRIANGLE_TOP * radius) * 0.5
    return torch.maximum(slanted, y - TRIANGLE_BOTTOM * radius)


def coverage(kind: Tensor, centre: Tensor, radius: Tensor, *, image_size: int) -> Tensor:
    """The share of each pixel that a shape covers, anti-aliased over one pixel.

    Args:
        kind: (M,) int64, indices into `KINDS`.
        centre: (M, 2), x and y.
        radius: (M,).
        image_size: Pixels a side, H.

    Returns:
        (M, H, H) float32 in [0, 1].
    """
    pixels = torch.arange(image_size, dtype=torch.float32) + 0.5
    covered = torch.empty(len(kind), image_size, image_size)
    for index in range(len(KINDS)):
        rows = (kind == index).nonzero().flatten()
        scaled = centre[rows] * image_size
        shape = (len(rows), image_size, image_size)
        x = (pixels[None, None, :] - scaled[:, 0, None, None]).expand(shape)
        y = (pixels[None, :, None] - scaled[:, 1, None, None]).expand(shape)
        distance = signed_distance(index, x, y, radius[rows, None, None] * image_size)
        covered[rows] = (0.5 - distance).clamp_(0, 1)
    return covered


def draw(pictures: Pictures, *, image_size: int) -> Tensor:
    """Draw every object on its background.

    Returns:
        (B, 3, H, H) float32 in [0, 1].
    """
    picture, place = (pictures.kind >= 0).nonzero(as_tuple=True)
    covered = coverage(
        pictures.kind[picture, place],
        pictures.centre[picture, place],
        pictures.radius[picture, place],
        image_size=image_size,
    )
    # Objects do not overlap, so that what they add to the background adds up.
    contrast = pictures.rgb[picture, place] - pictures.background[picture]
    images = pictures.background[:, :, None, None].repeat(1, 1, image_size, image_size)
    images.index_add_(0, picture, covered[:, None] * contrast[:, :, None, None])
    return images.clamp_(0, 1)
