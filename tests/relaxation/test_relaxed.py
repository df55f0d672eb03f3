"""Every kind of relaxation: what it is forward, and what its gradient is."""

import pytest
import torch
from torch.nn import functional as F

from softgen.relaxation import Relaxation

LOGITS = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = LOGITS.argmin(-1)
DIRECTION = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _gradient(relaxation: Relaxation, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    logits = LOGITS.clone().requires_grad_()
    probs = relaxation.relax(logits, tokens=TOKENS, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad((probs * DIRECTION).sum(), logits)
    return probs.detach(), gradient


def test_soft_is_the_softmax() -> None:
    probs, _ = _gradient(Relaxation(temperature=0.5))
    torch.testing.assert_close(probs, (LOGITS / 0.5).softmax(-1))


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    probs, gradient = _gradient(Relaxation(kind="st"))
    assert torch.equal(probs, F.one_hot(TOKENS, 6).double())
    _, soft_gradient = _gradient(Relaxation())
    torch.testing.assert_close(gradient, soft_gradient)


def test_gumbel_straight_through_is_one_hot() -> None:
    uniform = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    relaxation = Relaxation(kind="gumbel_st")
    assert relaxation.needs_noise
    probs, gradient = _gradient(relaxation, uniform=uniform)
    assert torch.equal(probs.amax(-1), torch.ones(4, 5, dtype=torch.float64))
    assert torch.equal(probs.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert gradient.abs().sum() > 0


def test_top_k_keeps_k_codes_and_renormalises() -> None:
    probs, gradient = _gradient(Relaxation(kind="soft_topk", top_k=2))
    assert ((probs > 0).sum(-1) == 2).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 5, dtype=torch.float64))
    assert ((gradient.abs() > 1e-12) == (probs > 0)).all()
    everything, _ = _gradient(Relaxation(kind="soft_topk", top_k=99))
    torch.testing.assert_close(everything, LOGITS.softmax(-1))


def test_annealing_falls_geometrically_to_its_end() -> None:
    relaxation = Relaxation(kind="annealed", temperature=1.0, final_temperature=0.25, anneal_steps=10)
    assert [relaxation.temperature_at(step) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.5, 0.25, 0.25])
    probs, _ = _gradient(relaxation, step=5)
    torch.testing.assert_close(probs, (LOGITS / 0.5).softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"x\.temperature: expected a number above 0, got 0\.0"),
        ({"top_k": 1}, r"x\.top_k: expected at least 2, got 1"),
        ({"kind": "hard"}, r"hard tokens have no gradient"),
    ],
)
def test_impossible_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Relaxation(**options).check(key="x")  # type: ignore[arg-type]
