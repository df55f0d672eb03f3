import math

import pytest
import torch
from torch.nn import functional as F

from softgen.relaxation import Distance, neighbour_distribution
from softgen.training.targets import check_target, hard_cross_entropy, neighbour_cross_entropy_dense

B, N, K, D = 2, 3, 7, 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    logits, tokens = torch.randn(B, N, K), torch.randint(K, (B, N))
    log_p = logits.log_softmax(-1)
    target = (1 - smoothing) * F.one_hot(tokens, K) + smoothing / K
    loss = hard_cross_entropy(logits, tokens, label_smoothing=smoothing)
    assert loss.shape == (B, N)
    torch.testing.assert_close(loss, -(target * log_p).sum(-1))


def test_cross_entropy_is_float32() -> None:
    logits, tokens = torch.randn(B, N, K).bfloat16(), torch.randint(K, (B, N))
    loss = hard_cross_entropy(logits, tokens)
    assert torch.equal(loss, hard_cross_entropy(logits.float(), tokens))


@pytest.mark.parametrize("distance", ["l2", "dot", "cosine"])
def test_the_gradient_of_snce_is_p_minus_q(distance: Distance) -> None:
    logits = torch.randn(B, N, K, requires_grad=True)
    z, codebook = torch.randn(B, N, D), torch.randn(K, D)
    loss = neighbour_cross_entropy_dense(logits, z, codebook, two_tau_squared=0.7, distance=distance)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    q = neighbour_distribution(z, codebook, two_tau_squared=0.7, distance=distance)
    torch.testing.assert_close(gradient, logits.softmax(-1) - q)


def test_snce_less_the_entropy_of_its_target() -> None:
    logits, z, codebook = torch.randn(B, N, K), torch.randn(B, N, D), torch.randn(K, D)
    weights = (-torch.cdist(z, codebook).square() / 0.7).exp()
    q = weights / weights.sum(-1, keepdim=True)
    snce = -(q * logits.log_softmax(-1)).sum(-1)
    entropy = -(q * q.log()).sum(-1)
    loss = neighbour_cross_entropy_dense(logits, z, codebook, two_tau_squared=0.7, distance="l2")
    torch.testing.assert_close(loss, snce - entropy, rtol=1e-4, atol=1e-5)


def test_a_perfect_fit_is_zero_and_a_tiny_tau_is_cross_entropy() -> None:
    codebook, tokens = torch.randn(K, D), torch.randint(K, (B, N))
    z = codebook[tokens]
    fit = neighbour_distribution(z, codebook, two_tau_squared=0.7).log()
    loss = neighbour_cross_entropy_dense(fit, z, codebook, two_tau_squared=0.7, distance="l2")
    torch.testing.assert_close(loss, torch.zeros(B, N), rtol=0, atol=1e-6)
    logits = torch.randn(B, N, K)
    sharp = neighbour_cross_entropy_dense(logits, z, codebook, two_tau_squared=1e-5, distance="l2")
    torch.testing.assert_close(sharp, hard_cross_entropy(logits, tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "soft"}, "model.target: expected one of hard, label_smoothing, snce, got 'soft'"),
        ({"label_smoothing": 1.5}, "model.label_smoothing: expected a number in [0, 1], got 1.5"),
        ({"two_tau_squared": 0.0}, "model.two_tau_squared: expected 'auto' or a number above 0, got 0.0"),
        ({"two_tau_squared": math.nan}, "model.two_tau_squared: expected 'auto' or a number above 0, got nan"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], message: str) -> None:
    settings = {"target": "snce", "label_smoothing": 0.1, "two_tau_squared": "auto", **changes}
    with pytest.raises(ValueError, match=r"^model") as caught:
        check_target(key="model", **settings)  # type: ignore[arg-type]
    assert str(caught.value) == message
