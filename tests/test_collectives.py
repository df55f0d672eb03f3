from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from softgen.distributed import broadcast_from_rank_zero, masked_mean, mean_over_ranks, sum_over_ranks

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [10.0, 11.0, 12.0]])
MASK = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)


def test_one_process_changes_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    for collective in (sum_over_ranks, mean_over_ranks, broadcast_from_rank_zero):
        assert collective(x) is x


def test_the_masked_mean() -> None:
    assert masked_mean(VALUES, MASK).item() == pytest.approx(VALUES[MASK].mean().item())
    assert masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0
    weights = torch.rand(4, 3)
    expected = (VALUES * weights).sum() / weights.sum()
    assert masked_mean(VALUES, weights).item() == pytest.approx(expected.item())


def test_the_gradient_of_the_masked_mean() -> None:
    values = VALUES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_mean(values, MASK), values)
    torch.testing.assert_close(gradient, MASK / MASK.sum())


def _worker(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    local = VALUES[rows]
    results = {
        "sum": sum_over_ranks(local),
        "mean": mean_over_ranks(local),
        "first": broadcast_from_rank_zero(local),
        "masked": masked_mean(local, MASK[rows]),
        "untouched": local,
    }
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_agree(tmp_path: Path) -> None:
    multiprocessing.start_processes(_worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for results in (first, second):
        assert torch.equal(results["sum"], VALUES[:2] + VALUES[2:])
        assert torch.equal(results["mean"], (VALUES[:2] + VALUES[2:]) / 2)
        assert torch.equal(results["first"], VALUES[:2])
    assert torch.equal(second["untouched"], VALUES[2:])
    # DDP averages gradients: the mean of the two losses is the mean over the global batch.
    average = (first["masked"] + second["masked"]) / 2
    assert average.item() == pytest.approx(VALUES[MASK].mean().item())
