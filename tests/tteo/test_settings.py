"""Momentum, and the regulariser of the noise's norm."""

import copy

import pytest
import torch
from test_optimize import LABELS, _ink

from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.testing import ToyTokenizer
from tteo import TTEOSettings, optimize
from tteo.optimize import noise_norm_penalty


@pytest.fixture
def generator() -> OneStepGenerator:
    torch.manual_seed(0)
    model = MaskedTransformer(num_codes=5, num_sites=4, num_classes=3, width=16, depth=2, heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return OneStepGenerator(model, noise=0.5)


TOKENIZER = ToyTokenizer(num_codes=5)


def _soft(generator: OneStepGenerator, settings: TTEOSettings) -> torch.Tensor:
    return optimize(generator, TOKENIZER, _ink, LABELS[:2], settings=settings).soft_scores


def test_momentum_is_that_of_sgd(generator: OneStepGenerator) -> None:
    plain, heavy, nesterov = (
        _soft(generator, TTEOSettings(steps=4, lr=5.0, **options))
        for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})
    )
    # Momentum starts as a plain step, Nesterov's as one of 1.9 times the length.
    torch.testing.assert_close(plain[:2], heavy[:2])
    assert (heavy[3] > plain[3] + 1e-4).all()
    longer = _soft(generator, TTEOSettings(steps=2, lr=9.5))
    torch.testing.assert_close(nesterov[1], longer[1])


def test_the_penalty_is_the_negative_log_density_of_the_norm() -> None:
    noise = torch.randn(3, 4, 5, dtype=torch.float64)
    radius = noise.flatten(1).norm(dim=1)
    torch.testing.assert_close(noise_norm_penalty(noise), 0.5 * radius**2 - 19 * radius.log())
    # Least at r = sqrt(D - 1).
    unit = (noise / radius.view(-1, 1, 1) * 19**0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(noise_norm_penalty(unit).sum(), unit)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert noise_norm_penalty(noise.bfloat16()).dtype == torch.float32


def test_the_penalty_brings_the_noise_to_its_likely_norm(generator: OneStepGenerator) -> None:
    seen: list[torch.Tensor] = []

    def flat(images: torch.Tensor, conditions: object) -> torch.Tensor:
        return 0 * _ink(images, conditions)

    def record(module: torch.nn.Module, arguments: tuple[torch.Tensor, object]) -> None:
        seen.append(arguments[0].detach().clone())

    generator.model.register_forward_pre_hook(record)
    optimize(generator, TOKENIZER, flat, LABELS, settings=TTEOSettings(steps=30, lr=0.05, noise_norm=1.0))
    from softgen.random import SampleRandom, derive_seed

    draws = SampleRandom(derive_seed(0, "tteo"), range(len(LABELS)), device=torch.device("cpu"))
    tokens = generator.model.embed(generator.init_tokens(draws)).detach()
    first, last = (((each - 0.75**0.5 * tokens) / 0.5).flatten(1).norm(dim=1) for each in (seen[0], seen[-1]))
    # The start holds the normal draws themselves.
    torch.testing.assert_close(first, draws.normal(4, 16).flatten(1).norm(dim=1))
    likely = 63**0.5
    assert ((last - likely).abs() < 0.01).all()
    assert (first - likely).abs().max() > 0.3


def test_a_certain_generator_is_moved_at_a_higher_relaxation_temperature(generator: OneStepGenerator) -> None:
    certain = copy.deepcopy(generator)
    certain.scale_logits(1000.0)
    still = _soft(certain, TTEOSettings(steps=3, lr=5.0))
    moved = _soft(certain, TTEOSettings(steps=3, lr=5.0, relaxation_temperature=1000.0))
    torch.testing.assert_close(still[0], still[2])
    # The logits are divided by what they were multiplied by: the same climb.
    torch.testing.assert_close(moved, _soft(generator, TTEOSettings(steps=3, lr=5.0)))
    assert (moved[2] > moved[0] + 1e-3).all()


def test_without_noise_there_is_no_norm() -> None:
    model = MaskedTransformer(num_codes=5, num_sites=4, num_classes=3, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"^noise_norm: expected 0, since this generator adds no noise"):
        _soft(OneStepGenerator(model, noise=0.0), TTEOSettings(noise_norm=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"^momentum: expected a number in \[0, 1\), got 1\.0$"),
        ({"momentum": 0.5, "optimizer": "adam"}, r"^momentum: expected 0 beside adam, got 0\.5$"),
        ({"nesterov": True}, r"^nesterov: expected a momentum above 0 beside it, got 0$"),
        ({"relaxation_temperature": 0.0}, r"^relaxation_temperature: expected a number above 0, got 0\.0$"),
        ({"noise_norm": -1.0}, r"^noise_norm: expected a number of at least 0, got -1\.0$"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTEOSettings(**options).check()  # type: ignore[arg-type]
