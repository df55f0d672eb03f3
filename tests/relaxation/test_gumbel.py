import math

import pytest
import torch

from softgen.relaxation import gumbel_noise, gumbel_softmax_st


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_the_forward_value_is_exactly_one_hot_at_the_perturbed_argmax(temperature: float) -> None:
    logits, uniform = torch.randn(64, 3, 7), torch.rand(64, 3, 7)
    sample = gumbel_softmax_st(logits.requires_grad_(), uniform=uniform, temperature=temperature)
    assert sample.unique().tolist() == [0.0, 1.0]
    assert torch.equal(sample.sum(-1), torch.ones(64, 3))
    assert torch.equal(sample.argmax(-1), (logits - (-uniform.log()).log()).argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_the_gradient_is_the_relaxed_samples(temperature: float) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    uniform, weights = torch.rand(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    sample = gumbel_softmax_st(logits, uniform=uniform, temperature=temperature)
    (got,) = torch.autograd.grad((sample * weights).sum(), logits)
    relaxed = ((logits - (-uniform.log()).log()) / temperature).softmax(-1)
    (expected,) = torch.autograd.grad((relaxed * weights).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_the_noise_is_standard_gumbel_and_finite_at_the_ends() -> None:
    noise = gumbel_noise(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    ends = gumbel_noise(torch.tensor([0.0, math.nextafter(1.0, 0.0), math.exp(-1)]))
    assert torch.isfinite(ends).all()
    assert ends[2].item() == pytest.approx(0, abs=1e-6)


def test_one_hot_samples_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(50_000, 3)
    frequency = gumbel_softmax_st(logits, uniform=torch.rand(50_000, 3)).mean(0)
    torch.testing.assert_close(frequency, logits[0].softmax(-1), rtol=0, atol=0.01)


def test_another_shape_of_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^uniform: expected shape \(2, 3\), got \(2, 4\)$"):
        gumbel_softmax_st(torch.zeros(2, 3), uniform=torch.zeros(2, 4))


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^temperature: expected a number above 0, got 0$"):
        gumbel_softmax_st(torch.zeros(2, 3), uniform=torch.zeros(2, 3), temperature=0)
