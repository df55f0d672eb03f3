from pathlib import Path

import pytest
import torch
from torch import Tensor

from softgen.tokenizers import ConvVQTokenizer
from softgen.tokenizers.parts import by_rows, nearest_code


def build(image_size: int = 8, channels: tuple[int, ...] = (8, 8, 16)) -> ConvVQTokenizer:
    torch.manual_seed(1)
    return ConvVQTokenizer(image_size=image_size, num_codes=11, code_dim=4, channels=channels)


@pytest.mark.parametrize(
    ("image_size", "channels", "num_sites"), [(8, (8,), 64), (8, (8, 8, 16), 4), (28, (8, 8, 8), 49)]
)
def test_shapes_and_ranges(image_size: int, channels: tuple[int, ...], num_sites: int) -> None:
    tokenizer = build(image_size, channels)
    images = torch.rand(2, 3, image_size, image_size)
    latents, tokens = tokenizer.latents(images), tokenizer.encode(images)
    assert (tokenizer.num_sites, latents.shape, tokens.shape) == (num_sites, (2, num_sites, 4), (2, num_sites))
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(2, num_sites))
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(11))
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_decoding_tokens_is_decoding_their_rows() -> None:
    tokenizer, tokens = build(), torch.randint(11, (3, 4))
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode_embeddings(tokenizer.codebook[tokens]))


def test_codes_are_the_nearest_rows() -> None:
    tokenizer, images = build(), torch.rand(5, 3, 8, 8)
    distances = torch.cdist(tokenizer.latents(images).double(), tokenizer.codebook.double())
    assert torch.equal(tokenizer.encode(images), distances.argmin(-1))
    assert torch.equal(tokenizer.quantize(tokenizer.codebook), torch.arange(11))


def test_codes_are_the_same_a_few_latents_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, latents = build(), torch.randn(3, 4, 4)
    unit = torch.nn.functional.normalize(latents, dim=-1)
    expected = tokenizer.quantize(unit), nearest_code(latents, tokenizer.codebook)
    monkeypatch.setattr("softgen.tokenizers.parts.DENSE_LIMIT", 5 * 11)
    assert torch.equal(tokenizer.quantize(unit), expected[0])
    assert torch.equal(nearest_code(latents, tokenizer.codebook), expected[1])
    rows: list[int] = []

    def first(part: Tensor) -> Tensor:
        rows.append(len(part))
        return part[:, 0]

    assert torch.equal(by_rows(first, latents, num_codes=11), latents[..., 0])
    assert rows == [5, 5, 2]


def test_codes_do_not_depend_on_autocast() -> None:
    tokenizer = build()
    latents = torch.nn.functional.normalize(torch.randn(5000, 4), dim=-1)
    expected = tokenizer.quantize(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.quantize(latents), expected)


def test_sites_are_row_major() -> None:
    tokenizer = build(8, (8,))
    image = torch.zeros(1, 3, 8, 8)
    changed = image.clone()
    changed[0, :, 1, 2] = 1
    latent_change = (tokenizer.latents(changed) - tokenizer.latents(image)).norm(dim=-1).flatten()
    embeddings = torch.zeros(1, 64, 4)
    spot = embeddings.clone()
    spot[0, 1 * 8 + 2, 0] = 5
    pixels = (tokenizer.decode_raw(spot) - tokenizer.decode_raw(embeddings))[0].abs().sum(0)
    for largest in (int(latent_change.argmax()), int(pixels.argmax())):
        row, column = divmod(largest, 8)
        assert abs(row - 1) <= 1
        assert abs(column - 2) <= 1


def test_soft_codes_are_averaged_then_normalised() -> None:
    tokenizer, probs = build(), torch.rand(2, 4, 11).softmax(-1).requires_grad_()
    soft = tokenizer.embed_soft(probs)
    mean = probs @ tokenizer.codebook
    torch.testing.assert_close(soft, mean / mean.norm(dim=-1, keepdim=True))
    (gradient,) = torch.autograd.grad(tokenizer.decode_embeddings(soft).square().sum(), probs)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8), (2, 3, 8, 9)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    tokenizer = build()
    with pytest.raises(ValueError, match=r"^images: ") as caught:
        tokenizer.encode(torch.rand(shape))
    assert str(caught.value) == f"images: expected shape (B, 3, 8, 8), got {shape}"


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer.image_size: expected a multiple of 4, got 10$"):
        build(image_size=10)
    message = r"^tokenizer.num_codes and code_dim: expected at least 2 and 1, got 1 and 16$"
    with pytest.raises(ValueError, match=message):
        ConvVQTokenizer(image_size=8, num_codes=1)
    with pytest.raises(ValueError, match=r"^tokenizer.channels: expected at least one level, got none$"):
        build(channels=())


def test_the_round_trip_is_bit_equal(tmp_path: Path) -> None:
    tokenizer, images = build(), torch.rand(2, 3, 8, 8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = ConvVQTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.config == tokenizer.config
    assert torch.equal(again.latents(images), tokenizer.latents(images))
    assert torch.equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))


@pytest.mark.parametrize(("patch_size", "channels", "grid"), [(2, (8, 8), 4), (4, (8,), 4), (1, (8, 8, 8), 4)])
def test_patches_stand_for_levels(patch_size: int, channels: tuple[int, ...], grid: int) -> None:
    tokenizer = ConvVQTokenizer(image_size=16, num_codes=8, code_dim=4, channels=channels, patch_size=patch_size)
    assert tokenizer.grid == grid
    images = torch.rand(2, 3, 16, 16)
    assert tokenizer.encode(images).shape == (2, grid**2)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_a_patch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer.patch_size: expected at least 1, got 0$"):
        ConvVQTokenizer(image_size=16, num_codes=8, patch_size=0)


def test_a_patchwise_encoder_gives_equal_patches_equal_codes_and_sees_no_others() -> None:
    torch.manual_seed(1)
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=11, code_dim=4, channels=(8, 16), patch_size=2, patchwise=True)
    patch = torch.rand(1, 3, 4, 4)
    tokens = tokenizer.encode(patch.repeat(1, 1, 2, 2))
    assert tokens.unique().numel() == 1
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    (reach,) = torch.autograd.grad(tokenizer.latents(images)[0, 1].sum(), images)
    inside = reach[0].abs().sum(dim=0) > 0
    assert bool(inside[:4, 4:].all())
    assert int(inside.sum()) == 16
    # The decoder still sees all patches.
    embeddings = torch.randn(1, 4, 4, requires_grad=True)
    (reach,) = torch.autograd.grad(tokenizer.decode_raw(embeddings)[..., 0, 0].sum(), embeddings)
    assert bool((reach[0].abs().sum(dim=-1) > 0).all())
