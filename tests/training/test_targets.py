import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softgen.relaxation import Distance, Impl, NeighbourTable, neighbour_distribution
from softgen.training.targets import (
    CodeTarget,
    HardTarget,
    NeighbourTarget,
    TableTarget,
    check_target,
    hard_cross_entropy,
)

B, N, K, D = 2, 6, 7, 4


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
    logits = torch.randn(N, K, requires_grad=True)
    z, codebook, weights = torch.randn(N, D), torch.randn(K, D), torch.rand(N)
    loss = NeighbourTarget(z, codebook, 0.7, distance).loss(logits, weights)
    (gradient,) = torch.autograd.grad(loss, logits)
    q = neighbour_distribution(z, codebook, two_tau_squared=0.7, distance=distance)
    torch.testing.assert_close(gradient, weights.unsqueeze(-1) * (logits.softmax(-1) - q))


def test_snce_less_the_entropy_of_its_target() -> None:
    logits, z, codebook, weights = torch.randn(N, K), torch.randn(N, D), torch.randn(K, D), torch.rand(N)
    q = (-torch.cdist(z, codebook).square() / 0.7).softmax(-1)
    snce = -(q * logits.log_softmax(-1)).sum(-1)
    entropy = -(q * q.log()).sum(-1)
    loss = NeighbourTarget(z, codebook, 0.7, "l2").loss(logits, weights)
    torch.testing.assert_close(loss, (weights * (snce - entropy)).sum(), rtol=1e-4, atol=1e-5)


def test_a_perfect_fit_is_zero_and_a_tiny_tau_is_cross_entropy() -> None:
    codebook, tokens, weights = torch.randn(K, D), torch.randint(K, (N,)), torch.rand(N)
    z = codebook[tokens]
    fit = neighbour_distribution(z, codebook, two_tau_squared=0.7).log()
    perfect = NeighbourTarget(z, codebook, 0.7, "l2").loss(fit, weights)
    torch.testing.assert_close(perfect, torch.tensor(0.0), rtol=0, atol=1e-6)
    logits = torch.randn(N, K)
    sharp = NeighbourTarget(z, codebook, 1e-5, "l2").loss(logits, weights)
    torch.testing.assert_close(sharp, HardTarget(tokens).loss(logits, weights))


@pytest.mark.parametrize("impl", ["dense", "fused"])
@pytest.mark.parametrize("name", ["hard", "smoothed", "neighbours", "table"])
def test_the_loss_of_the_head_is_that_of_the_logits(name: str, impl: Impl) -> None:
    codebook, tokens = torch.randn(K, D), torch.randint(K, (N,))
    targets: dict[str, CodeTarget] = {
        "hard": HardTarget(tokens),
        "smoothed": HardTarget(tokens, 0.3),
        "neighbours": NeighbourTarget(torch.randn(N, D), codebook, 0.7, "l2"),
        "table": TableTarget(tokens, NeighbourTable.build(codebook, two_tau_squared=0.1, neighbours=K - 1)),
    }
    hidden, head = torch.randn(N, D, requires_grad=True), nn.Linear(D, K)
    weights = torch.rand(N).index_fill(0, torch.tensor([1]), 0.0)
    inputs = (hidden, head.weight, head.bias)
    of_logits = targets[name].loss(head(hidden), weights)
    of_head = targets[name].linear_loss(hidden, head, weights, impl=impl)
    torch.testing.assert_close(of_head, of_logits, rtol=1e-5, atol=1e-6)
    for got, expected in zip(torch.autograd.grad(of_head, inputs), torch.autograd.grad(of_logits, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


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
