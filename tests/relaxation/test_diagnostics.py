import math

import pytest
import torch

from softgen.relaxation import decoding_gap, sharpness
from softgen.testing import ToyTokenizer


def test_the_covariance_trace_against_brute_force() -> None:
    logits, table = torch.randn(2, 3, 5), torch.randn(5, 4) + 100
    probs, rows = logits.double().softmax(-1).flatten(0, 1), table.double()
    traces = []
    for p in probs:
        centred = rows - p @ rows
        traces.append(torch.trace(sum(p[k] * torch.outer(centred[k], centred[k]) for k in range(5))))
    got = sharpness(logits, table).covariance_trace
    assert got.item() == pytest.approx(torch.stack(traces).mean().item(), rel=1e-4)


def test_the_covariance_trace_does_not_depend_on_autocast() -> None:
    logits, table = 5 * torch.randn(50, 16), torch.randn(16, 32) + 10
    expected = sharpness(logits, table).covariance_trace
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sharpness(logits, table).covariance_trace
    assert torch.equal(got, expected)


def test_sharpness_of_known_distributions() -> None:
    uniform = sharpness(torch.zeros(2, 3, 8))
    assert uniform.max_probability.item() == pytest.approx(1 / 8)
    assert uniform.entropy.item() == pytest.approx(math.log(8), rel=1e-6)
    assert uniform.covariance_trace.item() == 0
    certain = sharpness(torch.tensor([[200.0, 0.0]]), torch.randn(2, 3))
    assert (certain.max_probability.item(), certain.entropy.item()) == (1, 0)
    assert certain.covariance_trace.item() == pytest.approx(0, abs=1e-6)
    assert certain.margin.item() == 200


def test_the_margin_is_the_median_over_sites_of_the_lead_of_the_largest_logit() -> None:
    logits = torch.tensor([[[3.0, 5.0, -9.0], [1.0, 1.0, 0.0], [70.0, 0.0, 7.0]]])
    assert sharpness(logits).margin.item() == 2
    assert sharpness(logits.bfloat16()).margin.dtype == torch.float32


def test_the_decoding_gap_is_the_root_mean_square_of_pixels() -> None:
    tokenizer = ToyTokenizer(num_codes=2)
    probs = torch.full((1, 4, 2), 0.5)
    probs[0, 0] = torch.tensor([0.0, 1.0])
    gap = decoding_gap(
        probs,
        torch.tensor([[1, 0, 1, 0]]),
        decode_soft=lambda p: tokenizer.decode_embeddings(tokenizer.embed_soft(p)),
        decode_hard=tokenizer.decode,
    )
    assert gap.item() == pytest.approx(math.sqrt(3 * 0.25 / 4))
