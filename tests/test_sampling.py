import itertools
import math

import pytest
import torch
from torch import Tensor

from softgen.categorical import StoredNoise
from softgen.masking import Schedule
from softgen.models import ClassCondition, MaskBit
from softgen.random import SampleRandom
from softgen.sampling import HaltonSampler, MaskGITSampler, halton_order, reveal_counts
from softgen.testing import ToyMaskedModel, count_calls

CPU = torch.device("cpu")
TOY = ToyMaskedModel.random(num_classes=2, num_sites=4, num_codes=2)
SAMPLERS = [
    MaskGITSampler(steps=4),
    MaskGITSampler(steps=3, guidance=2.0, guidance_schedule="linear", schedule="cosine"),
    MaskGITSampler(steps=2, draw="gumbel"),
    HaltonSampler(steps=3),
]


def labels(n: int) -> ClassCondition:
    return ClassCondition.of(torch.arange(n) % 2)


def frequencies(tokens: Tensor, model: ToyMaskedModel) -> Tensor:
    return torch.bincount(model.state_index(tokens), minlength=len(model.states)) / len(tokens)


class GlobalUniform:
    """Draws for many samples at once; one stream a sample would be slow for tens of thousands."""

    def __init__(self, n: int) -> None:
        self.n = n

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.n, *shape)


@pytest.mark.parametrize("schedule", ["linear", "square", "cosine", "arccos", "root"])
@pytest.mark.parametrize("num_sites", [1, 2, 7, 49])
def test_every_step_reveals_something_and_all_is_revealed(schedule: Schedule, num_sites: int) -> None:
    for steps in range(1, num_sites + 1):
        counts = reveal_counts(schedule, num_sites=num_sites, steps=steps)
        assert (len(counts), sum(counts)) == (steps, num_sites)
        assert min(counts) >= 1


def test_counts_follow_the_schedule() -> None:
    left = [round(256 * math.cos(math.pi * step / 16)) for step in range(9)]
    expected = [before - after for before, after in itertools.pairwise(left)]
    assert reveal_counts("cosine", num_sites=256, steps=8) == expected
    assert reveal_counts("linear", num_sites=16, steps=4) == [4, 4, 4, 4]


@pytest.mark.parametrize("steps", [0, 5])
def test_the_number_of_steps_is_checked(steps: int) -> None:
    message = rf"^steps: expected 1 to 4 \(the number of sites\), got {steps}$"
    with pytest.raises(ValueError, match=message):
        MaskGITSampler(steps=steps)(TOY, labels(1), SampleRandom(0, [0], device=CPU))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_sample_depends_on_its_seed_and_ordinal_alone(sampler: MaskGITSampler | HaltonSampler) -> None:
    whole = sampler(TOY, labels(8), SampleRandom(3, range(8), device=CPU))
    parts = [sampler(TOY, labels(8)[i : i + 2], SampleRandom(3, range(i, i + 2), device=CPU)) for i in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sampler(TOY, labels(8), SampleRandom(3, range(8), device=CPU)), whole)
    assert not torch.equal(sampler(TOY, labels(8), SampleRandom(4, range(8), device=CPU)), whole)
    assert (whole.shape, whole.max().item()) == ((8, 4), 1)


def test_stored_noise_gives_the_same_samples() -> None:
    sampler, draws = MaskGITSampler(steps=2), [torch.rand(5, 4) for _ in range(4)]
    first = sampler(TOY, labels(5), StoredNoise(draws))
    assert torch.equal(sampler(TOY, labels(5), StoredNoise(draws)), first)


@pytest.mark.parametrize("confidence_noise", [0.0, 1.0, 4.5])
def test_maskgit_against_a_plain_loop(confidence_noise: float) -> None:
    steps, draws = 3, [torch.rand(20, 4) for _ in range(6)]
    sampler = MaskGITSampler(steps=steps, schedule="linear", confidence_noise=confidence_noise)
    got = sampler(TOY, labels(20), StoredNoise(draws))
    for i in range(20):
        tokens = [TOY.mask_id] * 4
        for step, count in enumerate([1, 2, 1]):
            p = TOY(TOY.embed(torch.tensor([tokens])), labels(20)[i : i + 1]).softmax(-1)[0].tolist()
            code, rank = draws[2 * step][i].tolist(), draws[2 * step + 1][i].tolist()
            candidates = []
            for site in (site for site in range(4) if tokens[site] == TOY.mask_id):
                drawn = int(code[site] >= p[site][0])
                gumbel = -math.log(-math.log(rank[site]))
                scale = confidence_noise * (1 - (step + 1) / steps)
                candidates.append((math.log(p[site][drawn]) + scale * gumbel, site, drawn))
            for _, site, drawn in sorted(candidates, reverse=True)[:count]:
                tokens[site] = drawn
        assert got[i].tolist() == tokens


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize(
    "sampler",
    # With overwhelming noise the ranking is a random order, independent of the drawn codes.
    [MaskGITSampler(steps=4, confidence_noise=1e4), HaltonSampler(steps=4), HaltonSampler(steps=4, draw="gumbel")],
    ids=["maskgit", "halton", "halton_gumbel"],
)
def test_one_site_at_a_time_reproduces_the_joint(sampler: MaskGITSampler | HaltonSampler, dropped: bool) -> None:
    n = 40_000
    condition = ClassCondition.of(torch.ones(n, dtype=torch.long))
    condition = condition.drop() if dropped else condition
    tokens = sampler(TOY, condition, GlobalUniform(n))
    # Standard deviation of a share: at most 0.0025.
    torch.testing.assert_close(frequencies(tokens, TOY), TOY.joint(condition)[0], rtol=0, atol=0.01)


