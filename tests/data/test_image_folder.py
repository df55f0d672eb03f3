import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softgen.data import ImageFolder
from softgen.data.image_files import read_image


def save(path: Path, size: tuple[int, int] = (8, 8), colour: tuple[int, int, int] = (255, 0, 51)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    for index in range(10):
        save(tmp_path / "cat" / f"{index}.png", colour=(index, 0, 0))
        save(tmp_path / "ant" / f"{index}.PNG", colour=(0, index, 0))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no images here")
    return tmp_path


def test_classes_are_sorted_folders_with_images(two_classes: Path) -> None:
    data = ImageFolder(two_classes, image_size=8, val_fraction=0.2)
    assert (data.class_names, data.num_classes, data.image_size) == (["ant", "cat"], 2, 8)
    data.setup("fit")
    train, val = data.train_source(), data.val_source()
    assert (len(train), len(val)) == (16, 4)
    batch = train.fetch(range(16))
    assert batch["image"].shape == (16, 3, 8, 8)
    assert batch["label"].tolist() == [0] * 8 + [1] * 8
    assert (batch["image"][:8, 0] == 0).all()
    assert (batch["image"][8:, 1] == 0).all()
    reds = torch.cat([batch["image"], val.fetch(range(4))["image"]])[:, 0, 0, 0]
    torch.testing.assert_close(reds.sum() * 255, torch.tensor(45.0))


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for index, suffix in enumerate(("png", "jpg", "jpeg", "webp", "bmp")):
        save(tmp_path / f"{index}.{suffix}")
    data = ImageFolder(tmp_path, image_size=8, val_fraction=0.2)
    assert data.num_classes == 0
    batch = data.train_source().fetch(range(4))
    assert set(batch) == {"image"}
    torch.testing.assert_close(batch["image"].mean(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.2]), atol=0.02, rtol=0)


def test_shorter_edge_is_scaled_and_the_centre_cut(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 20))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    for index in range(2):
        image.save(tmp_path / f"{index}.png")
    source = ImageFolder(tmp_path, image_size=10, val_fraction=0.5).train_source()
    pixels = source.fetch([0])["image"][0]
    assert pixels.shape == (3, 10, 10)
    assert (pixels[:, :, 1:9] > 0.98).all()
    larger = ImageFolder(tmp_path, image_size=10, resize=20, val_fraction=0.5).train_source()
    torch.testing.assert_close(larger.fetch([0])["image"][0], torch.ones(3, 10, 10))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_keeps_its_levels(tmp_path: Path, suffix: str) -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (tmp_path / "a").mkdir()
    Image.fromarray(levels).save(tmp_path / "a" / f"a.{suffix}")
    pixels = read_image(tmp_path / "a" / f"a.{suffix}", image_size=8, resize=8)
    assert pixels.shape == (3, 8, 8)
    expected = torch.from_numpy(levels.astype(np.float32)) / 65535
    assert (pixels - expected).abs().max().item() < 1.01 / 255


def test_scaling_is_antialiased(tmp_path: Path) -> None:
    image = Image.new("L", (64, 64))
    image.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    for index in range(2):
        image.save(tmp_path / f"{index}.png")
    pixels = ImageFolder(tmp_path, image_size=8, val_fraction=0.5).train_source().fetch([0])["image"]
    assert (pixels[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.03


def test_flips_are_a_fixed_half_of_the_training_images(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 4, 8))
    for index in range(64):
        image.save(tmp_path / f"{index:02}.png")

    def flipped(seed: int) -> list[bool]:
        source = ImageFolder(tmp_path, image_size=8, val_fraction=0.25, random_flip=True, seed=seed).train_source()
        return [bool(row[0, 0, 0] == 0) for row in source.fetch(range(48))["image"]]

    assert 12 < sum(flipped(0)) < 36
    assert flipped(0) == flipped(0)
    assert flipped(0) != flipped(1)
    val = ImageFolder(tmp_path, image_size=8, val_fraction=0.25, random_flip=True).val_source()
    assert (val.fetch(range(16))["image"][:, 0, 0, 0] == 1).all()


def test_corrupt_images_are_skipped_with_one_warning(two_classes: Path) -> None:
    (two_classes / "ant" / "3.PNG").write_bytes(b"not an image")
    (two_classes / "cat" / "4.png").write_bytes((two_classes / "cat" / "5.png").read_bytes()[:50])
    data = ImageFolder(two_classes, image_size=8, val_fraction=0.2)
    with pytest.warns(UserWarning, match="corrupt") as caught:
        data.setup("fit")
    first = two_classes / "ant" / "3.PNG"
    assert [str(w.message) for w in caught] == [f"data.root: skipped 2 corrupt image(s), the first is '{first}'"]
    assert len(data.train_source()) + len(data.val_source()) == 18


@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"II*\0"])
def test_a_damaged_exif_block_is_found_with_the_others(exif: bytes, two_classes: Path) -> None:
    bad = two_classes / "ant" / "exif.png"
    Image.new("RGB", (8, 8)).save(bad, exif=exif)
    with pytest.warns(UserWarning, match=r"skipped 1 corrupt image\(s\)"):
        assert len(ImageFolder(two_classes, image_size=8, val_fraction=0.2).train_source()) == 16


def test_an_image_too_large_to_open_is_skipped(two_classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(two_classes / "ant" / "large.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # twice as many are an error
    with pytest.warns(UserWarning, match=r"skipped 1 corrupt image\(s\)"):
        assert len(ImageFolder(two_classes, image_size=8, val_fraction=0.2).train_source()) == 16


def test_strict_refuses_a_corrupt_image(two_classes: Path) -> None:
    bad = two_classes / "cat" / "4.png"
    bad.write_bytes(b"")
    message = f"data.root: expected images only (data.strict is true), got a corrupt '{bad}'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageFolder(two_classes, image_size=8, strict=True).setup("fit")


def test_only_corrupt_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    message = f"data.root: expected a folder with images, got only corrupt ones in '{tmp_path}'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ImageFolder(tmp_path, image_size=8).setup("fit")


def test_an_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    for index in range(2):
        save(tmp_path / f"{index}.png")
    source = ImageFolder(tmp_path, image_size=8, val_fraction=0.5).train_source()
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data.root: expected an image, got '.*\.png', which cannot be read"):
        source.fetch([0])


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"^data.root: expected a folder with images, got '{tmp_path}', which has none$"
    ):
        ImageFolder(tmp_path, image_size=8)
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=f"^data.root: expected a folder with images, got '{missing}', which is no"):
        ImageFolder(missing, image_size=8)


def test_sizes_are_checked(two_classes: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.image_size: expected at least 1, got 0$"):
        ImageFolder(two_classes, image_size=0)
    with pytest.raises(ValueError, match=r"^data.resize: expected at least data.image_size \(8\), got 7$"):
        ImageFolder(two_classes, image_size=8, resize=7)
