"""Collectives that are the identity in a single process."""

import torch
from torch import Tensor
from torch import distributed as dist


def _is_parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; no gradient flows."""
    if not _is_parallel():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all processes; no gradient flows."""
    return sum_over_ranks(x) / dist.get_world_size() if _is_parallel() else x


def max_over_ranks(x: Tensor) -> Tensor:
    """The elementwise maximum of `x` over all processes; no gradient flows."""
    if not _is_parallel():
        return x
    largest = x.detach().clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def broadcast_from_rank_zero(x: Tensor) -> Tensor:
    """Rank 0's `x`, on every process; no gradient flows."""
    if not _is_parallel():
        return x
    shared = x.detach().clone().contiguous()
    dist.broadcast(shared, src=0)
    return shared


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is set, over the global batch.

    The local sum is divided by the mean count over processes, so that the average of the processes' gradients, which
    DDP takes, is the gradient of the global mean.

    Args:
        values: Any shape.
        mask: Weights of that shape; a bool or a float tensor.
    """
    weights = mask.to(values.dtype)
    count = mean_over_ranks(weights.sum())
    return (values * weights).sum() / count.clamp(min=torch.finfo(values.dtype).tiny)
