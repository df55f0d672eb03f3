"""Signs of reward hacking, against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from softgen.metrics.hacking import colour_entropy, diversity, saturation

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _pixels(*colours: tuple[float, float, float]) -> Tensor:
    """One image of a single row, (1, 3, 1, W)."""
    return torch.tensor(colours).T[None, :, None, :]


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_by_hand(dtype: torch.dtype) -> None:
    red, black, grey, white, pale = (1.0, 0.0, 0.0), (0.0,) * 3, (0.5,) * 3, (1.0,) * 3, (0.5, 0.25, 0.375)
    for colours, expected in (((red,), 1.0), ((black, grey, white), 0.0), ((red, black, grey, pale), 0.375)):
        got = saturation(_pixels(*colours).to(dtype))
        assert got.shape == ()
        assert got.item() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_colour_entropy_by_hand(dtype: torch.dtype) -> None:
    dark, bright, red = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.875, 0.0, 0.0)
    for colours, shares in (
        ((dark, dark), (1.0,)),
        ((dark, bright), (0.5, 0.5)),
        ((dark, dark, dark, red), (0.75, 0.25)),
        ((bright, (0.875, 0.9375, 1.0)), (1.0,)),  # 1 shares the last bin
        ((dark, (0.12, 0.12, 0.12)), (1.0,)),  # the first bin ends at 1/8
        ((dark, (0.125, 0.0, 0.0)), (0.5, 0.5)),
        (((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)), (1 / 3,) * 3),  # the channels are told apart
    ):
        got = colour_entropy(_pixels(*colours).to(dtype))
        expected = -sum(share * math.log(share) for share in shares)
        assert (got.shape, got.dtype) == ((), torch.float32)
        assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_pixels_of_the_whole_batch_count_together() -> None:
    images = torch.stack([torch.full((3, 2, 2), level) for level in (0.1, 0.4, 0.6, 0.9)])
    assert [colour_entropy(image[None]).item() for image in images] == [0] * 4
    assert colour_entropy(images).item() == pytest.approx(math.log(4), rel=1e-6)


def test_limits_on_uniform_noise() -> None:
    images = torch.rand(8, 3, 128, 128)
    count = 8 * 128 * 128
    # E[1 - min/max] of three uniform draws is 2/3; its standard deviation a pixel is below 0.25.
    assert saturation(images).item() == pytest.approx(2 / 3, abs=4 * 0.25 / math.sqrt(count))
    # The plug-in estimate is below 3 log 8 by (512 - 1) / 2n on average.
    shortfall = 3 * math.log(8) - colour_entropy(images).item()
    assert shortfall == pytest.approx(511 / (2 * count), rel=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_diversity_by_hand(dtype: torch.dtype) -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=dtype)
    for features in (corners, corners.view(3, 1, 2), corners.view(3, 2, 1)):
        got = diversity(features)
        assert got.shape == ()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got.item() == 4  # (3 + 4 + 5) / 3
    assert diversity(corners[:2]).item() == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_diversity_of_copies_and_of_a_lone_sample_is_exactly_zero(dtype: torch.dtype) -> None:
    image = 100 * torch.rand(1, 16, 8).to(dtype)
    assert diversity(image.expand(40, -1, -1)).item() == 0  # above 25 rows a product of matrices would round
    assert diversity(image).item() == 0


def test_no_gradient_is_kept() -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert not any(sign(images).requires_grad for sign in (saturation, colour_entropy, diversity))


def test_one_image_a_class_has_no_diversity_within_classes() -> None:
    images = torch.randn(3, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    copies = images[labels]
    assert diversity(copies, labels).item() == 0
    assert diversity(copies).item() > 0
    pairs = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0], [9.0, 10.0]])
    assert diversity(pairs, torch.tensor([0, 0, 1, 1])).item() == 3
    assert diversity(pairs, torch.arange(4)).item() == 0
