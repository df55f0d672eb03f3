import math

import pytest
import torch
from torch import Tensor

from softgen.relaxation import (
    Distance,
    auto_two_tau_squared,
    neighbour_distribution,
    neighbour_logits,
    perplexity,
)


def brute_force(z: Tensor, codebook: Tensor, two_tau_squared: float, distance: Distance) -> Tensor:
    rows = []
    for latent in z.double():
        scores = []
        for code in codebook.double():
            if distance == "l2":
                d = sum((a - b) ** 2 for a, b in zip(latent.tolist(), code.tolist(), strict=True))
            else:
                d = -math.fsum((latent * code).tolist())
                if distance == "cosine":
                    d /= math.hypot(*latent.tolist()) * math.hypot(*code.tolist())
            scores.append(math.exp(-d / two_tau_squared))
        rows.append([score / math.fsum(scores) for score in scores])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("distance", ["l2", "dot", "cosine"])
@pytest.mark.parametrize("two_tau_squared", [0.3, 2.0])
def test_q_against_brute_force(distance: Distance, two_tau_squared: float) -> None:
    z, codebook = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    expected = brute_force(z, codebook, two_tau_squared, distance)
    q = neighbour_distribution(z, codebook, two_tau_squared=two_tau_squared, distance=distance)
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=1e-15)
    single = neighbour_distribution(
        z.float().view(2, 3, 3), codebook.float(), two_tau_squared=two_tau_squared, distance=distance
    )
    assert (single.shape, single.dtype) == ((2, 3, 9), torch.float32)
    torch.testing.assert_close(single.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-6)


def test_the_l2_distance_is_squared_and_tau_is_not_the_argument() -> None:
    q = neighbour_distribution(torch.zeros(1, 1), torch.tensor([[1.0], [2.0]]), two_tau_squared=0.5)
    assert (q[0, 0] / q[0, 1]).item() == pytest.approx(math.exp((4 - 1) / 0.5), rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_a_codebook_far_from_zero_has_the_same_q(precision: str) -> None:
    z, codebook = 0.3 * torch.randn(200, 16), 0.3 * torch.randn(256, 16)
    expected = neighbour_distribution(z.double(), codebook.double(), two_tau_squared=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "float32"):
        q = neighbour_distribution(z + 10, codebook + 10, two_tau_squared=0.5)
    assert q.dtype == torch.float32
    assert ((q.double() - expected).abs().sum(-1) / 2).mean().item() <= 1e-5


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_a_tau_towards_zero_gives_the_nearest_code(distance: Distance) -> None:
    codebook = torch.randn(9, 3)
    z = codebook + 0.01 * torch.randn(9, 3)
    q = neighbour_distribution(z, codebook, two_tau_squared=1e-5, distance=distance)
    torch.testing.assert_close(q, torch.eye(9), rtol=0, atol=1e-6)


def test_auto_is_a_multiple_of_the_median_gap() -> None:
    codebook = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]) + 50
    gaps = torch.tensor([1.0, 2.0, 5.0])
    z = codebook + gaps.sqrt().unsqueeze(-1) * torch.tensor([0.6, 0.8])
    assert auto_two_tau_squared(z, codebook) == pytest.approx(3.5 * 2, rel=1e-4)
    assert auto_two_tau_squared(z, codebook, factor=1.0) == pytest.approx(2, rel=1e-4)


def test_auto_of_a_similarity_is_the_gap_to_the_ten_best() -> None:
    z, codebook = torch.randn(7, 4), torch.randn(30, 4)
    gaps = [row[0] - sum(row[:10]) / 10 for row in (z @ codebook.T).sort(descending=True).values.tolist()]
    got = auto_two_tau_squared(z, codebook, distance="dot", factor=2.0)
    assert got == pytest.approx(2 * sorted(gaps)[3], rel=1e-5)


def test_auto_is_positive_for_latents_on_their_codes() -> None:
    codebook = torch.randn(8, 3)
    assert auto_two_tau_squared(codebook, codebook) > 0


def test_perplexity_counts_the_codes() -> None:
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(perplexity(probs), torch.tensor([4.0, 1.0, 2.0]))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_two_tau_squared_is_checked(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^two_tau_squared: expected a number above 0, got {value}$"):
        neighbour_logits(torch.zeros(1, 2), torch.zeros(3, 2), two_tau_squared=value)


def test_the_distance_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^distance: expected one of l2, dot, cosine, got 'l1'$"):
        neighbour_logits(torch.zeros(1, 2), torch.zeros(3, 2), two_tau_squared=1.0, distance="l1")  # type: ignore[arg-type]


def test_the_dimensions_are_checked() -> None:
    message = r"^latents: expected shape \(N, 2\) as codebook, got \(1, 3\)$"
    with pytest.raises(ValueError, match=message):
        neighbour_logits(torch.zeros(1, 3), torch.zeros(3, 2), two_tau_squared=1.0)


def test_latents_that_are_not_finite_are_refused() -> None:
    z = torch.tensor([[0.0, math.nan]])
    with pytest.raises(ValueError, match=r"^latents: expected finite values, got NaN or infinity$"):
        neighbour_logits(z, torch.zeros(3, 2), two_tau_squared=1.0)


def test_auto_from_codes_alone_looks_at_the_other_codes() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [9.0, 9.0]])
    tokens = torch.tensor([0, 1, 2, 2, 2])
    got = auto_two_tau_squared(codebook[tokens], codebook, factor=2.0, own_codes=tokens)
    assert got == pytest.approx(2 * 9.0)  # of 1, 1, 9, 9, 9
    similar = auto_two_tau_squared(codebook[tokens], codebook, distance="dot", factor=2.0, own_codes=tokens)
    # The other codes' products with (0, 3) are 0, 0, 27.
    assert similar == pytest.approx(2 * (27 - 9))


def test_auto_from_codes_alone_passes_over_copies() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [9.0, 9.0]]).repeat(2, 1)
    tokens = torch.tensor([0, 1, 2, 2, 2])
    got = auto_two_tau_squared(codebook[tokens], codebook, factor=2.0, own_codes=tokens)
    assert got == pytest.approx(2 * 9.0)  # as without the copies


def test_auto_of_codes_that_are_all_copies_is_positive() -> None:
    codebook = torch.ones(4, 2)
    assert 0 < auto_two_tau_squared(codebook, codebook, own_codes=torch.arange(4)) < 1e-3


def test_auto_of_many_codes_goes_block_by_block() -> None:
    z, codebook = torch.randn(50, 3), torch.randn(200_000, 3)
    nearest = torch.cdist(z.double(), codebook.double()).square().amin(-1)
    assert auto_two_tau_squared(z, codebook, factor=1.0) == pytest.approx(nearest.sort().values[24].item(), rel=1e-2)
