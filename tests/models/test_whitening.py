"""Whitened code vectors: what few codes differ in counts as much as what most of them do."""

import pytest
import torch
from torch import Tensor

from softgen.models.blocks import whiten


@pytest.fixture
def vectors() -> Tensor:
    """Vectors that differ most along a direction that is no axis."""
    torch.manual_seed(0)
    return torch.randn(200, 5) * torch.tensor([10.0, 1, 1, 0.5, 0.5]) @ torch.randn(5, 5) + 7


def test_whitened_dimensions_have_variance_one_and_are_uncorrelated(vectors: Tensor) -> None:
    white = whiten(vectors)
    torch.testing.assert_close(white.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(white.mT @ white / 200, torch.eye(5), rtol=0, atol=1e-4)


def test_vectors_are_turned_as_little_as_possible(vectors: Tensor) -> None:
    centred = (vectors - vectors.mean(0)).double()
    map_ = torch.linalg.lstsq(centred, whiten(vectors).double()).solution
    torch.testing.assert_close(map_, map_.mT, rtol=1e-3, atol=1e-3)
    assert torch.linalg.eigvalsh(map_).min() > 0


def test_a_direction_that_no_vector_takes_is_left_out(vectors: Tensor) -> None:
    flat = torch.cat([vectors, torch.full((200, 1), 3.0), vectors[:, :1]], dim=1)  # a constant, and a copy
    white = whiten(flat)
    assert white.isfinite().all()
    torch.testing.assert_close(white[:, 5], torch.zeros(200), rtol=0, atol=1e-4)
    assert torch.linalg.matrix_rank(white) == 5
    torch.testing.assert_close(white.square().mean(), torch.tensor(5 / 7), rtol=1e-4, atol=0)


def test_half_precision_is_whitened_too(vectors: Tensor) -> None:
    assert whiten(vectors.bfloat16()).dtype == torch.bfloat16
