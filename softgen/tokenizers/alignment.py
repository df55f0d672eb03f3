"""Aligning latent tokens with the features of a frozen model (SoftVQ-VAE, arXiv 2412.10958, eq. 6).

Shape legend: B batch, L latent tokens, P patches, D latent dimension, C feature dimension.
"""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

Alignment = Literal["repeat", "global", "avg_1d", "avg_1d_shuffle"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class AlignmentHead(nn.Sequential):
    """The small network from latents (..., D) to features (..., C).

    Args:
        latent_dim: D.
        hidden: Width between.
        feature_dim: C.
    """

    def __init__(self, *, latent_dim: int, hidden: int, feature_dim: int) -> None:
        super().__init__(
            nn.Linear(latent_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, feature_dim),
        )


def imagenet_range(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as models trained on ImageNet take them."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (images - mean) / std


def alignment_loss(
    latents: Tensor, features: Tensor, head: nn.Module, *, how: Alignment = "repeat", order: Tensor | None = None
) -> Tensor:
    """Minus the mean cosine between projected latents and features; scalar in [-1, 1].

    Args:
        latents: Quantised latents (B, L, D).
        features: The frozen model's patches (B, P, C).
        head: From D to C.
        how: What is compared. `repeat`: each latent with its P / L consecutive patches; `avg_1d`: with their mean;
            `avg_1d_shuffle`: with the mean of as many patches in another order; `global`: the mean latent with the mean
            patch.
        order: A permutation of the patches, (P,) int64, for `avg_1d_shuffle`.

    Raises:
        ValueError: If `how` is unknown, lacks its order, or L does not divide P for `repeat`.
    """
    if how not in get_args(Alignment):
        raise ValueError(f"alignment: expected one of {', '.join(get_args(Alignment))}, got {how!r}")
    length, patches = latents.shape[1], features.shape[1]
    if how == "global":
        return -F.cosine_similarity(head(latents.mean(dim=1)), features.mean(dim=1), dim=-1).mean()
    projected = head(latents)
    if how == "repeat":
        if patches % length:
            raise ValueError(f"alignment: expected latents whose number divides the {patches} patches, got {length}")
        return -F.cosine_similarity(projected.repeat_interleave(patches // length, dim=1), features, dim=-1).mean()
    if how == "avg_1d_shuffle":
        if order is None:
            raise ValueError("alignment: expected an order of the patches for avg_1d_shuffle, got none")
        features = features[:, order]
    pooled = F.adaptive_avg_pool1d(features.transpose(1, 2), length).transpose(1, 2)
    return -F.cosine_similarity(projected, pooled, dim=-1).mean()
