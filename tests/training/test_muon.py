"""Muon: one polynomial of the singular values, the same step as torch's, in whatever batches."""

import pytest
import torch
from torch import Tensor, nn

from softgen.training import muon
from softgen.training.muon import Muon, orthogonalise

SHAPES = ((6, 10), (10, 6), (8, 8), (6, 10), (8, 8), (1, 4))


def _matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _stepped(optimizer_class: type[torch.optim.Optimizer], steps: int = 4) -> list[Tensor]:
    parameters = [nn.Parameter(matrix) for matrix in _matrices(0)]
    optimizer = optimizer_class(parameters, lr=0.1, weight_decay=0.3)  # type: ignore[call-arg]
    for step in range(steps):
        for parameter, gradient in zip(parameters, _matrices(1 + step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("shape", [(5, 5), (5, 7), (7, 5), (5, 9), (9, 5), (1, 4), (8, 64), (64, 8)])
def test_applies_its_polynomial_to_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalise(matrices), left @ torch.diag_embed(values) @ right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("columns", [16, 64])
def test_float32_holds_gradients_of_low_rank(rank: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 16, rank, generator=generator) @ torch.randn(3, rank, columns, generator=generator)
    torch.testing.assert_close(orthogonalise(matrices).double(), orthogonalise(matrices.double()), rtol=0, atol=1e-4)
    assert torch.equal(orthogonalise(torch.zeros(1, 16, columns)), torch.zeros(1, 16, columns))


def test_takes_the_steps_of_torchs() -> None:
    """Which computes in bfloat16."""
    for ours, theirs in zip(_stepped(Muon), _stepped(torch.optim.Muon), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)
    for ours, start in zip(_stepped(Muon), _matrices(0), strict=True):
        assert (ours - start).abs().max() > 0.05


def test_large_matrices_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together = _stepped(Muon)
    monkeypatch.setattr(muon, "BATCH", 1)
    for one, other in zip(together, _stepped(Muon), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_goes_on_from_the_state_of_torchs() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 4)) for _ in range(3)]
    straight, theirs, resumed = Muon(parameters[:1]), torch.optim.Muon(parameters[1:2]), Muon(parameters[2:])
    gradients = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for parameter in parameters:
        parameter.grad = gradients[0]
    straight.step()
    theirs.step()
    resumed.load_state_dict({**theirs.state_dict(), "param_groups": straight.state_dict()["param_groups"]})
    parameters[2].data.copy_(parameters[0].data)
    parameters[0].grad = parameters[2].grad = gradients[1]
    straight.step()
    resumed.step()
    assert torch.equal(parameters[2], parameters[0])


def test_matrices_without_gradient_stay() -> None:
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = Muon(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(parameters[1], torch.ones(2, 3))
    assert (parameters[0] < 1).all()
    assert parameters[1] not in optimizer.state