def test_all_sites_at_once_give_the_product_of_the_marginals() -> None:
    n, condition = 40_000, ClassCondition.of(torch.zeros(40_000, dtype=torch.long))
    tokens = MaskGITSampler(steps=1)(TOY, condition, GlobalUniform(n))
    joint = TOY.joint(condition)[0]
    ones = torch.stack([joint[TOY.states[:, site] == 1].sum() for site in range(4)])
    torch.testing.assert_close(tokens.float().mean(0), ones, rtol=0, atol=0.01)
    product = torch.where(TOY.states == 1, ones, 1 - ones).prod(-1)
    torch.testing.assert_close(frequencies(tokens, TOY), product, rtol=0, atol=0.01)
    assert (product - joint).abs().max() > 0.03


def test_ranking_by_confidence_favours_the_likely_codes() -> None:
    # Two independent sites, fair and 0.9 : 0.1. The second keeps a likely first draw; an unlikely one (0.1) is less
    # certain than the fair site, which is then revealed in its place, and the second is drawn again.
    model = ToyMaskedModel(joint=[[[0.45, 0.05], [0.45, 0.05]]])
    n = 40_000
    condition = ClassCondition.of(torch.zeros(n, dtype=torch.long))
    tokens = MaskGITSampler(steps=2, confidence_noise=0.0)(model, condition, GlobalUniform(n))
    shares = (tokens == 0).float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.99]), rtol=0, atol=0.008)


def test_a_temperature_of_zero_takes_the_likeliest_code() -> None:
    condition = labels(6)
    marginals = TOY(TOY.embed(torch.full((6, 4), TOY.mask_id)), condition)
    tokens = MaskGITSampler(steps=1, temperature=0)(TOY, condition, SampleRandom(0, range(6), device=CPU))
    assert torch.equal(tokens, marginals.argmax(-1))


@pytest.mark.parametrize(("guidance", "batches"), [(1.0, [3, 3, 3]), (2.0, [6, 6, 6])])
def test_a_step_is_one_pass_with_guidance_too(guidance: float, batches: list[int]) -> None:
    for sampler in (MaskGITSampler(steps=3, guidance=guidance), HaltonSampler(steps=3, guidance=guidance)):
        with count_calls(TOY) as count:
            sampler(TOY, labels(3), SampleRandom(0, range(3), device=CPU))
        assert count.samples == batches


def test_linear_guidance_starts_at_one_and_ends_at_the_scale() -> None:
    sampler = MaskGITSampler(steps=4, guidance=4.0, guidance_schedule="linear")
    with count_calls(TOY) as count:
        sampler(TOY, labels(3), SampleRandom(0, range(3), device=CPU))
    assert count.samples == [3, 6, 6, 6]
    assert [sampler._scale(step) for step in range(4)] == [1, 2, 3, 4]


def test_guidance_without_a_null_condition_is_refused() -> None:
    bare = ToyMaskedModel.random(num_classes=2, num_sites=4, num_codes=2, null_condition=False)
    for sampler in (MaskGITSampler(steps=2, guidance=3.0), HaltonSampler(steps=2, guidance=3.0)):
        message = r"^guidance: expected 1, since this model has no null condition, got 3.0$"
        with pytest.raises(ValueError, match=message):
            sampler(bare, labels(1), SampleRandom(0, [0], device=CPU))


def test_the_guidance_schedule_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^guidance_schedule: expected constant or linear, got 'cosine'$"):
        MaskGITSampler(guidance_schedule="cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (7, 7), (16, 16), (3, 5)])
def test_the_halton_order_visits_every_position_once(height: int, width: int) -> None:
    order = halton_order(height, width)
    assert order.sort().values.tolist() == list(range(height * width))


def test_the_halton_order_begins_with_the_sequence() -> None:
    # (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9) on a grid of 8 x 9.
    assert halton_order(8, 9)[:5].tolist() == [4 * 9 + 3, 2 * 9 + 6, 6 * 9 + 1, 1 * 9 + 4, 5 * 9 + 7]


def test_halton_reveals_in_its_order() -> None:
    order = halton_order(2, 2).tolist()
    seen: list[Tensor] = []

    class Watched(ToyMaskedModel):
        def embed(self, tokens: Tensor) -> Tensor:
            seen.append(tokens.clone())
            return super().embed(tokens)

    model = Watched(joint=TOY.config["joint"])
    HaltonSampler(steps=4)(model, labels(2), SampleRandom(0, range(2), device=CPU))
    for step, tokens in enumerate(seen):
        revealed = (tokens != model.mask_id).all(0).nonzero().flatten().tolist()
        assert revealed == sorted(order[:step])


def test_halton_needs_a_square_grid() -> None:
    model = ToyMaskedModel.random(num_classes=1, num_sites=3, num_codes=2)
    message = r"^HaltonSampler: expected a square grid of tokens, got 3 tokens$"
    with pytest.raises(ValueError, match=message):
        HaltonSampler(steps=2)(model, labels(1), SampleRandom(0, [0], device=CPU))


def test_halton_counts_tokens_where_one_has_several_sites() -> None:
    model = MaskBit(img_size=64, bits=4, nclass=3, hidden_dim=8, depth=1, heads=2, mlp_dim=8)
    assert sum(HaltonSampler(steps=16).plan(model)) == 16
    assert sum(MaskGITSampler(steps=17).plan(model)) == 32
    with pytest.raises(ValueError, match=r"^steps: expected 1 to 16 \(the number of tokens\), got 17$"):
        HaltonSampler(steps=17).plan(model)
