import math

import pytest
import torch

from softgen.categorical import StoredNoise, invert_cdf, sample_categorical
from softgen.random import SampleRandom

CPU = torch.device("cpu")
JUST_BELOW_ONE = 1 - 2.0**-24


def test_inverting_at_the_edges_of_the_cells() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(1, 7, 6)
    uniform = torch.tensor([[0.0, 0.2, 0.25, 0.5, 0.7499, 0.75, JUST_BELOW_ONE]])
    assert invert_cdf(probs, uniform).tolist() == [[1, 1, 3, 3, 3, 4, 4]]


def test_impossible_codes_are_never_drawn_at_the_ends() -> None:
    probs = torch.rand(2000, 1, 40).pow(4)
    probs[..., torch.rand(40) < 0.3] = 0
    probs[..., [0, -1]] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    for edge in (0.0, JUST_BELOW_ONE):
        drawn = invert_cdf(probs, torch.full((2000, 1), edge))
        assert probs.gather(-1, drawn.unsqueeze(-1)).min() > 0


def test_probabilities_need_not_sum_to_one() -> None:
    probs, uniform = torch.rand(5, 3, 9), torch.rand(5, 3)
    assert torch.equal(invert_cdf(3 * probs, uniform), invert_cdf(probs, uniform))


@pytest.mark.parametrize("draw", ["inverse_cdf", "gumbel"])
def test_frequencies_are_those_of_multinomial(draw: str) -> None:
    n, logits = 60_000, 1.5 * torch.randn(8)
    drawn = sample_categorical(
        logits.expand(1, n, 8),
        SampleRandom(0, [0], device=CPU),
        temperature=0.7,
        draw=draw,  # type: ignore[arg-type]
    )
    frequencies = torch.bincount(drawn.flatten(), minlength=8) / n
    probs = (logits / 0.7).softmax(-1)
    reference = torch.bincount(torch.multinomial(probs, n, replacement=True), minlength=8) / n
    # Standard deviation of a frequency: at most 0.002.
    torch.testing.assert_close(frequencies, probs, rtol=0, atol=0.008)
    torch.testing.assert_close(frequencies, reference, rtol=0, atol=0.012)


def test_gumbel_draws_are_the_perturbed_argmax() -> None:
    logits, uniform = torch.randn(2, 3, 5), torch.rand(2, 3, 5)
    expected = (logits / 0.5 - (-uniform.log()).log()).argmax(-1)
    drawn = sample_categorical(logits, StoredNoise([uniform]), temperature=0.5, draw="gumbel")
    assert torch.equal(drawn, expected)


def test_a_temperature_of_zero_takes_the_likeliest_and_draws_nothing() -> None:
    logits = torch.randn(2, 3, 5)
    assert torch.equal(sample_categorical(logits, StoredNoise([]), temperature=0), logits.argmax(-1))


def test_low_precision_logits_are_drawn_in_float32() -> None:
    logits, uniform = torch.randn(4, 6, 300).bfloat16(), torch.rand(4, 6)
    expected = sample_categorical(logits.float(), StoredNoise([uniform]))
    assert torch.equal(sample_categorical(logits, StoredNoise([uniform])), expected)


def test_stored_noise_is_replayed_and_its_shape_checked() -> None:
    first, second = torch.rand(2, 3), torch.rand(2, 4, 5)
    noise = StoredNoise([first, second])
    assert torch.equal(noise.uniform(3), first)
    with pytest.raises(ValueError, match=r"^noise: expected a stored draw of shape \(B, 4\), got \(2, 4, 5\)$"):
        noise.uniform(4)
    message = r"^noise: expected one more stored draw of shape \(B, 3, 2\), got none$"
    with pytest.raises(ValueError, match=message):
        noise.uniform(3, 2)


def test_settings_are_checked() -> None:
    logits, noise = torch.zeros(1, 1, 2), StoredNoise([])
    with pytest.raises(ValueError, match=r"^draw: expected one of inverse_cdf, gumbel, got 'cdf'$"):
        sample_categorical(logits, noise, draw="cdf")  # type: ignore[arg-type]
    for bad in (-1.0, math.nan):
        message = rf"^temperature: expected a number of at least 0, got {bad}$"
        with pytest.raises(ValueError, match=message):
            sample_categorical(logits, noise, temperature=bad, draw="gumbel")
