import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from distill.divergence import generalised_jeffreys
from distill.objectives.base import with_value_and_gradient

BETAS = [0.0, 1.0, 0.3, -0.2]


def pair(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    p = scale * torch.randn(4, 5, 7, dtype=torch.float64)
    return p.requires_grad_(), scale * torch.randn(4, 5, 7, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_the_value_is_the_mixture_of_the_two_divergences(beta: float) -> None:
    p, q = pair()
    forward = kl_divergence(Categorical(logits=q), Categorical(logits=p))
    reverse = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    value = generalised_jeffreys(p, q, beta=beta).value
    torch.testing.assert_close(value, ((1 - beta) * forward + beta * reverse).detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_autograds(beta: float) -> None:
    p, q = pair()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p)).sum()
    reverse = (log_p.exp() * (log_p - log_q)).sum()
    (expected,) = torch.autograd.grad((1 - beta) * forward + beta * reverse, p)
    got = generalised_jeffreys(p, q, beta=beta).gradient
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-10


def test_the_published_formulas() -> None:
    logits_p, logits_q = pair()
    p, q = logits_p.detach().softmax(-1), logits_q.softmax(-1)
    forward = generalised_jeffreys(logits_p, logits_q, beta=0.0).gradient
    torch.testing.assert_close(forward, p - q)
    reverse = generalised_jeffreys(logits_p, logits_q, beta=1.0).gradient
    kl = (p * (p / q).log()).sum(-1, keepdim=True)
    torch.testing.assert_close(reverse, p * ((p / q).log() - kl))


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence(beta: float) -> None:
    p, _ = pair()
    same = generalised_jeffreys(p, p + 5, beta=beta)
    torch.testing.assert_close(same.value, torch.zeros(4, 5, dtype=torch.float64))
    torch.testing.assert_close(same.gradient, torch.zeros(4, 5, 7, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_flows_and_float32_is_the_least(beta: float) -> None:
    p, q = pair()
    assert not generalised_jeffreys(p, q, beta=beta).gradient.requires_grad
    low = generalised_jeffreys(p.bfloat16(), q.bfloat16(), beta=beta)
    wide = generalised_jeffreys(p.bfloat16().float(), q.bfloat16().float(), beta=beta)
    assert low.value.dtype == low.gradient.dtype == torch.float32
    assert torch.equal(low.gradient, wide.gradient)


@pytest.mark.parametrize("beta", BETAS)
def test_sharp_logits_stay_finite(beta: float) -> None:
    p, q = pair(scale=1000.0)
    result = generalised_jeffreys(p.float(), q.float(), beta=beta)
    assert torch.isfinite(result.value).all()
    assert torch.isfinite(result.gradient).all()


def test_a_scalar_of_given_value_and_gradient() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gradient, value = torch.randn(3, 4, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    loss = with_value_and_gradient(logits, gradient, value)
    (got,) = torch.autograd.grad(3 * loss, logits)
    assert loss.item() == pytest.approx(2.5, abs=1e-12)
    assert torch.equal(got, 3 * gradient)
