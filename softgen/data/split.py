"""The stratified choice of the held-out samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from softgen.random import derive_seed

SPLIT_SEED = 0
"""Seed of every split. It is no argument: runs of different seeds must hold out the same samples."""


@dataclass(frozen=True, eq=False)
class SplitIndices:
    """Indices into one data set, both sorted, int64; together they hold every sample once."""

    train: Tensor
    val: Tensor


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError unless the fraction lies strictly between 0 and 1."""
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"data.val_fraction: expected a number between 0 and 1 (exclusive), got {val_fraction}")


def stratified_split(labels: Tensor, *, val_fraction: float) -> SplitIndices:
    """Hold out the same fraction of every class, chosen by a fixed seed.

    Args:
        labels: Class of each sample, (n,) int64. All zeros where there are no classes.
        val_fraction: Fraction to hold out, in (0, 1); each class gives its own share, rounded.

    Raises:
        ValueError: The fraction leaves one of the two parts empty.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(derive_seed(SPLIT_SEED, "split", label))
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(val_fraction * len(members))]]] = True
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"data.val_fraction: expected a fraction that leaves images on both sides, "
            f"got {val_fraction} of {len(labels)} images"
        )
    return SplitIndices(train=(~held_out).nonzero().flatten(), val=held_out.nonzero().flatten())
