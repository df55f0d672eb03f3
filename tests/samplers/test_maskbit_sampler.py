import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softgen.categorical import StoredNoise
from softgen.models import ClassCondition, MaskBit
from softgen.random import SampleRandom
from softgen.samplers import MaskBitSampler
from softgen.samplers.maskbit import remasked_share
from softgen.testing import ToyMaskedModel, count_calls

CPU = torch.device("cpu")
N = 4
TOY = ToyMaskedModel.random(num_classes=2, num_sites=N, num_codes=2, spread=2.0)
FLAT = ToyMaskedModel.random(num_classes=2, num_sites=N, num_codes=2, null_condition=False)


def labels(n: int) -> ClassCondition:
    return ClassCondition.of(torch.arange(n) % 2)


def plain_loop(settings: dict[str, Any], index: int, draws: list[list[float]]) -> tuple[list[int], list[float]]:
    """One image, as the published formulas say; the draws are used up in order. Also the guidance of each step."""
    steps, tokens, scales = settings["steps"], [TOY.mask_id] * N, []
    condition = labels(index + 1)[index:]
    for step in range(steps):
        progress = (step + 1) / steps
        scale = settings["guidance"]
        if settings["guidance_schedule"] == "cosine":
            scale *= (1 - math.cos(math.pi * (step / steps) ** settings["guidance_power"])) / 2
        elif settings["guidance_schedule"] == "linear":
            scale *= step / steps
        scales.append(scale)
        temperature = 0.5 + 0.8 * (1 - progress) if settings.get("anneal_temperature") else settings["temperature"]
        embedded = TOY.embed(torch.tensor([tokens]))
        kept, dropped = TOY(embedded, condition)[0], TOY(embedded, condition.drop())[0]
        p = ((kept + scale * (kept - dropped)) / temperature).softmax(-1).tolist()
        masked = [site for site in range(N) if tokens[site] == TOY.mask_id]
        code = draws.pop(0)
        for site in masked:
            tokens[site] = int(code[site] >= p[site][0])
        if step == steps - 1 or len(masked) == 1:
            break
        noise = settings["confidence_noise"] * (1 - progress)
        gumbel = [-math.log(-math.log(u)) for u in draws.pop(0)]
        confidence = {site: math.log(p[site][tokens[site]]) + noise * gumbel[site] for site in masked}
        left = max(1, min(math.floor(math.acos(progress) * 2 / math.pi * N), len(masked) - 1))
        for site in sorted(masked, key=confidence.__getitem__)[:left]:
            tokens[site] = TOY.mask_id
    return tokens, scales


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": 0.0, "confidence_noise": 0.0},
        {"guidance_schedule": "linear"},
        {"guidance_schedule": "none", "temperature": 0.7},
        {"anneal_temperature": True, "guidance_power": 1.0},
        {"steps": 1},
        {"steps": 7},
    ],
    ids=repr,
)
def test_against_a_plain_loop(changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"steps": 3, "guidance": 2.0, "guidance_schedule": "cosine", "guidance_power": 2.0}
    settings |= {"temperature": 1.0, "confidence_noise": 1.5, **changes}
    draws = [torch.rand(30, N) for _ in range(14)]
    got = MaskBitSampler(**settings)(TOY, labels(30), StoredNoise(draws))
    for index in range(30):
        tokens, _ = plain_loop(settings, index, [draw[index].tolist() for draw in draws])
        assert got[index].tolist() == tokens


def test_noise_is_used_as_documented() -> None:
    sampler = MaskBitSampler(steps=3)
    draws = [torch.rand(5, N) for _ in range(5)]
    assert sampler(TOY, labels(5), StoredNoise(draws)).shape == (5, N)
    with pytest.raises(ValueError, match=r"^noise: expected one more stored draw of shape \(B, 4\), got none$"):
        sampler(TOY, labels(5), StoredNoise(draws[:-1]))
    greedy = MaskBitSampler(steps=3, greedy=True)
    assert greedy(TOY, labels(5), StoredNoise(draws[:2])).shape == (5, N)


def test_greedy_without_noise_takes_the_likeliest() -> None:
    sampler = MaskBitSampler(steps=1, greedy=True, guidance=0.0)
    tokens = sampler(TOY, labels(2), StoredNoise([]))
    masked = torch.full((2, N), TOY.mask_id)
    assert torch.equal(tokens, TOY(TOY.embed(masked), labels(2)).argmax(-1))


