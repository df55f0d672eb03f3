"""The autoregressive model: who sees whom, the cache, and sampling from what it has learnt."""

from pathlib import Path

import pytest
import torch

from softgen.models import AutoregressiveTransformer
from softgen.random import SampleRandom
from softgen.sampling import AutoregressiveSampler

CODES, SITES, CLASSES = 5, 6, 3


def _model(**options: object) -> AutoregressiveTransformer:
    torch.manual_seed(0)
    sizes = {"num_codes": CODES, "num_sites": SITES, "num_classes": CLASSES, "width": 16, "depth": 2, "heads": 2}
    model = AutoregressiveTransformer(**{**sizes, **options})  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def test_a_site_sees_the_tokens_before_it_alone() -> None:
    model = _model()
    condition = model.encode(torch.tensor([1, 1]))
    tokens = torch.randint(CODES, (1, SITES)).repeat(2, 1)
    for site in range(SITES):
        changed = tokens.clone()
        changed[1, site] = (changed[1, site] + 1) % CODES
        first, second = model(changed, condition)
        torch.testing.assert_close(first[: site + 1], second[: site + 1])
        if site + 1 < SITES:
            assert (first[site + 1 :] - second[site + 1 :]).abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("guidance", [1.0, 1.7])
def test_cached_sampling_draws_from_the_teacher_forced_logits(guidance: float) -> None:
    model = _model()
    condition = model.encode(torch.arange(4) % CLASSES)
    noise = SampleRandom(3, range(4), device=torch.device("cpu"))
    tokens = AutoregressiveSampler(guidance=guidance)(model, condition, noise)
    with torch.no_grad():
        logits = model(tokens, condition)
        if guidance != 1:
            logits = torch.lerp(model(tokens, condition.drop()), logits, guidance)
    noise = SampleRandom(3, range(4), device=torch.device("cpu"))
    for site in range(SITES):
        uniform = noise.uniform(1)
        cumulative = logits[:, site].softmax(dim=-1).cumsum(dim=-1)
        expected = (cumulative <= uniform).sum(dim=-1)
        assert tokens[:, site].tolist() == expected.tolist()


def test_temperature_zero_takes_the_likeliest() -> None:
    model = _model()
    condition = model.encode(torch.arange(3))
    tokens = AutoregressiveSampler(temperature=0)(
        model, condition, SampleRandom(0, range(3), device=torch.device("cpu"))
    )
    assert torch.equal(tokens, model(tokens, condition).argmax(dim=-1))


def test_saved_and_reopened(tmp_path: Path) -> None:
    model = _model(null_condition=False)
    model.save_pretrained(tmp_path / "model")
    opened = AutoregressiveTransformer.from_pretrained(tmp_path / "model").double()
    condition, tokens = model.encode(torch.tensor([2])), torch.tensor([[0, 1, 2, 3, 4, 0]])
    torch.testing.assert_close(opened(tokens, condition), model(tokens, condition), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"guidance: expected 1, since this model has no null condition, got 2\.0"):
        AutoregressiveSampler(guidance=2.0)(model, condition, SampleRandom(0, range(1), device=torch.device("cpu")))


def test_recomputed_activations_give_the_same_gradient() -> None:
    kept, recomputed = _model(), _model(checkpoint_activations=True)
    condition, tokens = kept.encode(torch.tensor([2])), torch.tensor([[0, 1, 2, 3, 4, 0]])
    for model in (kept, recomputed):
        model(tokens, condition).square().sum().backward()
    for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 15}, r"model.width: expected a multiple of heads \(2\), got 15"),
        ({"num_codes": 0}, "model.num_codes: expected at least 1, got 0"),
        ({"num_classes": -1}, "model.num_classes: expected at least 0, got -1"),
    ],
)
def test_impossible_sizes(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(**options)
