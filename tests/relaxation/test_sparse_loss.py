"""Cross-entropy of a large head towards hard and smoothed codes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from softgen.relaxation import Impl, linear_cross_entropy

N, K, WIDTH = 37, 101, 6


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_one_code_a_token_takes_no_operation_that_a_device_may_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal had no embedding_bag for long."""
    monkeypatch.setattr(F, "embedding_bag", None)
    h, w = draw(N, WIDTH).requires_grad_(), draw(K, WIDTH).requires_grad_()
    tokens = torch.randint(K, (N,))
    loss = linear_cross_entropy(h, w, tokens, impl="dense")
    assert loss.item() == pytest.approx(F.cross_entropy(h @ w.T, tokens).item())
    loss.backward()


@pytest.mark.parametrize("impl", ["dense", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("blocks", [{}, {"token_block": 5, "code_block": 7}])
def test_it_is_cross_entropy_of_the_logits(blocks: Any, smoothing: float, reduction: Any, impl: Impl) -> None:
    h, w, bias = (x.requires_grad_() for x in (draw(N, WIDTH), draw(K, WIDTH), draw(K)))
    tokens, weights = torch.randint(K, (N,)), torch.rand(N, dtype=torch.float64)
    weights[::3] = 0
    loss = linear_cross_entropy(
        h,
        w,
        tokens,
        bias=bias,
        label_smoothing=smoothing,
        token_weights=weights,
        reduction=reduction,
        impl=impl,
        **blocks,
    )
    expected = F.cross_entropy(h @ w.T + bias, tokens, label_smoothing=smoothing, reduction="none") * weights
    if reduction != "none":
        expected = expected.sum() / (weights.sum() if reduction == "mean" else 1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    upstream = draw(*loss.shape)
    gradients = (torch.autograd.grad(x, (h, w, bias), upstream) for x in (loss, expected))
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["dense", "fused"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forbidden_codes_have_no_part_in_the_smoothing(reduction: Any, impl: Impl) -> None:
    h, w, bias = draw(4, 3), draw(7, 3), draw(7)
    allowed, tokens = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 5, 5, 2])
    bias[torch.tensor([1, 4, 6])] = -math.inf
    position = torch.tensor([0, 3, 3, 1])
    kept = (h @ w[allowed].T + bias[allowed]).log_softmax(-1)
    expected = F.cross_entropy(kept, position, label_smoothing=0.4, reduction=reduction)
    h.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(h, w, tokens, bias=bias, label_smoothing=0.4, reduction=reduction, impl=impl)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), (h, w)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_against_finite_differences(reduction: Any) -> None:
    inputs = tuple(x.requires_grad_() for x in (draw(4, 3), draw(7, 3), draw(7)))
    tokens = torch.tensor([0, 6, 6, 2])

    def loss(h: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        options: Any = {"reduction": reduction, "token_block": 3, "code_block": 2}
        return linear_cross_entropy(h, w, tokens, bias=bias, label_smoothing=0.3, impl="fused", **options)

    assert gradcheck(loss, inputs)


def test_the_fused_matrix_is_never_allocated() -> None:
    tokens, codes = 300, 20_000
    h, w = torch.randn(tokens, 8, requires_grad=True), torch.randn(codes, 8, requires_grad=True)
    r = torch.randint(codes, (tokens,))

    def largest(impl: Impl) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            linear_cross_entropy(h, w, r, label_smoothing=0.1, impl=impl).backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest("dense") >= tokens * codes * 4
    assert largest("fused") <= tokens * codes * 2


def test_bad_input() -> None:
    h, w = torch.randn(4, 3), torch.randn(7, 3)
    with pytest.raises(ValueError, match=r"^tokens: expected shape \(4,\) as hidden, got \(3,\)$"):
        linear_cross_entropy(h, w, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^label_smoothing: expected a number in \[0, 1\], got 2$"):
        linear_cross_entropy(h, w, torch.zeros(4, dtype=torch.long), label_smoothing=2)
