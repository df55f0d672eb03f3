"""Finding the shapes of a picture by a program: which kind, which colour, where.

Shape legend: B pictures, H and W pixels, C colours, M candidates, K kinds.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.data.scenes import COLOURS, KINDS, ShownObject
from softgen.data.shape_drawing import COLOUR_RGB, coverage

MIN_CHROMA = 0.15
"""Pixels that lie closer to the background in the plane of hues have no colour."""
MIN_AREA = 0.01
"""Candidates that cover less of the picture are specks. The smallest object of `Shapes` covers 0.05."""
MIN_OVERLAP = 0.7
"""Candidates that overlap less with the best shape (intersection over union) are of no kind."""
BLURS = (0.0, 0.7, 1.2)
"""Standard deviations in pixels of the blurs with which shapes are tried: decoders of tokens blur."""

_CHUNK = 128
_REACH = 2  # pixels that a soft edge may reach beyond a candidate

# Two axes at right angles to the grey one: in their plane a colour's direction is its hue.
_HUE_PLANE = torch.tensor(((1.0, -0.5, -0.5), (0.0, math.sqrt(0.75), -math.sqrt(0.75))))
# Neighbours in the plane of one picture, diagonal ones too, and none in the pictures before and after.
_NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))]).astype(bool)


@torch.no_grad()
def detect_shapes(images: Tensor) -> list[list[ShownObject]]:
    """The shapes that each picture shows, largest first.

    The background is the median colour of the border. Pixels that have a colour go to the nearest hue; connected
    pixels of one hue are a candidate, unless they are specks. A candidate's kind is that of the shape, drawn at its
    centre of mass, as wide and as blurred, that it overlaps with best; one that fits no shape is dropped.

    Args:
        images: (B, 3, H, W) in [0, 1], H = W.

    Raises:
        ValueError: The images have another shape or a value that is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected shape (B, 3, H, H), got {tuple(images.shape)}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images: expected finite values in [0, 1], got others")
    chunks = torch.split(images.detach().float().cpu().clamp(0, 1), _CHUNK)
    return [objects for chunk in chunks for objects in _detect(chunk)]


def _detect(images: Tensor) -> list[list[ShownObject]]:
    size = images.shape[-1]
    hues = _hue_contrast(images)
    labels, image, hue = _candidates(hues)
    found: list[list[ShownObject]] = [[] for _ in images]
    if len(image) == 0:
        return found
    fit = _fit(*_amounts(hues, labels, image))
    for row in (fit.overlap >= MIN_OVERLAP).nonzero().flatten().tolist():
        x, y, radius = (torch.cat([fit.centre[row], fit.radius[row : row + 1]]) / size).tolist()
        shown = ShownObject(KINDS[int(fit.kind[row])], COLOURS[int(hue[row])], x=x, y=y, radius=radius)
        found[int(image[row])].append(shown)
    return [sorted(objects, key=lambda shown: -shown.radius) for objects in found]


def _hue_contrast(images: Tensor) -> Tensor:
    """How far each pixel lies from the background in the plane of hues, (B, 2, H, W).

    Grey cancels out, and a pixel that is half covered lies half as far, in the same direction.
    """
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 1:-1, 0], images[..., 1:-1, -1]], dim=-1)
    contrast = images - border.median(dim=-1).values[..., None, None]
    return torch.einsum("pc,bchw->bphw", _HUE_PLANE, contrast)


