import math

import pytest
import torch

from softgen.masking import MaskLaw, Schedule, draw_mask_ratio, exact_mask, mask_counts, masked_fraction

EIGHTHS = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 0.75, 0.5, 0]),
        ("square", [1, 15 / 16, 0.75, 0]),
        ("cosine", [1, math.cos(math.pi / 8), math.sqrt(0.5), 0]),
        ("arccos", [1, math.acos(0.25) * 2 / math.pi, 2 / 3, 0]),
        ("root", [1, 0.5, 1 - math.sqrt(0.5), 0]),
    ],
)
def test_schedules_at_known_points(schedule: Schedule, expected: list[float]) -> None:
    assert masked_fraction(schedule, EIGHTHS).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ("linear", [0, 0.25, 0.5, 1]),
        ("square", [0, 1 / 16, 0.25, 1]),
        ("cosine", [1, math.cos(math.pi / 8), math.sqrt(0.5), 0]),
        ("arccos", [1, math.acos(0.25) * 2 / math.pi, 2 / 3, 0]),
    ],
)
def test_mask_laws_at_known_points(law: MaskLaw, expected: list[float]) -> None:
    assert draw_mask_ratio(law, EIGHTHS).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_mage_law_is_the_truncated_normal() -> None:
    # The midpoints of 100,000 equal cells: a quadrature of the law, not a random sample.
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    ratios = draw_mask_ratio("mage", uniform)
    assert draw_mask_ratio("mage", torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.5, 1.0], abs=1e-5)
    assert ratios.min() >= 0.5
    assert ratios.max() <= 1
    mean, std = 0.55, 0.25
    low, high = (0.5 - mean) / std, (1 - mean) / std
    mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    density = [math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    shift = (density[0] - density[1]) / mass
    assert ratios.mean().item() == pytest.approx(mean + std * shift, abs=1e-4)
    variance = std**2 * (1 + (low * density[0] - high * density[1]) / mass - shift**2)
    assert ratios.var().item() == pytest.approx(variance, rel=1e-3)


def test_unknown_names_are_refused() -> None:
    expected = r"^schedule: expected one of linear, square, cosine, arccos, root, got 'log'$"
    with pytest.raises(ValueError, match=expected):
        masked_fraction("log", EIGHTHS)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^mask_law: expected one of linear, square, cosine, arccos, mage, got 'root'$"
    ):
        draw_mask_ratio("root", EIGHTHS)  # type: ignore[arg-type]


def test_counts_round_and_mask_at_least_one_site() -> None:
    ratios = torch.tensor([0.0, 0.01, 0.14, 0.16, 0.6, 0.999, 1.0])
    assert mask_counts(ratios, 10).tolist() == [1, 1, 1, 2, 6, 10, 10]
    assert mask_counts(ratios, 10).dtype == torch.int64
    assert mask_counts(torch.tensor([0.0, 1.0]), 1).tolist() == [1, 1]


def test_masks_count_exactly() -> None:
    counts = torch.arange(9)
    mask = exact_mask(counts, torch.rand(9, 8))
    assert mask.dtype == torch.bool
    assert mask.sum(-1).tolist() == counts.tolist()


def test_every_set_of_positions_is_equally_likely() -> None:
    n = 30_000
    mask = exact_mask(torch.full((n,), 2), torch.rand(n, 4))
    sets = torch.bincount((mask * torch.tensor([8, 4, 2, 1])).sum(-1), minlength=16)
    used = [3, 5, 6, 9, 10, 12]
    assert sets[used].sum().item() == n
    # Standard deviation of each share: 0.0022.
    torch.testing.assert_close(sets[used] / n, torch.full((6,), 1 / 6), rtol=0, atol=0.01)


def test_masks_follow_the_order_of_the_draws() -> None:
    uniform = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1]])
    expected = [[False, True, True], [False, False, True]]
    assert exact_mask(torch.tensor([2, 1]), uniform).tolist() == expected
