import math

import pytest
import torch
from torch.nn import functional as F

from softgen.tokenizers.codebook import EMACodebook


def unit(*angles: float) -> torch.Tensor:
    """Unit vectors of the plane, by degrees."""
    radians = torch.tensor(angles) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def codebook(*angles: float) -> EMACodebook:
    book = EMACodebook(num_codes=len(angles), code_dim=2)
    book.reset_to(unit(*angles))
    return book


def test_one_update_against_a_hand_computation() -> None:
    book = codebook(0, 90)
    latents = unit(10, 20, 80)
    usage = book.update(latents, book.nearest(latents), candidates=torch.zeros(2, 2), decay=0.9, dead_below=0.05)
    # counts: 0.9 * 1 + 0.1 * (2, 1); sums: 0.9 * code + 0.1 * the sum of the code's latents.
    torch.testing.assert_close(book.counts, torch.tensor([1.1, 1.0]))
    sums = torch.stack([0.9 * unit(0)[0] + 0.1 * unit(10, 20).sum(0), 0.9 * unit(90)[0] + 0.1 * unit(80)[0]])
    torch.testing.assert_close(book.sums, sums)
    torch.testing.assert_close(book.codes, F.normalize(sums, dim=-1))
    assert (usage.used.item(), usage.revived.item()) == (1.0, 0)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert usage.perplexity.item() == pytest.approx(math.exp(entropy), rel=1e-5)


def test_the_codes_converge_to_the_direction_of_their_latents() -> None:
    book, latents = codebook(0, 90), unit(20, 30, 100, 120)
    for _ in range(200):
        book.update(latents, book.nearest(latents), candidates=torch.zeros(2, 2), decay=0.9, dead_below=0.05)
    torch.testing.assert_close(book.codes, unit(25, 110), rtol=0, atol=1e-4)


def test_dead_codes_are_revived_at_their_candidates() -> None:
    book, latents = codebook(0, 120, 240), unit(0, 5, 120, 125)
    candidates = 7 * unit(200, 210, 60)
    revived, steps = 0, 0
    while not revived:
        usage = book.update(latents, book.nearest(latents), candidates=candidates, decay=0.5, dead_below=0.05)
        revived, steps = int(usage.revived), steps + 1
        # The third code's count halves each step; the others' go from 1 to 2.
        mean = (2 * (2 - 0.5**steps) + 0.5**steps) / 3
        assert revived == (0.5**steps < 0.05 * mean)
    assert usage.used.item() == pytest.approx(2 / 3)
    torch.testing.assert_close(book.codes[2], unit(60)[0])
    torch.testing.assert_close(book.sums[2], mean * unit(60)[0])
    torch.testing.assert_close(book.counts[2].item(), mean)
    assert book.nearest(unit(65)).tolist() == [2]


def test_starting_over_repeats_latents_where_there_are_too_few() -> None:
    book = EMACodebook(num_codes=5, code_dim=2)
    book.counts.fill_(9)
    book.reset_to(3 * unit(0, 90))
    torch.testing.assert_close(book.codes, unit(0, 90, 0, 90, 0))
    assert torch.equal(book.sums, book.codes)
    assert torch.equal(book.counts, torch.ones(5))


def test_ties_go_to_the_first() -> None:
    assert codebook(0, 0, 90).nearest(unit(1, 89)).tolist() == [0, 2]