@pytest.mark.parametrize("steps", [1, 4, 5, 40])
def test_it_stops_when_every_site_is_filled(steps: int) -> None:
    with count_calls(TOY) as count:
        tokens = MaskBitSampler(steps=steps)(TOY, labels(6), SampleRandom(0, range(6), device=CPU))
    assert int(tokens.max()) < TOY.mask_id
    assert count.calls == min(steps, N)


def test_a_site_is_left_for_the_next_step_where_the_schedule_has_none() -> None:
    model = ToyMaskedModel.random(num_classes=2, num_sites=3, num_codes=2)
    assert float(remasked_share("root", torch.tensor(0.5))) * 3 < 1
    with count_calls(model) as count:
        MaskBitSampler(steps=2, schedule="root")(model, labels(1), SampleRandom(0, [0], device=CPU))
    assert count.calls == 2


def test_guidance_costs_a_second_pass_where_it_is_on() -> None:
    for schedule, passes in (("none", [2, 2, 2]), ("cosine", [1, 2, 2]), ("linear", [1, 2, 2])):
        with count_calls(TOY) as count:
            sampler = MaskBitSampler(steps=3, guidance_schedule=schedule)  # type: ignore[arg-type]
            sampler(TOY, labels(1), SampleRandom(0, [0], device=CPU))
        assert count.samples == passes


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_a_sample_depends_on_its_seed_and_ordinal_alone(splits: int) -> None:
    model = MaskBit(
        img_size=8,
        input_stride=2,
        bits=6,
        codebook_splits=splits,
        hidden_dim=16,
        depth=1,
        heads=2,
        mlp_dim=16,
        nclass=3,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    sampler, condition = MaskBitSampler(steps=4), model.eval().encode(torch.tensor([0, 2, 1, 1]))

    def sample(seed: int, first: int, last: int) -> Tensor:
        return sampler(model, condition[first:last], SampleRandom(seed, range(first, last), device=CPU))

    whole = sample(3, 0, 4)
    assert (whole.shape, int(whole.max()) < model.mask_id) == ((4, 16 * splits), True)
    assert torch.equal(torch.cat([sample(3, 0, 1), sample(3, 1, 4)]), whole)
    assert not torch.equal(sample(4, 0, 4), whole)


def test_published_settings() -> None:
    sampler = MaskBitSampler.published(14)
    assert sampler == MaskBitSampler()
    assert (sampler.steps, sampler.schedule, sampler.guidance_schedule, sampler.temperature) == (
        64,
        "arccos",
        "cosine",
        1.0,
    )
    slow = MaskBitSampler.published(14, steps=256)
    assert (slow.steps, slow.guidance, slow.guidance_power, slow.confidence_noise) == (256, 5.8, 3.0, 10.3)
    for bits in (10, 12, 16, 18):
        documented = f"| {bits} | 64 | {(s := MaskBitSampler.published(bits)).guidance} | {s.guidance_power} | "
        assert documented + f"{s.confidence_noise} |" in (MaskBitSampler.published.__doc__ or "")
    with pytest.raises(ValueError, match=r"^bits and steps: expected one of 10 bits in 64, .*, got 10 bits in 12$"):
        MaskBitSampler.published(10, steps=12)


def test_shares_are_never_zero() -> None:
    shares = remasked_share("cosine", torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5**0.5, 1e-6]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"guidance": -1.0}, "guidance: expected a finite number of at least 0, got -1.0"),
        ({"guidance_schedule": "root"}, "guidance_schedule: expected cosine, linear, none, got 'root'"),
        ({"guidance_power": 0.0}, "guidance_power: expected a finite number above 0, got 0.0"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"confidence_noise": math.inf}, "confidence_noise: expected a finite number of at least 0, got inf"),
        ({"schedule": "sine"}, "schedule: expected one of linear, square, cosine, arccos, root, got 'sine'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"expected") as caught:
        MaskBitSampler(**settings)
    assert str(caught.value) == message


def test_guidance_needs_a_null_condition() -> None:
    noise = SampleRandom(0, [0], device=CPU)
    assert MaskBitSampler(guidance=0.0)(FLAT, labels(1), noise).shape == (1, N)
    message = r"^guidance: expected 0, since this model has no null condition, got 7.1$"
    with pytest.raises(ValueError, match=message):
        MaskBitSampler()(FLAT, labels(1), noise)