def _candidates(hues: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Connected pixels of one hue.

    Args:
        hues: (B, 2, H, W).

    Returns:
        Labels (B, H, W) int64, 0 where there is no candidate, else the candidate's row + 1; and for each of the M
        candidates its image and its colour, (M,) int64.
    """
    from scipy import ndimage

    prototypes = F.normalize(COLOUR_RGB @ _HUE_PLANE.T, dim=1)
    nearest = torch.einsum("cp,bphw->bchw", prototypes, hues).argmax(dim=1)
    is_hue = F.one_hot(nearest, len(COLOURS)).movedim(-1, 1).bool()
    # Half of what the colour's strongest pixels have: the middle of a soft edge, however pale the colour.
    strength = F.avg_pool2d(hues, 3, stride=1, padding=1).norm(dim=1)
    peak = (strength[:, None] * is_hue).amax(dim=(2, 3), keepdim=True)
    strong = is_hue & (hues.norm(dim=1)[:, None] >= (peak / 2).clamp(min=MIN_CHROMA))

    size = hues.shape[-1]
    found, count = ndimage.label(strong.flatten(0, 1).numpy(), structure=_NEIGHBOURS)
    planes = torch.from_numpy(found).long()
    areas = torch.bincount(planes.flatten(), minlength=count + 1)
    kept = areas >= MIN_AREA * size**2
    kept[0] = False
    renumbered = torch.zeros_like(areas)
    renumbered[kept] = torch.arange(1, int(kept.sum()) + 1)
    planes = renumbered[planes]
    plane_of = torch.zeros(int(kept.sum()) + 1, dtype=torch.int64)
    plane, y, x = planes.nonzero(as_tuple=True)
    plane_of[planes[plane, y, x]] = plane
    # A pixel has one hue, so that the planes of an image do not overlap.
    labels = planes.view(-1, len(COLOURS), size, size).amax(dim=1)
    return labels, plane_of[1:] // len(COLOURS), plane_of[1:] % len(COLOURS)


def _amounts(hues: Tensor, labels: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """How much of each pixel each candidate covers, soft edges included, in any unit.

    Args:
        hues: (B, 2, H, W).
        labels: (B, H, W), from `_candidates`.
        image: (M,), the candidates' images.

    Returns:
        Amounts (M, H, W), 0 far from the candidate, of either sign where there is noise; and whether a pixel counts
        (M, H, W): those of other candidates, or near to two, do not.
    """
    label = torch.arange(1, len(image) + 1)[:, None, None]
    own = labels[image] == label
    near = F.max_pool2d(own[:, None].float(), 2 * _REACH + 1, stride=1, padding=_REACH)[:, 0]
    neighbours = torch.zeros(hues.shape[0], *near.shape[1:]).index_add_(0, image, near)
    counts = own | ((labels[image] == 0) & (neighbours[image] < 2))
    pixels = hues[image]
    direction = F.normalize((pixels * own[:, None]).sum(dim=(2, 3)), dim=1)
    return torch.einsum("mphw,mp->mhw", pixels, direction) * near * counts, counts


@dataclass(frozen=True, eq=False)
class _Fit:
    """The best shape of each candidate: kind (M,), centre (M, 2), radius (M,) in pixels, overlap (M,) in [0, 1]."""

    kind: Tensor
    centre: Tensor
    radius: Tensor
    overlap: Tensor


def _fit(amount: Tensor, counts: Tensor) -> _Fit:
    """Try every kind with every blur, at the candidate's own centre of mass and spread.

    Args:
        amount: (M, H, W), from `_amounts`.
        counts: (M, H, W) bool, from `_amounts`.
    """
    size = amount.shape[-1]
    rows = torch.arange(len(amount))
    middle, spread = _moments(amount)
    centres, radii, overlaps = [], [], []
    for kind, (mass_below, spread_of_kind) in enumerate(_moments_of_kinds()):
        for blur in BLURS:
            # A blur and a pixel's own square add their variances, along both axes.
            radius = ((spread - 2 * blur**2 - 1 / 6).clamp(min=1.0) / spread_of_kind).sqrt()
            centre = middle - radius[:, None] * torch.tensor((0.0, mass_below))
            shape = coverage(torch.full_like(rows, kind), centre / size, radius / size, image_size=size)
            shape = _blurred(shape, blur) * counts
            centres.append(centre)
            radii.append(radius)
            overlaps.append(_overlap(shape, amount))
    best = torch.stack(overlaps).argmax(dim=0)
    return _Fit(
        kind=best // len(BLURS),
        centre=torch.stack(centres)[best, rows],
        radius=torch.stack(radii)[best, rows],
        overlap=torch.stack(overlaps)[best, rows],
    )


def _blurred(shape: Tensor, blur: float) -> Tensor:
    """A Gaussian blur of (M, H, H) by a standard deviation in pixels."""
    if blur == 0:
        return shape
    pixels = torch.arange(shape.shape[-1], dtype=torch.float32)
    weights = torch.softmax(-(pixels[:, None] - pixels).square() / (2 * blur**2), dim=1)
    return weights @ shape @ weights.T


def _overlap(shape: Tensor, amount: Tensor) -> Tensor:
    """Intersection over union (M,) of shapes and amounts (M, H, W), which are scaled to fit by least squares."""
    strength = (amount * shape).sum(dim=(1, 2)) / shape.square().sum(dim=(1, 2)).clamp(min=1.0)
    scaled = (amount / strength.clamp(min=torch.finfo(strength.dtype).eps)[:, None, None]).clamp(min=0)
    return torch.minimum(shape, scaled).sum(dim=(1, 2)) / torch.maximum(shape, scaled).sum(dim=(1, 2))


def _moments(amount: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of mass (M, 2) as x and y, and mean squared distances from them (M,), in pixels."""
    pixels = torch.arange(amount.shape[-1], dtype=torch.float32) + 0.5
    total = amount.sum(dim=(1, 2))[:, None]
    across, down = amount.sum(dim=1) / total, amount.sum(dim=2) / total
    middle = torch.stack([across @ pixels, down @ pixels], dim=1)
    return middle, (across + down) @ pixels.square() - middle.square().sum(dim=1)


@cache
def _moments_of_kinds() -> list[tuple[float, float]]:
    """How far each kind's centre of mass lies below its box's middle, and its mean squared distance, at radius 1."""
    size, radius = 256, 100.0
    drawn = coverage(
        torch.arange(len(KINDS)),
        torch.full((len(KINDS), 2), 0.5),
        torch.full((len(KINDS),), radius / size),
        image_size=size,
    )
    middle, spread = _moments(drawn)
    below = (middle[:, 1] - size / 2) / radius
    return list(zip(below.tolist(), (spread / radius**2).tolist(), strict=True))
