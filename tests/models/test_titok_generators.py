"""ImageBert, UViTBert and their sampler on tiny random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from softgen.categorical import StoredNoise
from softgen.models import ClassCondition, ImageBert, MaskedDiffusionModel, UViTBert
from softgen.models.base import LinearHead
from softgen.random import SampleRandom
from softgen.samplers.titok import TiTokSampler
from softgen.testing import ToyMaskedModel

B, N, K, C, D = 3, 6, 5, 4, 8
SIZES = {"codebook_size": K, "image_seq_len": N, "condition_num_classes": C, "hidden_size": D}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12}
BOTH = pytest.mark.parametrize("cls", [ImageBert, UViTBert])


def build(cls: type[Any], **changes: object) -> MaskedDiffusionModel:
    model: MaskedDiffusionModel = cls(**{**SIZES, **changes})
    for name, parameter in model.named_parameters():
        # Norms after each sum shrink what a small gain lets through.
        nn.init.normal_(parameter, mean=float(name.endswith(("norm.weight", "Norm.weight"))), std=0.3)
    return model.eval()


def inputs() -> tuple[torch.Tensor, ClassCondition]:
    return torch.randint(K + 1, (B, N)), ClassCondition.of(torch.tensor([0, 3, 1]))


@BOTH
def test_shapes_taps_and_the_linear_head(cls: type[Any]) -> None:
    model, (tokens, condition) = build(cls), inputs()
    layers = model.num_layers
    assert layers == (4 if cls is ImageBert else 5)
    output = model.forward_with_taps(model.embed(tokens), condition, [layers - 1, 0])
    assert output.logits.shape == (B, N, K)
    assert [hidden.shape for hidden in output.hidden] == [(B, N, D)] * 2
    assert not torch.equal(*output.hidden)
    assert isinstance(model, LinearHead)
    assert torch.equal(model.head(model.hidden(model.embed(tokens), condition)), output.logits)


@BOTH
def test_one_hot_and_masked_sites_are_hard_tokens(cls: type[Any]) -> None:
    model, (tokens, _) = build(cls), inputs()
    masked = tokens == K
    soft = model.embed_soft(F.one_hot(tokens.masked_fill(masked, 0), K).float(), masked)
    assert torch.equal(soft, model.embed(tokens))


@BOTH
def test_the_class_comes_in(cls: type[Any]) -> None:
    model, (tokens, condition) = build(cls), inputs()
    x, labels = model.embed(tokens), condition.labels.clone()
    kept, dropped = model(x, condition), model(x, condition.drop())
    assert ((kept - dropped).abs().amax((1, 2)) > 1e-4).all()
    assert torch.equal(model(x, ClassCondition.of(torch.zeros(B).long()).drop()), dropped)
    assert torch.equal(condition.labels, labels)


@BOTH
def test_checkpointed_activations_give_the_same_gradients(cls: type[Any]) -> None:
    model, slim, (tokens, condition) = build(cls), build(cls, checkpoint_activations=True), inputs()
    slim.load_state_dict(model.state_dict())
    for each in (model, slim):
        each(each.embed(tokens), condition).square().sum().backward()
    for one, other in zip(model.parameters(), slim.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@BOTH
def test_sizes_come_from_the_checkpoint(cls: type[Any], tmp_path: Path) -> None:
    model = build(cls)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if cls is ImageBert:
        state["model.embeddings.position_ids"] = torch.arange(N + 1)
    save_file(state, tmp_path / "model.safetensors")
    opened = cls.from_checkpoint(tmp_path, num_attention_heads=2)
    assert opened.config == model.config
    tokens, condition = inputs()
    assert torch.equal(opened(opened.embed(tokens), condition), model(model.embed(tokens), condition))
    for section in ("generator", "img_generator"):
        (tmp_path / "config.json").write_text(json.dumps({"model": {section: {"num_attention_heads": 2}}}))
        assert cls.from_checkpoint(tmp_path).config == model.config
    with pytest.raises(ValueError, match=r"^model.num_attention_heads: expected a divisor of the width 8, got 3$"):
        cls.from_checkpoint(tmp_path, num_attention_heads=3)
    other = UViTBert if cls is ImageBert else ImageBert
    with pytest.raises(ValueError, match=rf"^model: .*\(a checkpoint of {cls.__name__}\)$"):
        other.from_checkpoint(tmp_path)


@BOTH
def test_dropout_is_off_unless_asked_for(cls: type[Any]) -> None:
    model, (tokens, condition) = build(cls).train(), inputs()
    x = model.embed(tokens)
    assert torch.equal(model(x, condition), model(x, condition))
    for option in ("dropout", "attn_drop"):
        noisy = build(cls, **{option: 0.5}).train()
        assert not torch.equal(noisy(x, condition), noisy(x, condition))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^model.num_hidden_layers: expected an even number, got 3$"):
        build(UViTBert, num_hidden_layers=3)
    with pytest.raises(ValueError, match=rf"^tokens: expected ids in 0..{K}, got {K + 1}$"):
        build(ImageBert).embed(torch.tensor([[K + 1]]))
    with pytest.raises(ValueError, match=r"^guidance_decay: expected one of constant, linear, power-cosine, got 'up'$"):
        TiTokSampler(guidance_decay="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0$"):
        TiTokSampler(steps=0)
    for name in ("guidance", "guidance_power", "randomize_temperature"):
        with pytest.raises(ValueError, match=rf"^{name}: expected a finite number of at least 0, got -1$"):
            TiTokSampler(**{name: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize(("decay", "off"), [("constant", 0.0), ("linear", 0.0), ("power-cosine", 1.0)])
def test_guidance_needs_a_null_condition(decay: Any, off: float) -> None:
    joint = [[[0.4, 0.1], [0.1, 0.4]]]
    known, unknown = (ToyMaskedModel(joint=joint, null_condition=null) for null in (True, False))
    noise = [torch.rand(2, 2, 2), torch.rand(2, 2)]
    condition = known.encode(torch.zeros(2, dtype=torch.int64))
    sampler = TiTokSampler(steps=1, guidance_decay=decay, guidance=off)
    assert torch.equal(*(sampler(model, condition, StoredNoise(noise)) for model in (known, unknown)))
    guided = TiTokSampler(steps=1, guidance_decay=decay, guidance=1 - off)
    with pytest.raises(ValueError, match=r"^guidance: "):
        guided(unknown, condition, StoredNoise(noise))


@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_sampler_fills_every_site(decay: Any, steps: int) -> None:
    model, condition = build(ImageBert), inputs()[1]
    sampler = TiTokSampler(steps=steps, guidance_decay=decay)
    noise = [SampleRandom(0, range(B), device=torch.device("cpu")) for _ in range(2)]
    tokens = sampler(model, condition, noise[0])
    assert tokens.shape == (B, N)
    assert int(tokens.max()) < K
    assert torch.equal(sampler(model, condition, noise[1]), tokens)


def test_the_sampler_takes_stored_noise() -> None:
    model, condition = build(ImageBert), inputs()[1]
    draws = [torch.rand(B, N, K) if index % 2 == 0 else torch.rand(B, N) for index in range(4)]
    first = TiTokSampler(steps=2)(model, condition, StoredNoise(draws))
    assert torch.equal(TiTokSampler(steps=2)(model, condition, StoredNoise(draws)), first)
