import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill import DiMO, SoftDiMO
from softgen.models import ClassCondition, MaskBit, MaskedTransformer, OneStepGenerator
from softgen.models.generator import MaskUnit
from softgen.random import SampleRandom
from softgen.testing import ToyMaskedModel, count_calls

B, N, K, D = 6, 10, 5, 8
CPU = torch.device("cpu")
UNITS: tuple[MaskUnit, MaskUnit] = ("site", "token")


def noise(ordinals: range = range(B)) -> SampleRandom:
    return SampleRandom(0, ordinals, device=CPU)


def generator(*, r_init: float = 0.6, perturbation: float = 0.1, logit_scale: float = 1.0) -> OneStepGenerator:
    torch.manual_seed(1)
    model = MaskedTransformer(num_codes=K, num_sites=N, num_classes=2, width=D, depth=1, heads=2)
    return OneStepGenerator(
        model, r_init=r_init, noise=perturbation, logit_scale=logit_scale, metadata={"guidance": 1.5}
    )


@pytest.mark.parametrize(("r_init", "masks"), [(0.0, 0), (0.01, 1), (0.3, 3), (0.6, 6), (1.0, 10)])
def test_the_number_of_masks_is_exact(r_init: float, masks: int) -> None:
    tokens = generator(r_init=r_init).init_tokens(noise())
    assert tokens.shape == (B, N)
    assert (tokens == K).sum(-1).tolist() == [masks] * B
    assert tokens.min() >= 0
    assert tokens.max() <= K


def bits(r_init: float, unit: MaskUnit, *, splits: int = 3) -> OneStepGenerator:
    """A generator of 4 tokens of 3 groups; the mask of a group is its code 4."""
    torch.manual_seed(1)
    model = MaskBit(
        img_size=8, input_stride=4, bits=6, codebook_splits=splits, hidden_dim=8, depth=1, heads=2, mlp_dim=8, nclass=2
    )
    return OneStepGenerator(model, r_init=r_init, mask_unit=unit)


@pytest.mark.parametrize(
    ("r_init", "sites", "tokens"), [(0.0, 0, 0), (0.01, 1, 1), (0.3, 4, 1), (0.4, 5, 2), (0.6, 7, 2), (1.0, 12, 4)]
)
def test_masks_of_single_groups_and_of_whole_tokens(r_init: float, sites: int, tokens: int) -> None:
    n = 400
    single, whole = (bits(r_init, unit).init_tokens(noise(range(n))) == 4 for unit in UNITS)
    assert single.sum(-1).tolist() == [sites] * n
    masked = whole.view(n, 4, 3)
    assert torch.equal(masked.any(-1), masked.all(-1))
    assert masked.all(-1).sum(-1).tolist() == [tokens] * n
    # Standard deviation of a share: at most 0.025.
    shares = masked.all(-1).float().mean(0)
    torch.testing.assert_close(shares, torch.full((4,), tokens / 4), rtol=0, atol=0.1)
    partly = single.view(n, 4, 3).any(-1) & ~single.view(n, 4, 3).all(-1)
    assert bool(partly.any()) == (0 < sites < 12)


def test_with_one_site_a_token_the_units_draw_the_same() -> None:
    one, other = (bits(0.6, unit, splits=1) for unit in UNITS)
    assert torch.equal(one.init_tokens(noise()), other.init_tokens(noise()))
    assert torch.equal(one.init(noise()), other.init(noise()))


def test_the_mask_unit_is_saved_and_a_folder_without_one_counts_sites(tmp_path: Path) -> None:
    student = bits(0.6, "token")
    student.save_pretrained(tmp_path / "student")
    again = OneStepGenerator.from_pretrained(tmp_path / "student")
    assert again.mask_unit == "token"
    assert torch.equal(again.init_tokens(noise()), student.init_tokens(noise()))
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    del config["init_args"]["mask_unit"]
    path.write_text(json.dumps(config))
    assert OneStepGenerator.from_pretrained(tmp_path / "student").mask_unit == "site"


def test_mask_units_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^generator.mask_unit: expected site or token, got 'bit'$"):
        bits(0.6, "bit")  # type: ignore[arg-type]
    model = generator().model
    model.num_tokens = 4
    message = "generator.mask_unit: expected site, since 10 sites are no multiple of 4 tokens, got 'token'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        OneStepGenerator(model, mask_unit="token")
    OneStepGenerator(model, mask_unit="site")


def test_distillation_hands_the_mask_unit_on() -> None:
    given = bits(0.6, "token")
    assert SoftDiMO(teacher=given.model, mask_unit="token").student.mask_unit == "token"
    assert SoftDiMO(teacher=given.model).student.mask_unit == "site"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SoftDiMO(teacher=bits(0.6, "token").model, student=given).student.mask_unit == "token"
    ignored = "model.mask_unit: token is ignored, since the student that was given has site"
    with pytest.warns(UserWarning, match=ignored):
        SoftDiMO(teacher=given.model, student=bits(0.6, "site"), mask_unit="token")


def test_codes_and_positions_are_uniform() -> None:
    tokens = generator(r_init=0.3).init_tokens(noise(range(4000)))
    torch.testing.assert_close((tokens == K).float().mean(0), torch.full((N,), 0.3), rtol=0, atol=0.04)
    codes = torch.bincount(tokens[tokens < K], minlength=K) / (0.7 * N * 4000)
    torch.testing.assert_close(codes, torch.full((K,), 1 / K), rtol=0, atol=0.015)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.6, 1.0])
