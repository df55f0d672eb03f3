"""MaskGen on tiny random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from softgen.models import MaskGen, TextCondition
from softgen.models.maskgen import score_sinusoid

B, N, T, D, K, C = 2, 5, 3, 8, 6, 4
SIZES: dict[str, Any] = {"codebook_size": K, "num_latent_tokens": N, "decoder_embed_dim": D, "decoder_depth": 2}
SIZES |= {"decoder_num_heads": 2, "text_embed_dim": C, "micro_condition_embed_dim": 4, "condition_num_classes": 1}


def build(**changes: Any) -> MaskGen:
    model = MaskGen(**{**SIZES, **changes})
    torch.manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def condition(batch: int = B) -> TextCondition:
    mask = torch.ones(batch, T, dtype=torch.bool)
    return TextCondition.of(torch.randn(batch, T, C), mask, torch.randn(batch, C))


@pytest.mark.parametrize("tying", [True, False])
def test_shapes_and_ids(tying: bool) -> None:
    model = build(weight_tying=tying)
    assert (model.num_sites, model.num_codes, model.mask_id, model.num_layers) == (N, K, K, 2)
    output = model.forward_with_taps(model.embed(torch.full((B, N), K)), condition(), [1, 0])
    assert output.logits.shape == (B, N, K)
    assert [hidden.shape for hidden in output.hidden] == [(B, N, D)] * 2
    assert ("lm_head.bias" in model.state_dict()) == (not tying)
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..6, got 7$"):
        model.embed(torch.full((1, N), 7))


def test_one_hot_and_masked_sites_are_hard_tokens() -> None:
    model, tokens = build(), torch.randint(K + 1, (B, N))
    masked = tokens == K
    soft = model.embed_soft(F.one_hot(tokens.masked_fill(masked, 0), K).float(), masked)
    assert torch.equal(soft, model.embed(tokens))


def test_the_score_comes_in_where_the_model_takes_one() -> None:
    model, of = build(aesthetic_score=5.0), condition()
    x = model.embed(torch.full((B, N), K))
    logits = model(x, of)
    torch.testing.assert_close(model.predict(x, of, aesthetic_score=torch.tensor([5.0, 5.0])).logits, logits)
    assert (model.predict(x, of, aesthetic_score=6.5).logits - logits).abs().max() > 1e-4
    without = build(micro_condition=False)
    assert torch.equal(without.predict(x, of, aesthetic_score=6.5).logits, without(x, of))
    angles = torch.tensor([200.0, 200 * 1000**-0.5])
    torch.testing.assert_close(score_sinusoid(torch.tensor([2.0]), 4)[0], torch.cat([angles.sin(), angles.cos()]))


def test_what_shapes_do_not_tell_comes_from_the_config_beside_a_checkpoint(tmp_path: Path) -> None:
    model = build(aesthetic_score=6.5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^model.decoder_num_heads: expected a divisor of the width 8, got 16$"):
        MaskGen.from_checkpoint(tmp_path, condition_num_classes=1)
    told = {"decoder_num_heads": 2, "sample_aesthetic_score": 6.5}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"maskgen": told}}))
    assert MaskGen.from_checkpoint(tmp_path, condition_num_classes=1).config == model.config
    asked = MaskGen.from_checkpoint(tmp_path, condition_num_classes=1, decoder_num_heads=4, aesthetic_score=5.0)
    assert (asked.config["decoder_num_heads"], asked.aesthetic_score) == (4, 5.0)


def test_every_weight_gets_a_gradient_recomputed_or_not() -> None:
    model, slim, of = build(), build(checkpoint_activations=True), condition()
    for each in (model, slim):
        each(each.embed(torch.full((B, N), K)), of).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), slim.parameters(), strict=True):
        assert one.grad is not None, name  # as data-parallel training expects
        torch.testing.assert_close(one.grad, other.grad)


def test_dropped_conditions_are_the_stored_negative_prompt() -> None:
    model, of, negative = build(), condition(), condition(1)
    x = model.embed(torch.full((B, N), K))
    with pytest.raises(ValueError, match=r"^guidance: expected a text encoder or a stored negative prompt"):
        model(x, of.drop())
    model.store_negative(negative)
    torch.testing.assert_close(model(x, of.drop())[:1], model(x[:1], negative))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_num_heads": 3}, "model.decoder_num_heads: expected a divisor of the width 8, got 3"),
        ({"micro_condition_embed_dim": 3}, "model.micro_condition_embed_dim: expected an even number above 0, got 3"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model") as caught:
        build(**changes)
    assert str(caught.value) == message
