"""Signs that a reward is being climbed by a trick instead of by better images.

A generator that exploits a reward tends to over-saturated colours, to few colours, or to one image a class; none of
the three shows in the reward itself. All are cheap enough for every training step.
"""

import torch
from torch import Tensor

_BINS = 8


@torch.no_grad()
def saturation(images: Tensor) -> Tensor:
    """Mean saturation of the pixels, (max - min) / max over the channels, scalar in [0, 1]; 0 for grey images.

    Args:
        images: (B, 3, H, W) in [0, 1].
    """
    high, low = images.amax(dim=1), images.amin(dim=1)
    return ((high - low) / high.clamp(min=torch.finfo(images.dtype).eps)).mean()


@torch.no_grad()
def colour_entropy(images: Tensor) -> Tensor:
    """Entropy of the pixels' colours in nats, over 8 bins a channel: scalar in [0, 3 log 8], float32.

    Args:
        images: (B, 3, H, W) in [0, 1]; pixels of the whole batch count together.
    """
    bins = (images * _BINS).long().clamp(0, _BINS - 1)
    colours = (bins[:, 0] * _BINS + bins[:, 1]) * _BINS + bins[:, 2]
    # index_add and not bincount, which makes a GPU wait to learn its own output's size.
    # Integers: float32 stops counting at 2^24 pixels.
    colours = colours.flatten()
    counts = torch.zeros(_BINS**3, dtype=torch.long, device=images.device)
    counts.index_add_(0, colours, torch.ones_like(colours))
    entropy: Tensor = torch.special.entr(counts / colours.numel()).sum()
    return entropy


@torch.no_grad()
def diversity(features: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean Euclidean distance between the features of two samples, scalar; 0 where there is no pair.

    Args:
        features: (B, ...), flattened to one vector a sample.
        labels: Classes (B,): only pairs of one class count, so that one image a class shows; None counts all pairs.
    """
    rows = features.flatten(1)
    if not rows.is_floating_point() or rows.dtype.itemsize < 4:
        rows = rows.float()
    pairs = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    if labels is not None:
        pairs &= labels.unsqueeze(0) == labels.unsqueeze(1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances * pairs).sum() / pairs.sum().clamp(min=1)
