"""Meissonic on tiny random weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from softgen.models import Meissonic, TextCondition, WordTextEncoder
from softgen.models.meissonic_parts import rotation_angles, sinusoid
from softgen.models.mmdit import frequencies
from softgen.pretrained import Pretrained

B, T, D, K, MASK = 2, 3, 16, 6, 9
SIZES: dict[str, Any] = {"grid": [4, 2], "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8}
SIZES |= {"num_attention_heads": 2, "joint_attention_dim": 5, "axes_dims_rope": [2, 4, 2]}
SIZES |= {"vocab_size": MASK + 1, "codebook_size": K}


def build(**changes: Any) -> Meissonic:
    model = Meissonic(**{**SIZES, **changes})
    torch.manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def condition(batch: int = B, length: int = T) -> TextCondition:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return TextCondition.of(torch.randn(batch, length, 5), mask, torch.randn(batch, D))


@pytest.mark.parametrize("downsample", [True, False])
def test_shapes_and_ids(downsample: bool) -> None:
    model = build(downsample=downsample)
    assert (model.num_sites, model.num_codes, model.mask_id, model.num_layers) == (8, K, MASK, 3)
    x = model.embed(torch.tensor([[0, 5, MASK, 1, 2, 3, 4, MASK]] * B))
    output = model.forward_with_taps(x, condition(), [2, 0])
    assert output.logits.shape == (B, 8, K)
    assert [hidden.shape for hidden in output.hidden] == [(B, 8, D)] * 2
    names = {name.split(".")[0] for name in model.state_dict()}
    assert ({"down_block", "up_block"} <= names) == downsample
    if downsample:
        # 2x2 tokens share a position: rows of four tokens by two are two positions, one above the other.
        hidden = output.hidden[0].view(B, 4, 2, D)
        assert torch.equal(hidden[:, 0, 0], hidden[:, 1, 1])
        assert not torch.equal(hidden[:, 0, 0], hidden[:, 2, 0])
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..9, got 10$"):
        model.embed(torch.full((1, 8), 10))


def test_a_scale_of_guidance_is_told_beside_the_timestep(tmp_path: Any) -> None:
    plain, told = build(), build(guidance_embeds=True, guidance_scale=3.0)
    told.load_state_dict(plain.state_dict(), strict=False)
    x, of = plain.embed(torch.zeros(B, 8, dtype=torch.long)), condition()
    assert not torch.equal(told(x, of), plain(x, of))
    torch.testing.assert_close(told.predict(x, of, guidance_scale=torch.full((B,), 3.0)).logits, told(x, of))
    assert not torch.equal(told.predict(x, of, guidance_scale=2.0).logits, told(x, of))
    for parameter in told.time_text_embed.guidance_embedder.linear_2.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(told(x, of), plain(x, of))
    told.save_pretrained(tmp_path)
    opened = Pretrained.from_pretrained(tmp_path)
    assert isinstance(opened, Meissonic)
    assert (opened.guidance_embeds, opened.guidance_scale) == (True, 3.0)


def test_the_placement_decides_what_is_averaged() -> None:
    lookup, after = build(), build(soft_placement="post_embed")
    probs = torch.randn(B, 8, K).softmax(-1)
    rows = lookup.embedder.embeddings.weight[:K]
    torch.testing.assert_close(lookup.embed_soft(probs), lookup.embedder(probs @ rows))
    torch.testing.assert_close(after.embed_soft(probs), probs @ after.embedder(rows))
    assert (lookup.embed_soft(probs) - after.embed_soft(probs)).abs().max() > 1e-2
    mask = torch.rand(B, 8) < 0.5
    masked = lookup.embed(torch.full((B, 8), MASK))
    for model in (lookup, after):
        torch.testing.assert_close(model.embed_soft(probs, mask)[mask], masked[mask])
        tokens = torch.randint(K, (B, 8))
        torch.testing.assert_close(model.embed_soft(F.one_hot(tokens, K).float()), model.embed(tokens))


def test_timestep_and_micro_conditions_come_in() -> None:
    model, of = build(), condition()
    x = model.embed(torch.full((B, 8), MASK))
    logits = model(x, of)
    told = torch.tensor([[32.0, 64, 0, 0, 6]] * B)
    torch.testing.assert_close(model.predict(x, of, timestep=0, micro_conditions=told).logits, logits)
    assert (model.predict(x, of, micro_conditions=told + 1).logits - logits).abs().max() > 1e-4
    later = model.predict(x, of, timestep=torch.tensor([2])).logits
    assert (later - logits).abs().max() > 1e-4
    torch.testing.assert_close(model.predict(x, of, timestep=torch.tensor([2.0, 2.0])).logits, later)
    torch.testing.assert_close(build(timestep=2)(x, of), later)


def test_the_same_states_at_other_places_give_other_logits() -> None:
    model, of = build(), condition()
    x = model.embed(torch.tensor([[0, 1, 1, 0, 4, 5, 5, 4]] * B))
    turned = x.view(B, 2, 4, D).flip(1).reshape(B, 8, D)
    back = model(turned, of).view(B, 2, 4, K).flip(1).reshape(B, 8, K)
    assert (back - model(x, of)).abs().max() > 1e-3
    angles = rotation_angles([2, 3], [2, 4, 2])
    assert angles.shape == (6, 4)
    assert angles[:, 0].tolist() == [0] * 6
    assert angles[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    assert angles[5, 2:].tolist() == [0.01, 2.0]
    rotation = model.rotation(T, torch.device("cpu"))
    assert rotation.cos.shape == (T + 2, 8)
    assert torch.equal(rotation.sin[:T], torch.zeros(T, 8))


def test_sinusoid() -> None:
    values = sinusoid(torch.tensor([0.0, 3.0]), 4)
    assert values[0].tolist() == [1, 1, 0, 0]
    expected = torch.tensor([3.0, 0.03])
    torch.testing.assert_close(values[1], torch.cat([expected.cos(), expected.sin()]))
    assert frequencies(128, period=10000.0, device=torch.device("cpu")).dtype == torch.float32


def test_the_negative_prompt_is_stored_or_refused(tmp_path: Any) -> None:
    model, of, negative = build(), condition(), condition(1)
    x = model.embed(torch.full((B, 8), MASK))
    assert not model.has_null_condition
    with pytest.raises(ValueError, match=r"^guidance: expected a text encoder or a stored negative prompt") as caught:
        model(x, of.drop())
    assert "\n" not in str(caught.value)
    model.store_negative(negative)
    assert model.has_null_condition
    dropped = model(x, of.drop(torch.tensor([True, False])))
    alone = model(x[:1], negative)
    torch.testing.assert_close(dropped[:1], alone)
    torch.testing.assert_close(dropped[1:], model(x[1:], of[1:]))
    model.save_pretrained(tmp_path / "model")
    opened = Pretrained.from_pretrained(tmp_path / "model")
    assert torch.equal(opened.negative_states, negative.states[0])
    torch.testing.assert_close(opened(x, of.drop()), model(x, of.drop()))
    with pytest.raises(ValueError, match=r"^conditions: expected 3 text tokens as the negative prompt has, got 4$"):
        model(x, condition(length=4))
    with pytest.raises(ValueError, match=r"^negative: expected one prompt of widths \(5, 16\), got 2 of \(5, 16\)$"):
        model.store_negative(condition(2))


def test_an_encoder_that_learns_is_asked_again() -> None:
    words = WordTextEncoder(vocabulary=["dog", "cat"], width=D, heads=2, length=T)
    model = build(joint_attention_dim=D, text_encoder=words, negative_prompt="dog")
    x, of = model.embed(torch.full((B, 8), MASK)), model.encode(["cat", "dog"])
    before = model(x, of.drop())
    torch.testing.assert_close(before[1:], model(x, of)[1:])
    with torch.no_grad():
        words.position += torch.randn(T, D)
    assert (model(x, of.drop()) - before).abs().max() > 1e-4


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model, slim, of = build(), build(checkpoint_activations=True), condition()
    for each in (model, slim):
        each(each.embed(torch.full((B, 8), MASK)), of).square().sum().backward()
    for one, other in zip(model.parameters(), slim.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        assert one.grad is not None  # as data-parallel training expects


def test_what_is_kept_in_inference_serves_in_training() -> None:
    words = WordTextEncoder(vocabulary=["dog"], width=D, heads=2, length=T)
    model = build(joint_attention_dim=D, text_encoder=words)
    x = model.embed(torch.full((1, 8), MASK))
    with torch.inference_mode():
        model(x, model.encode(["dog"]).drop())
    model(x, model.encode(["dog"]).drop()).sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": [3, 2]}, "model.grid: expected two even numbers, since it downsamples, got [3, 2]"),
        ({"grid": [4]}, "model.grid: expected two even numbers, since it downsamples, got [4]"),
        (
            {"axes_dims_rope": [2, 2, 2]},
            "model.axes_dims_rope: expected three even numbers that sum to 8, got [2, 2, 2]",
        ),
        ({"pooled_projection_dim": 3}, "model.pooled_projection_dim: expected the width 16, got 3"),
        ({"soft_placement": "x"}, "model.soft_placement: expected lookup or post_embed, got 'x'"),
        ({"vocab_size": 6}, "model.vocab_size: expected more than the 6 codes, got 6"),
        ({"micro_conditions": [1]}, "model.micro_conditions: expected 5 numbers, got [1]"),
        (
            {"text_encoder": WordTextEncoder(vocabulary=["dog"], width=D, heads=2)},
            "model.text_encoder.width: expected 5 as the model takes, got 16",
        ),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^model") as caught:
        build(**changes)
    assert str(caught.value) == message
