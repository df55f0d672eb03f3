import pytest
import torch

from softgen.guidance import check_guidance, guided_logits
from softgen.models import ClassCondition
from softgen.testing import ToyMaskedModel, count_calls

MODEL = ToyMaskedModel.random(num_classes=3, num_sites=2, num_codes=4)
TOKENS = torch.tensor([[4, 4], [1, 4], [4, 3]])
CONDITION = ClassCondition.of(torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 6.4])
def test_the_formula_and_one_call_of_twice_the_batch(scale: float) -> None:
    embedded = MODEL.embed(TOKENS)
    conditional, unconditional = MODEL(embedded, CONDITION), MODEL(embedded, CONDITION.drop())
    with count_calls(MODEL) as count:
        guided = guided_logits(MODEL, embedded, CONDITION, scale=scale)
    assert (count.calls, count.samples) == (1, [6])
    assert not torch.equal(conditional, unconditional)
    torch.testing.assert_close(guided, unconditional + scale * (conditional - unconditional))


def test_a_scale_of_one_costs_one_pass_of_the_batch() -> None:
    embedded = MODEL.embed(TOKENS)
    with count_calls(MODEL) as count:
        guided = guided_logits(MODEL, embedded, CONDITION, scale=1.0)
    assert (count.calls, count.samples) == (1, [3])
    assert torch.equal(guided, MODEL(embedded, CONDITION))


def test_a_scale_for_each_sample() -> None:
    embedded, scales = MODEL.embed(TOKENS), torch.tensor([1.0, 2.0, 4.0])
    guided = guided_logits(MODEL, embedded, CONDITION, scale=scales.view(3, 1, 1))
    for i, scale in enumerate(scales.tolist()):
        alone = guided_logits(MODEL, embedded[i : i + 1], CONDITION[i : i + 1], scale=scale)
        torch.testing.assert_close(guided[i : i + 1], alone)


def test_gradients_reach_the_embeddings() -> None:
    embedded = MODEL.embed(TOKENS).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(guided_logits(MODEL, embedded, CONDITION, scale=2.0).sum(), embedded)
    assert gradient.abs().sum() > 0


def test_scales_are_checked() -> None:
    bare = ToyMaskedModel.random(num_classes=2, num_sites=2, num_codes=2, null_condition=False)
    check_guidance(bare, 1.0)
    check_guidance(MODEL, 0.0)
    message = r"^DiMO.guidance: expected 1, since this model has no null condition, got 2.0$"
    with pytest.raises(ValueError, match=message):
        check_guidance(bare, 2.0, key="DiMO.guidance")
    for bad in (-0.5, float("nan")):
        message = rf"^guidance: expected a scale of at least 0 \(1 turns guidance off\), got {bad}$"
        with pytest.raises(ValueError, match=message):
            check_guidance(MODEL, bad)
