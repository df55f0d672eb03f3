"""MaskBit on tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill import GAN, DiMO, SoftDiMO
from distill.objectives import DistillState
from softgen.bits import code_bits
from softgen.loading import check_compatible
from softgen.models import ClassCondition, MaskBit, OneStepGenerator
from softgen.random import SampleRandom, derive_seed
from softgen.tokenizers import MaskBitTokenizer
from tteo import TTEOSettings, optimize

B, L, G, BITS, D = 3, 4, 2, 6, 8
C, N, CLASSES = 8, 8, 5
SMALL: dict[str, Any] = {"img_size": 8, "input_stride": 4, "bits": BITS, "codebook_splits": G, "hidden_dim": D}
SMALL |= {"depth": 2, "heads": 2, "mlp_dim": 12, "nclass": CLASSES}
OPEN: dict[str, Any] = {"heads": 2, "input_stride": 4}


def build(**changes: Any) -> MaskBit:
    model = MaskBit(**{**SMALL, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def inputs() -> tuple[Tensor, ClassCondition]:
    tokens = torch.randint(C + 1, (B, N))
    tokens[0, 2:5] = C
    return tokens, ClassCondition.of(torch.tensor([4, 0, 3]))


def write(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def published(model: MaskBit) -> dict[str, Tensor]:
    """The state dict with the buffer that published checkpoints hold."""
    size = model.config["bits"] // model.config["codebook_splits"]
    return {**model.state_dict(), "bits_to_indices": (2 ** torch.arange(size)).int()}


def test_shapes_and_ids() -> None:
    model, (tokens, condition) = build(), inputs()
    assert (model.num_sites, model.num_tokens, model.num_codes, model.mask_id) == (N, L, C, C)
    assert (model.embedding_dim, model.hidden_dim, model.num_layers) == (BITS, D, 2)
    output = model.forward_with_taps(model.embed(tokens), condition, [1, 0])
    assert output.logits.shape == (B, N, C)
    assert [hidden.shape for hidden in output.hidden] == [(B, L, D)] * 2
    model.check(key="model")


def test_the_embedding_is_the_bits_and_a_masked_group_is_zero() -> None:
    model, (tokens, _) = build(), inputs()
    groups = model.embed(tokens).view(B, L, G, BITS // G)
    masked = (tokens == C).view(B, L, G)
    assert masked.any(-1).any()
    assert (groups[masked] == 0).all()
    assert torch.equal(groups[~masked], code_bits(3)[tokens.view(B, L, G)[~masked]])
    assert torch.equal(model.embed(torch.full((1, N), C)), torch.zeros(1, L, BITS))


@pytest.mark.parametrize("embedding", ["bits", "projection"])
@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_one_hot_and_masked_sites_are_hard_tokens(embedding: str, splits: int) -> None:
    model = build(codebook_splits=splits, embedding=embedding)
    tokens = torch.randint(model.num_codes + 1, (B, model.num_sites))
    masked = tokens == model.mask_id
    one_hot = F.one_hot(tokens.masked_fill(masked, 0), model.num_codes).float()
    assert torch.equal(model.embed_soft(one_hot, masked), model.embed(tokens))
    assert model.embed(tokens).shape == (B, L, model.embedding_dim)


def test_soft_bits_are_twice_the_chance_of_a_set_bit_less_one() -> None:
    model, probs = build(), torch.rand(B, N, C).softmax(-1).requires_grad_()
    soft = model.embed_soft(probs)
    for group in range(G):
        for bit in range(3):
            set_codes = [code for code in range(C) if code >> bit & 1]
            chance = probs.view(B, L, G, C)[:, :, group, set_codes].sum(-1)
            torch.testing.assert_close(soft[..., 3 * group + bit], 2 * chance - 1)
    (gradient,) = torch.autograd.grad(soft.square().sum(), probs)
    assert gradient.abs().sum() > 0


def test_projecting_the_expectation_is_the_expectation_of_the_projection() -> None:
    model, (tokens, condition) = build(), inputs()
    other = build(embedding="projection")
    other.load_state_dict(model.state_dict())
    assert other.embedding_dim == D
    assert torch.equal(other(other.embed(tokens), condition), model(model.embed(tokens), condition))
    probs = torch.rand(B, N, C).softmax(-1)
    rows = F.linear(torch.cat([code_bits(3), code_bits(3)], dim=-1), model.input_proj.weight)
    low, high = (F.linear(code_bits(3), weight) for weight in model.input_proj.weight.split(3, dim=1))
    pairs = probs.view(B, L, G, C)
    expected = pairs[:, :, 0] @ low + pairs[:, :, 1] @ high + model.input_proj.bias
    assert rows.shape == (C, D)
    torch.testing.assert_close(other.embed_soft(probs), expected)
    torch.testing.assert_close(other(other.embed_soft(probs), condition), model(model.embed_soft(probs), condition))


@pytest.mark.parametrize("prenorm", [False, True])
def test_the_network_is_the_published_formula(prenorm: bool) -> None:
    model, (tokens, condition) = build(use_prenorm=prenorm, heads=4, depth=3), inputs()
    state, embedded = model.state_dict(), model.embed(tokens)
    assert ("norm_after_transformer.weight" in state) == prenorm

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attend(x: Tensor, name: str) -> Tensor:
        packed = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
        query, key, value = packed.view(B, L + 1, 3, 4, D // 4).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / (D // 4) ** 0.5).softmax(-1)
        return linear((weights @ value).transpose(1, 2).reshape(B, L + 1, D), f"{name}.out_proj")

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    x = torch.cat([linear(embedded, "input_proj"), state["class_emb.weight"][condition.labels].unsqueeze(1)], dim=1)
    x = norm(x + state["pos_emb"], "first_layer.0")
    for layer in range(3):
        for part in range(2):
            name = f"transformer.layers.{layer}.{part}"
            seen = norm(x, f"{name}.norm") if prenorm else x
            fed = linear(gelu(linear(seen, f"{name}.net.0")), f"{name}.net.2") if part else attend(seen, f"{name}.mha")
            x = x + fed if prenorm else norm(x + fed, f"{name}.norm")
    x = norm(x, "norm_after_transformer") if prenorm else x
    logits = linear(norm(gelu(linear(x, "last_layer.0")), "last_layer.2"), "prediction_layer")[:, :L]
    torch.testing.assert_close(model(embedded, condition), logits.reshape(B, N, C), rtol=1e-4, atol=1e-5)


def test_dropped_labels_are_the_null_class_and_labels_stay_as_they_are() -> None:
    model, (tokens, condition) = build(), inputs()
    x, labels = model.embed(tokens), condition.labels.clone()
    where = torch.tensor([False, True, False])
    kept, dropped, mixed = model(x, condition), model(x, condition.drop()), model(x, condition.drop(where))
    assert ((kept - dropped).abs().amax((1, 2)) > 1e-4).all()
    torch.testing.assert_close(mixed, torch.where(where.view(-1, 1, 1), dropped, kept))
    assert torch.equal(model(x, ClassCondition.of(torch.zeros(B).long()).drop()), dropped)
    assert torch.equal(condition.labels, labels)
    narrow = model.encode(labels.int())
    assert isinstance(narrow, ClassCondition)
    assert narrow.labels.dtype == torch.int64
    assert model.pool(narrow).shape == (B, CLASSES + 1)


def test_dropout_is_off_unless_asked_for() -> None:
    model, (tokens, condition) = build().train(), inputs()
    x = model.embed(tokens)
    assert torch.equal(model(x, condition), model(x, condition))
    noisy = build(dropout=0.5).train()
    assert not torch.equal(noisy(x, condition), noisy(x, condition))
    assert torch.equal(noisy.eval()(x, condition), noisy(x, condition))
    attentions = [module for module in noisy.modules() if isinstance(module, nn.MultiheadAttention)]
    assert [attention.dropout for attention in attentions] == [0.5] * noisy.num_layers


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model, (tokens, condition) = build(), inputs()
    slim = build(checkpoint_activations=True)
    slim.load_state_dict(model.state_dict())
    for each in (model, slim):
        each(each.embed(tokens), condition).square().sum().backward()
    for one, other in zip(model.parameters(), slim.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_prenorm": True, "depth": 3, "mlp_dim": 20},
        {"codebook_splits": 1, "nclass": 9},
        {"codebook_splits": 3, "img_size": 12},
        {"codebook_splits": 6},
    ],
)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_sizes_come_from_the_checkpoint(changes: dict[str, Any], form: str, tmp_path: Path) -> None:
    model = build(**changes)
    if form == "bin":
        older = {name.replace("input_proj", "token_emb"): value for name, value in published(model).items()}
        opened = MaskBit.from_checkpoint(write(older, tmp_path), **OPEN)
    else:
        save_file(published(model), tmp_path / "weights.safetensors")
        opened = MaskBit.from_checkpoint(tmp_path / "weights.safetensors", **OPEN)
    assert opened.config == model.config
    assert not opened.training
    tokens, condition = torch.randint(model.num_codes + 1, (B, model.num_sites)), inputs()[1]
    assert torch.equal(opened(opened.embed(tokens), condition), model(model.embed(tokens), condition))


def test_a_checkpoint_without_its_buffer(tmp_path: Path) -> None:
    for splits, options in ((2, {}), (3, {}), (6, {"codebook_splits": 6})):
        model = build(codebook_splits=splits)
        opened = MaskBit.from_checkpoint(write(model.state_dict(), tmp_path), **OPEN, **options)
        assert opened.config == model.config


def test_published_file_names(tmp_path: Path) -> None:
    torch.save(published(build()), tmp_path / "maskbit_generator_12bit.bin")
    assert MaskBit.from_checkpoint(tmp_path, **OPEN).config["bits"] == BITS


def test_a_dtype_at_load(tmp_path: Path) -> None:
    tokens, condition = inputs()
    opened = MaskBit.from_checkpoint(write(published(build()), tmp_path), dtype=torch.bfloat16, **OPEN)
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    assert opened.embed(tokens).dtype == torch.bfloat16
    assert opened(opened.embed(tokens), condition).dtype == torch.bfloat16
    assert all(parameter.requires_grad for parameter in opened.parameters())


@pytest.mark.parametrize("embedding", ["bits", "projection"])
def test_the_round_trip_is_bit_equal(tmp_path: Path, embedding: str) -> None:
    model, (tokens, condition) = build(use_prenorm=True, embedding=embedding), inputs()
    model.save_pretrained(tmp_path / "model")
    again = MaskBit.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again(again.embed(tokens), condition), model(model.embed(tokens), condition))


MISSING = "model: expected the tensors of this model, got "


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"pos_emb": None}, OPEN, MISSING + "1 missing, first 'pos_emb'"),
        ({"extra": torch.zeros(1)}, OPEN, MISSING + "1 unexpected, first 'extra'"),
        ({"input_proj.weight": None}, OPEN, MISSING + "1 missing, first 'input_proj.weight'"),
        ({}, {**OPEN, "bits": 10}, "model.bits: expected 6 as the checkpoint has, got 10"),
        ({}, {**OPEN, "codebook_splits": 3}, "model.codebook_splits: expected 2 as the checkpoint has, got 3"),
        ({}, {**OPEN, "img_size": 16}, "model.img_size: expected 8 as the checkpoint has, got 16"),
        ({}, {**OPEN, "heads": 3}, "model.heads: expected a divisor of the width 8, got 3"),
        (
            {"prediction_layer.weight": torch.zeros(20, D)},
            OPEN,
            "model: expected m 2^(6 / m) outputs for m groups of 6 bits, got 20",
        ),
        (
            {"bits_to_indices": torch.tensor([4, 2, 1])},
            OPEN,
            "model.bits_to_indices: expected the powers of 2 of a group's bits, got [4, 2, 1]",
        ),
        (
            {"pos_emb": torch.zeros(1, 4, D)},
            OPEN,
            "model: expected positions of a square of tokens and a class, got 4",
        ),
    ],
)
def test_checkpoints_and_options_that_do_not_fit(
    changes: dict[str, Tensor | None], options: dict[str, int], message: str, tmp_path: Path
) -> None:
    state = {**published(build()), **{name: value for name, value in changes.items() if value is not None}}
    state = {name: value for name, value in state.items() if changes.get(name, value) is not None}
    with pytest.raises(ValueError, match=r"^model") as caught:
        MaskBit.from_checkpoint(write(state, tmp_path), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    tokenizer = MaskBitTokenizer(image_size=8, bits=6, hidden_channels=32, channel_mult=[1], num_res_blocks=1)
    state = {**tokenizer.state_dict(), "quantize.bits_to_indices": 2 ** torch.arange(6)}
    with pytest.raises(ValueError, match=r"^teacher: expected the tensors of this model") as caught:
        MaskBit.from_checkpoint(write(state, tmp_path), key="teacher")
    assert str(caught.value).endswith("(a checkpoint of the MaskBit tokenizer)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 10}, "model.img_size: expected a multiple of the stride 4, got 10"),
        ({"codebook_splits": 4}, "model.codebook_splits: expected a divisor of the 6 bits, got 4"),
        ({"embedding": "rows"}, "model.embedding: expected bits or projection, got 'rows'"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(**changes)


@pytest.mark.parametrize("token", [-1, C + 1])
def test_ids_that_are_no_codes_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"^tokens: expected ids in 0..{C}, got {token}$"):
        build().embed(torch.full((1, N), token))


def test_an_unconditional_model() -> None:
    model, tokens = build(nclass=0), inputs()[0]
    assert not model.has_null_condition
    condition = model.encode(torch.zeros(B, dtype=torch.long))
    assert torch.equal(model(model.embed(tokens), condition), model(model.embed(tokens), condition.drop()))


def pair(embedding: str) -> tuple[MaskBit, MaskBitTokenizer]:
    tokenizer = MaskBitTokenizer(image_size=8, bits=6, hidden_channels=32, channel_mult=[1, 1, 1], num_res_blocks=1)
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return build(embedding=embedding), tokenizer.eval()


@pytest.mark.parametrize("embedding", ["bits", "projection"])
def test_distillation_and_its_gradients_fit_the_sites(embedding: str) -> None:
    teacher, tokenizer = pair(embedding)
    check_compatible(teacher, tokenizer)
    objectives = [DiMO(guidance=2.0), GAN()]
    stage = SoftDiMO(teacher=teacher, tokenizer=tokenizer, objectives=objectives)
    for parameter in (*stage.student.parameters(), *objectives[0].auxiliary.parameters()):
        nn.init.normal_(parameter, std=0.5)
    noise, condition = SampleRandom(0, range(B), device=torch.device("cpu")), inputs()[1]
    logits = stage.student(stage.student.init(noise), condition)
    state = DistillState(
        student=stage.student,
        teacher=stage.teacher,
        tokenizer=stage.tokenizer,
        asked=condition.labels,
        condition=condition,
        logits=logits,
        tokens=logits.argmax(-1),
        batch={"image": torch.rand(B, 3, 8, 8), "ordinal": [0, 1, 2]},
        step=0,
        student_step=0,
        noise=lambda stream: SampleRandom(derive_seed(0, stream), range(B), device=logits.device),
    )
    for objective in objectives:
        result = objective(state)
        (gradient,) = torch.autograd.grad(result.generator, logits, retain_graph=True)
        assert gradient.shape == (B, N, C)
        assert gradient.abs().amax() > 1e-6
    frozen = {id(parameter) for parameter in stage.student.model.embedding_parameters()}
    assert {id(p) for p in stage.student.parameters() if not p.requires_grad} == frozen
    assert len(frozen) == 3


@pytest.mark.parametrize("embedding", ["bits", "projection"])
def test_a_reward_reaches_the_input_through_the_decoder(embedding: str) -> None:
    model, tokenizer = pair(embedding)
    settings = TTEOSettings(steps=5, lr=0.1, optimizer="adam")
    labels = torch.tensor([0, 1])
    result = optimize(
        OneStepGenerator(model), tokenizer, lambda images, _: images.mean((1, 2, 3)), labels, settings=settings
    )
    assert (result.soft_scores[-1] > result.soft_scores[0]).all()
    assert result.tokens.shape == (2, N)
    assert result.embeddings.shape == (2, L, model.embedding_dim)
