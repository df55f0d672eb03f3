from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softgen.models import ClassCondition, MaskedTransformer
from softgen.models.blocks import LocalMixing

B, N, K, D = 4, 6, 5, 8


def build(**changes: Any) -> MaskedTransformer:
    """A small model with random modulation and head, which start as constants."""
    settings = {"num_codes": K, "num_sites": N, "num_classes": 3, "width": D, "depth": 3, "heads": 2}
    torch.manual_seed(1)
    model = MaskedTransformer(**{**settings, **changes})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs() -> tuple[torch.Tensor, ClassCondition]:
    return torch.randint(K + 1, (B, N)), ClassCondition.of(torch.tensor([0, 1, 2, 1]))


def test_shapes_and_ids() -> None:
    model, (tokens, condition) = build(), inputs()
    assert (model.mask_id, model.num_codes, model.num_sites, model.num_tokens) == (K, K, N, N)
    embedded = model.embed(tokens)
    assert embedded.shape == (B, N, D)
    assert model(embedded, condition).shape == (B, N, K)
    assert [p.shape for p in model.embedding_parameters()] == [(K + 1, D)]


def test_labels_that_are_no_classes_are_refused() -> None:
    model = build()
    for label in (-1, 3):
        with pytest.raises(ValueError, match=rf"^labels: expected ids in 0..2, got {label}$"):
            model.encode(torch.tensor([0, label]))
    assert build(num_classes=0).encode(torch.zeros(2, dtype=torch.int64)).labels.tolist() == [0, 0]  # type: ignore[attr-defined]


def test_every_site_sees_every_other_and_the_condition() -> None:
    model, (tokens, condition) = build(), inputs()
    embedded = model.embed(tokens).detach().requires_grad_()
    logits = model(embedded, condition)
    (gradient,) = torch.autograd.grad(logits[0, 0].square().sum(), embedded)
    assert (gradient[0].abs().sum(-1) > 0).all()
    assert gradient[1:].abs().sum() == 0


def test_a_dropped_condition_is_the_null_class_and_not_the_kept_one() -> None:
    model, (tokens, condition) = build(), inputs()
    embedded = model.embed(tokens)
    where = torch.tensor([True, False, True, False])
    kept, dropped = model(embedded, condition), model(embedded, condition.drop())
    mixed = model(embedded, condition.drop(where))
    assert ((kept - dropped).abs().amax((1, 2)) > 1e-4).all()
    torch.testing.assert_close(mixed, torch.where(where.view(-1, 1, 1), dropped, kept))
    other_labels = ClassCondition.of(torch.zeros(B).long())
    assert torch.equal(model(embedded, other_labels.drop()), dropped)


def test_samples_of_a_batch_do_not_meet() -> None:
    model, (tokens, condition) = build(), inputs()
    whole = model(model.embed(tokens), condition)
    alone = model(model.embed(tokens[2:3]), condition[2:3])
    torch.testing.assert_close(whole[2:3], alone)


def test_recomputing_activations_changes_nothing() -> None:
    tokens, condition = inputs()
    results = []
    for checkpointed in (False, True):
        model = build(checkpoint_activations=checkpointed)
        logits = model(model.embed(tokens), condition)
        logits.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        results.append([logits.detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_taps_give_the_layers_in_the_order_asked() -> None:
    model, (tokens, condition) = build(), inputs()
    embedded = model.embed(tokens)
    kept: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    output = model.forward_with_taps(embedded, condition, (2, 0))
    assert len(output.hidden) == 2
    assert torch.equal(output.hidden[0], kept[2])
    assert torch.equal(output.hidden[1], kept[0])
    assert torch.equal(output.logits, model(embedded, condition))


@pytest.mark.parametrize("tap", [-1, 3])
def test_a_tap_that_is_no_layer_is_refused(tap: int) -> None:
    model, (tokens, condition) = build(), inputs()
    with pytest.raises(ValueError, match=rf"^taps: expected layers in 0..2, got {tap}$"):
        model.forward_with_taps(model.embed(tokens), condition, (0, tap))


def test_a_new_model_is_nearly_uniform() -> None:
    settings = {"num_codes": K, "num_sites": N, "num_classes": 3, "width": 32, "depth": 2, "heads": 2}
    model, (tokens, condition) = MaskedTransformer(**settings), inputs()  # type: ignore[arg-type]
    probs = model(model.embed(tokens), condition).softmax(-1)
    assert (probs - 1 / K).abs().max() < 0.1


def test_an_unconditional_model() -> None:
    model, (tokens, _) = build(num_classes=0), inputs()
    condition = model.encode(torch.zeros(B, dtype=torch.long))
    assert model(model.embed(tokens), condition).shape == (B, N, K)
    assert (model.has_null_condition, build(null_condition=False).has_null_condition) == (False, False)
    assert build().has_null_condition


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_the_round_trip_is_bit_equal(tmp_path: Path, activation: str) -> None:
    model, (tokens, condition) = build(activation=activation), inputs()
    model.save_pretrained(tmp_path / "model")
    again = MaskedTransformer.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(again.embed(tokens), condition), model(model.embed(tokens), condition))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 0}, "model.num_codes: expected at least 1, got 0"),
        ({"depth": 0}, "model.depth: expected at least 1, got 0"),
        ({"num_classes": -1}, "model.num_classes: expected at least 0, got -1"),
        ({"width": 9}, r"model.width: expected a multiple of heads \(2\), got 9"),
        ({"activation": "tanh"}, "activation: expected one of gelu, relu, silu, got 'tanh'"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(**changes)


def test_a_mask_among_the_codes_is_refused() -> None:
    model = build()
    model.mask_id = K - 1
    message = r"^teacher.mask_id: expected an id outside the image codes 0..4, got 4$"
    with pytest.raises(ValueError, match=message):
        model.check(key="teacher")


def test_local_mixing_lets_neighbours_in_and_no_others() -> None:
    mixing = LocalMixing(2, grid=4)
    x = torch.randn(1, 16, 2, requires_grad=True)
    (reach,) = torch.autograd.grad(mixing(x)[0, 5].sum(), x)
    seen = reach[0].abs().sum(dim=-1).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_local_mixing_wants_a_square_grid_and_goes_into_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.num_sites: expected a square for local_mixing, got 6"):
        build(local_mixing=True)
    model = build(local_mixing=True, num_sites=9).eval()
    model.save_pretrained(tmp_path)
    again = MaskedTransformer.from_pretrained(tmp_path).eval()
    embedded, condition = torch.randn(2, 9, D), ClassCondition.of(torch.tensor([0, 1]))
    torch.testing.assert_close(again(embedded, condition), model(embedded, condition))
    assert not torch.allclose(build(num_sites=9).eval()(embedded, condition), model(embedded, condition))
