"""Walking through a whole source once, outside a trainer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from softgen.data.base import SampleSource


def source_batches(source: SampleSource, *, batch_size: int = 256) -> Iterator[dict[str, Tensor]]:
    """Every sample of a source once, in its own order.

    Args:
        source: The samples.
        batch_size: Samples a batch; the last batch may hold fewer.

    Yields:
        The fields of each batch, stacked along the first dimension.
    """
    for start in range(0, len(source), batch_size):
        yield source.fetch(range(start, min(start + batch_size, len(source))))


def random_indices(count: int, *, limit: int | None = None) -> list[int]:
    """All of 0 to count - 1 or `limit` of them, in an order that is random and always the same.

    Data often lie class after class: what a few samples shall stand for is not seen in the first of them.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].tolist()
