import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from softgen.models import MaskedDiffusionModel, MaskedTransformer, TextCondition, WordTextEncoder
from softgen.models.blocks import CrossAttention
from softgen.pretrained import Pretrained

WORDS = ("a", "red", "circle", "blue", "square")
PROMPTS = ["a red circle", "A blue square!", "circle"]
B, N, K, T = 3, 4, 5, 6


def encoder(**options: object) -> WordTextEncoder:
    settings = {"vocabulary": WORDS, "num_words": 8, "width": 8, "depth": 1, "heads": 2, "length": T, **options}
    return WordTextEncoder(**settings).eval()  # type: ignore[arg-type]


def model(text: WordTextEncoder | None = None) -> MaskedTransformer:
    built = MaskedTransformer(
        num_codes=K, num_sites=N, width=8, depth=2, heads=2, text_encoder=encoder() if text is None else text
    )
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built.eval()


def test_shapes_and_mask() -> None:
    condition = encoder()(PROMPTS)
    assert condition.states.shape == (B, T, 8)
    assert condition.pooled.shape == (B, 8)
    assert condition.mask.sum(dim=1).tolist() == [3, 3, 1]


def test_padding_does_not_reach_the_states() -> None:
    long, short = encoder(length=T), encoder(length=3)
    short.load_state_dict({**long.state_dict(), "position": long.position[:3]})
    for one, other in ((long(PROMPTS), short(PROMPTS)),):
        torch.testing.assert_close(one.pooled, other.pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.states[0, :3], other.states[0], rtol=0, atol=1e-5)


def test_case_and_punctuation_do_not_matter_and_word_order_does() -> None:
    one = encoder()(["a red circle blue square", "A RED circle, blue square.", "a blue circle red square"])
    torch.testing.assert_close(one.pooled[0], one.pooled[1], rtol=0, atol=1e-5)
    assert not torch.allclose(one.pooled[0], one.pooled[2])


def test_an_empty_prompt_is_finite() -> None:
    assert bool(encoder()([""]).states.isfinite().all())


def test_long_prompts_and_unknown_words_are_counted_once() -> None:
    text = encoder(length=2)
    with pytest.warns(UserWarning, match="text encoder") as caught:
        text(["a red circle", "a green dog", "a red"])
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "text encoder: 2 of 3 prompts are cut to 2 tokens",
        "text encoder: 2 words of 3 prompts are not in the vocabulary",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text(["a red circle dog"])


def test_words_are_learned_by_frequency() -> None:
    text = encoder(vocabulary=(), num_words=2)
    text.learn_words(["a circle", "a square", "a square"])
    assert text.vocabulary == ("a", "square")
    assert text.config["vocabulary"] == ["a", "square"]


def test_without_words_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^text_encoder.vocabulary: expected words, got none"):
        encoder(vocabulary=())(["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": ("a", "a")}, "expected unique lower-case words, got one of them twice"),
        ({"vocabulary": ("A",)}, "expected unique lower-case words, got 'A'"),
        ({"num_words": 2}, "expected at most 2 words, got 5"),
        ({"width": 9}, "expected a multiple of heads"),
        ({"length": 0}, "length: expected at least 1, got 0"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_the_model_looks_at_the_words() -> None:
    built = model()
    embeddings = built.embed(torch.randint(K, (B, N)))
    first = built(embeddings, built.encode(PROMPTS))
    assert first.shape == (B, N, K)
    other = built(embeddings, built.encode(["a blue circle", *PROMPTS[1:]]))
    assert not torch.allclose(first[0], other[0])
    assert torch.equal(first[1:], other[1:])


def test_a_dropped_prompt_is_the_same_whatever_it_said() -> None:
    built = model()
    embeddings = built.embed(torch.randint(K, (1, N)).expand(B, N))
    logits = built(embeddings, built.encode(PROMPTS).drop())
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert bool(logits.isfinite().all())
    part = built.encode(PROMPTS).drop(torch.tensor([True, False, False]))
    mixed = built(embeddings, part)
    torch.testing.assert_close(mixed[0], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], built(embeddings, built.encode(PROMPTS))[1], rtol=0, atol=1e-5)


def test_gradients_reach_the_text_encoder() -> None:
    built = model()
    built(built.embed(torch.zeros(B, N, dtype=torch.long)), built.encode(PROMPTS)).square().sum().backward()
    assert built.text is not None
    grads = {name: parameter.grad for name, parameter in built.text.named_parameters()}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values())


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    built = model()
    twin = copy.deepcopy(built)
    twin.checkpoint_activations = True
    tokens = torch.zeros(B, N, dtype=torch.long)
    for one in (built, twin):
        one(one.embed(tokens), one.encode(PROMPTS)).square().sum().backward()
    for (name, first), second in zip(built.named_parameters(), twin.parameters(), strict=True):
        assert (first.grad is None) == (second.grad is None), name
        if first.grad is not None:
            assert torch.equal(first.grad, second.grad), name


def test_pooled_condition_for_networks_beside_the_model() -> None:
    built = model()
    condition = built.encode(PROMPTS)
    assert isinstance(condition, TextCondition)
    assert built.condition_dim == 8
    assert torch.equal(built.pool(condition), condition.pooled)
    assert not built.pool(condition.drop()).any()


def test_labels_and_prompts_are_not_confused() -> None:
    with pytest.raises(ValueError, match=r"^conditions: expected prompts, since this model is text-conditional"):
        model().encode(torch.zeros(2, dtype=torch.long))
    plain = MaskedTransformer(num_codes=K, num_sites=N, num_classes=2, width=8, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"^conditions: expected class labels, since this model is class-conditional"):
        plain.encode(PROMPTS)


def test_classes_and_text_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^model.num_classes: expected 0 beside a text encoder, got 2$"):
        MaskedTransformer(num_codes=K, num_sites=N, num_classes=2, width=8, depth=1, heads=2, text_encoder=encoder())


def test_saved_with_its_vocabulary(tmp_path: Path) -> None:
    built = model()
    built.save_pretrained(tmp_path / "model")
    opened = Pretrained.from_pretrained(tmp_path / "model")
    assert isinstance(opened, MaskedDiffusionModel)
    assert opened.text_encoder is not None
    embeddings = built.embed(torch.zeros(B, N, dtype=torch.long))
    assert torch.equal(built(embeddings, built.encode(PROMPTS)), opened(embeddings, opened.encode(PROMPTS)))


def test_cross_attention_is_attention() -> None:
    layer = CrossAttention(8, heads=2, context_width=6)
    x, context = torch.randn(1, 3, 8), torch.randn(1, 4, 6)
    mask = torch.tensor([[True, True, False, True]])
    key, value = layer.key_value(context[:, mask[0]]).chunk(2, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (layer.query(x)[..., head] @ key[..., head].transpose(1, 2) / 2).softmax(dim=-1)
        heads.append(weights @ value[..., head])
    expected = layer.out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(layer(x, context, mask), expected, rtol=0, atol=1e-5)