def test_the_noise_is_mixed_in_with_the_variance_kept(weight: float) -> None:
    student = generator(perturbation=weight)
    e_in = student.init(noise())
    draws = noise()
    tokens = student.init_tokens(draws)
    expected = weight * draws.normal(N, D) + math.sqrt(1 - weight**2) * student.model.embed(tokens)
    torch.testing.assert_close(e_in, expected)


def test_a_sample_depends_on_its_own_noise_alone() -> None:
    student, condition = generator(), ClassCondition.of(torch.arange(B) % 2)
    whole = student.sample(condition, noise())
    part = student.sample(condition[2:4], noise(range(2, 4)))
    assert torch.equal(whole[2:4], part)
    assert (whole.shape, whole.dtype) == ((B, N), torch.int64)
    assert whole.max() < K


def test_sampling_is_one_pass_and_temperature_zero_the_argmax() -> None:
    student, condition = generator(), ClassCondition.of(torch.arange(B) % 2)
    with count_calls(student.model) as count:
        tokens = student.sample(condition, noise(), temperature=0)
    assert count.calls == 1
    assert torch.equal(tokens, student(student.init(noise()), condition).argmax(-1))


def test_samples_follow_the_models_marginals() -> None:
    toy = ToyMaskedModel.random(num_classes=1, num_sites=2, num_codes=3)
    student, n = OneStepGenerator(toy, r_init=1.0, noise=0.0), 8000
    condition = ClassCondition.of(torch.zeros(n, dtype=torch.long))
    tokens: Tensor = student.sample(condition, noise(range(n)))
    joint = toy.joint(condition)[0].view(3, 3)
    for site, marginal in enumerate((joint.sum(1), joint.sum(0))):
        shares = torch.bincount(tokens[:, site], minlength=3) / n
        # Standard deviation of a share: at most 0.006.
        torch.testing.assert_close(shares, marginal, rtol=0, atol=0.025)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_shares_outside_the_unit_interval_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^generator.r_init: expected a number in \[0, 1\], got {value}$"):
        generator(r_init=value)
    with pytest.raises(ValueError, match=rf"^generator.noise: expected a number in \[0, 1\], got {value}$"):
        generator(perturbation=value)


def test_the_round_trip_keeps_logits_settings_and_metadata(tmp_path: Path) -> None:
    student, condition = generator(r_init=0.3, perturbation=0.2), ClassCondition.of(torch.arange(B) % 2)
    student.save_pretrained(tmp_path / "student")
    again = OneStepGenerator.from_pretrained(tmp_path / "student")
    assert (again.r_init, again.noise, again.metadata) == (0.3, 0.2, {"guidance": 1.5})
    assert torch.equal(again(again.init(noise()), condition), student(student.init(noise()), condition))


def test_metadata_added_later_is_saved(tmp_path: Path) -> None:
    student = generator()
    student.metadata["steps"] = 100
    student.save_pretrained(tmp_path / "student")
    again = OneStepGenerator.from_pretrained(tmp_path / "student")
    assert again.metadata == {"guidance": 1.5, "steps": 100}


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_logits_are_scaled_and_stay_so_in_a_folder(scale: float, tmp_path: Path) -> None:
    plain, student = generator(), generator(logit_scale=scale)
    e_in, condition = plain.init(noise()), ClassCondition.of(torch.arange(B) % 2)
    assert torch.equal(student(e_in, condition), scale * plain(e_in, condition))
    student.scale_logits(2.0)
    assert student.logit_scale == 2 * scale
    student.save_pretrained(tmp_path / "student")
    again = OneStepGenerator.from_pretrained(tmp_path / "student")
    assert again.logit_scale == 2 * scale
    assert torch.equal(again(e_in, condition), 2 * scale * plain(e_in, condition))
    assert again.model.state_dict().keys() == plain.model.state_dict().keys()


def test_a_folder_without_a_scale_opens_with_one(tmp_path: Path) -> None:
    student, condition = generator(), ClassCondition.of(torch.arange(B) % 2)
    student.save_pretrained(tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    del config["init_args"]["logit_scale"]
    path.write_text(json.dumps(config))
    again = OneStepGenerator.from_pretrained(tmp_path / "student")
    assert again.logit_scale == 1
    assert torch.equal(again(again.init(noise()), condition), student(student.init(noise()), condition))


@pytest.mark.parametrize("given", [True, False])
def test_sharpening_divides_the_students_logits_once(given: bool) -> None:
    student = generator(logit_scale=4.0)
    condition = ClassCondition.of(torch.arange(B) % 2)
    stages = [
        SoftDiMO(
            teacher=student.model,
            student=copy.deepcopy(student) if given else None,
            objectives=[DiMO(guidance=1.0)],
            sharpen=sharpen,
        )
        for sharpen in (1.0, 0.5)
    ]
    e_in = student.init(noise())
    blunt, sharp = (stage.student(e_in, condition) for stage in stages)
    assert torch.equal(blunt, (4 if given else 1) * student.model(e_in, condition))
    assert torch.equal(sharp, 2 * blunt)
    assert (sharp.softmax(-1).amax(-1) > blunt.softmax(-1).amax(-1)).all()
    assert torch.equal(stages[1].teacher(e_in, condition), student.model(e_in, condition))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scales_that_are_not_above_zero_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"^generator.logit_scale: expected a finite number above 0, got {value}$"):
        generator(logit_scale=value)
    with pytest.raises(ValueError, match=rf"^model.sharpen: expected a finite number above 0, got {value}$"):
        SoftDiMO(teacher=generator().model, sharpen=value)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_factors_that_are_not_above_zero_are_refused(factor: float) -> None:
    student = generator()
    with pytest.raises(ValueError, match=f"expected a finite number above 0, got {factor}$"):
        student.scale_logits(factor)
    assert student.logit_scale == 1
