"""MaskBit's tokenizer and VQGAN+ on tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.bits import code_bits
from softgen.tokenizers import MaskBitTokenizer, VQGANPlusTokenizer

BITS, L, B = 6, 16, 2
SMALL: dict[str, Any] = {"image_size": 16, "hidden_channels": 32, "channel_mult": [1, 2, 1], "num_res_blocks": 1}


def randomised(tokenizer: Any) -> Any:
    for parameter in tokenizer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tokenizer.eval()


def build(**changes: Any) -> MaskBitTokenizer:
    tokenizer: MaskBitTokenizer = randomised(MaskBitTokenizer(**{**SMALL, "bits": BITS, **changes}))
    return tokenizer


def build_lookup(**changes: Any) -> VQGANPlusTokenizer:
    settings = {**SMALL, "codebook_size": 11, "token_size": 4, **changes}
    tokenizer: VQGANPlusTokenizer = randomised(VQGANPlusTokenizer(**settings))
    return tokenizer


def published(tokenizer: MaskBitTokenizer) -> dict[str, Tensor]:
    """The state dict with the buffers that published checkpoints hold."""
    places = (2 ** torch.arange(tokenizer.bits)).int()
    buffers = {"quantize.bits_to_indices": places, "quantize.codebook": code_bits(tokenizer.bits)}
    return {**tokenizer.state_dict(), **buffers}


def write(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_shapes_and_ranges(splits: int) -> None:
    tokenizer, images = build(codebook_splits=splits), torch.rand(B, 3, 16, 16)
    sites, codes, size = L * splits, 2 ** (BITS // splits), BITS // splits
    assert (tokenizer.num_sites, tokenizer.num_codes, tokenizer.code_dim) == (sites, codes, size)
    assert tokenizer.codebook.shape == (codes, size)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (B, sites)
    assert tokenizer.latents(images).shape == (B, sites, size)
    assert torch.equal(tokenizer.codebook[tokens] > 0, tokenizer.latents(images) > 0)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(decoded, tokenizer.decode_embeddings(tokenizer.codebook[tokens]))


def test_the_groups_change_nothing_but_the_reading() -> None:
    whole, split = build(codebook_splits=1), build(codebook_splits=3)
    split.load_state_dict(whole.state_dict())
    images = torch.rand(B, 3, 16, 16)
    ids = whole.encode(images)
    assert torch.equal(split.combine(split.encode(images)), ids)
    assert torch.equal(split.split(ids), split.encode(images))
    assert torch.equal(split.decode(split.encode(images)), whole.decode(ids))


def test_codes_are_the_nearest_rows() -> None:
    tokenizer, latents = build(), torch.randn(B, 2 * L, 3)
    expected = torch.cdist(latents, tokenizer.codebook.expand(B, -1, -1)).argmin(-1)
    assert torch.equal(tokenizer.quantize(latents), expected)
    assert tokenizer.quantize(torch.zeros(1, 1, 3)).item() == 0


def test_soft_codes_are_expected_bits() -> None:
    tokenizer, tokens = build(), torch.randint(8, (B, 2 * L))
    assert torch.equal(tokenizer.embed_soft(F.one_hot(tokens, 8).float()), tokenizer.codebook[tokens])
    probs = torch.rand(B, 2 * L, 8).softmax(-1).requires_grad_()
    soft = tokenizer.embed_soft(probs)
    torch.testing.assert_close(soft[..., 0], 2 * probs[..., 1::2].sum(-1) - 1)
    (gradient,) = torch.autograd.grad(tokenizer.decode_raw(soft).square().sum(), probs)
    assert gradient.abs().sum() > 0
    folded = soft.reshape(B, L, BITS)
    assert torch.equal(tokenizer.decode_embeddings(folded), tokenizer.decode_embeddings(soft))


def test_a_block_that_changes_the_channels_forgets_its_input() -> None:
    tokenizer = build()
    changing, keeping = tokenizer.encoder.down[1].res_blocks[0], tokenizer.encoder.down[0].res_blocks[0]
    x = torch.rand(B, 32, 4, 4)
    for block in (changing, keeping):
        nn.init.zeros_(block.conv2.weight)
    assert torch.equal(changing(x), torch.zeros(B, 64, 4, 4))
    assert torch.equal(keeping(x), x)
    nn.init.normal_(changing.conv2.weight)
    nn.init.zeros_(changing.nin_shortcut.weight)
    assert changing(x).abs().sum() > 0


def test_halving_pads_on_the_right_and_below() -> None:
    level = build().encoder.down[0]
    for block in level.res_blocks:
        nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(level.down_conv.bias)
    kernel = torch.zeros_like(level.down_conv.weight)
    kernel[torch.arange(32), torch.arange(32), 0, 0] = 1
    level.down_conv.weight = nn.Parameter(kernel)
    x = torch.rand(B, 32, 4, 4)
    assert torch.equal(level(x), x[:, :, ::2, ::2])


def test_without_convolution_the_side_is_halved_by_averaging() -> None:
    level = build(sample_with_conv=False).encoder.down[0]
    for block in level.res_blocks:
        nn.init.zeros_(block.conv2.weight)
    x = torch.rand(B, 32, 4, 4)
    torch.testing.assert_close(level(x), x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)))


def test_a_legacy_decoder_is_stored_backwards() -> None:
    tokenizer, legacy = build(), build(legacy_decoder=True)
    state = {}
    for name, value in tokenizer.state_dict().items():
        part, index, rest = name.partition("decoder.up.")[0], name[11:12], name[12:]
        state[f"decoder.up.{2 - int(index)}{rest}" if not part and index.isdigit() else name] = value
    legacy.load_state_dict(state)
    tokens = torch.randint(8, (B, 2 * L))
    assert torch.equal(legacy.decode(tokens), tokenizer.decode(tokens))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"bits": 9, "codebook_splits": 3},
    {"num_res_blocks": 2, "num_res_blocks_decoder": 1},
    {"channel_mult": [2, 1], "sample_with_conv": False, "image_size": 8},
    {"channel_mult": [1], "image_size": 4},
    {"legacy_decoder": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=repr)
def test_sizes_come_from_the_checkpoint(changes: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = build(**{"num_res_blocks_decoder": 1, **changes})
    side = tokenizer.image_size
    options = {"image_size": side, "codebook_splits": tokenizer.splits}
    opened = MaskBitTokenizer.from_checkpoint(write(published(tokenizer), tmp_path), **options)
    assert opened.config == tokenizer.config
    assert not opened.training
    images = torch.rand(B, 3, side, side)
    assert torch.equal(opened.latents(images), tokenizer.latents(images))
    assert torch.equal(opened.decode(opened.encode(images)), tokenizer.decode(tokenizer.encode(images)))


def test_a_safetensors_file_without_buffers_and_a_dtype(tmp_path: Path) -> None:
    tokenizer = build()
    save_file(tokenizer.state_dict(), tmp_path / "model.safetensors")
    opened = MaskBitTokenizer.from_checkpoint(tmp_path, image_size=16, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    assert opened.codebook.dtype == torch.bfloat16
    images = torch.rand(B, 3, 16, 16)
    assert opened.decode(opened.encode(images)).shape == images.shape


@pytest.mark.parametrize("splits", [1, 2])
def test_the_round_trip_is_bit_equal(tmp_path: Path, splits: int) -> None:
    tokenizer, images = build(codebook_splits=splits), torch.rand(B, 3, 16, 16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = MaskBitTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.config == tokenizer.config
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"decoder.norm_out.bias": None},
            {},
            "tokenizer: expected the tensors of this model, got 1 missing, first 'decoder.norm_out.bias'",
        ),
        ({}, {"bits": 10}, "tokenizer.bits: expected 6 as the checkpoint has, got 10"),
        (
            {},
            {"channel_mult": (1, 1, 1)},
            "tokenizer.channel_mult: expected [1, 2, 1] as the checkpoint has, got [1, 1, 1]",
        ),
        ({}, {"codebook_splits": 4}, "tokenizer.codebook_splits: expected a divisor of the 6 bits, got 4"),
        (
            {"quantize.bits_to_indices": 2 ** torch.arange(6).flip(0)},
            {},
            "tokenizer.quantize.bits_to_indices: expected the 6 bits of each code from the lowest up, got others",
        ),
        (
            {"quantize.codebook": code_bits(6).flip(1)},
            {},
            "tokenizer.quantize.codebook: expected the 6 bits of each code from the lowest up, got others",
        ),
    ],
)
def test_checkpoints_and_options_that_do_not_fit(
    changes: dict[str, Tensor | None], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = {**published(build()), **{name: value for name, value in changes.items() if value is not None}}
    state = {name: value for name, value in state.items() if changes.get(name, value) is not None}
    with pytest.raises(ValueError, match=r"^tokenizer") as caught:
        MaskBitTokenizer.from_checkpoint(write(state, tmp_path), **{"image_size": 16, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_the_other_quantiser_are_refused(tmp_path: Path) -> None:
    lookup = {name.replace("quantizer.", "quantize."): value for name, value in build_lookup().state_dict().items()}
    with pytest.raises(ValueError, match=r"^tokenizer: expected the tensors") as caught:
        MaskBitTokenizer.from_checkpoint(write(lookup, tmp_path), image_size=16, codebook_splits=1)
    assert str(caught.value).endswith(
        "1 unexpected, first 'quantize.embedding.weight' (a checkpoint of a VQ tokenizer)"
    )
    with pytest.raises(ValueError, match=r"1 missing, first 'quantizer.embedding.weight'"):
        VQGANPlusTokenizer.from_checkpoint(write(published(build()), tmp_path), image_size=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "tokenizer.image_size: expected a multiple of 4, got 18"),
        ({"hidden_channels": 48}, "tokenizer.hidden_channels: expected levels of a multiple of 32 channels, got 48"),
        ({"channel_mult": []}, "tokenizer.channel_mult: expected at least one level, got none"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        build(**changes)


def test_ids_outside_the_codebook_are_refused() -> None:
    tokenizer = build()
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..7, got 8$"):
        tokenizer.decode(torch.full((1, 2 * L), 8))
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..7, got 8$"):
        tokenizer.combine(torch.full((1, 2 * L), 8))
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..63, got 64$"):
        tokenizer.split(torch.full((1, L), 64))
    with pytest.raises(ValueError, match=r"^images: expected shape \(B, 3, 16, 16\), got \(1, 3, 8, 8\)$"):
        tokenizer.encode(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("unit", [False, True])
def test_vqgan_plus(unit: bool, tmp_path: Path) -> None:
    tokenizer, images = build_lookup(use_l2_normalisation=unit, num_res_blocks_decoder=1), torch.rand(B, 3, 16, 16)
    latents, tokens = tokenizer.latents(images), torch.randint(11, (B, L))
    assert (tokenizer.num_sites, tokenizer.num_codes, tokenizer.code_dim, latents.shape) == (L, 11, 4, (B, L, 4))
    if unit:
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(B, L))
    spread = torch.randn(B, L, 4)
    nearest = torch.cdist(spread, tokenizer.codebook.expand(B, -1, -1)).argmin(-1)
    assert torch.equal(tokenizer.quantize(spread), nearest)
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode_embeddings(tokenizer.codebook[tokens]))
    torch.testing.assert_close(tokenizer.embed_soft(F.one_hot(tokens, 11).float()), tokenizer.codebook[tokens])
    probs = torch.rand(B, L, 11).softmax(-1)
    mean = probs @ tokenizer.codebook_weight()
    torch.testing.assert_close(tokenizer.embed_soft(probs), F.normalize(mean, dim=-1) if unit else mean)

    state = {name.replace("quantizer.", "quantize."): value for name, value in tokenizer.state_dict().items()}
    options = {"image_size": 16, "use_l2_normalisation": unit}
    opened = VQGANPlusTokenizer.from_checkpoint(write(state, tmp_path), **options)
    assert opened.config == tokenizer.config
    assert torch.equal(opened.latents(images), latents)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = VQGANPlusTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))
    with pytest.raises(ValueError, match=r"^tokens: expected ids in 0..10, got 11$"):
        tokenizer.decode(torch.full((1, L), 11))
