"""Scoring class-conditional models against real images, by a protocol."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from softgen.classifier import RECIPES, named_data
from softgen.data.base import ImageDataModule
from softgen.data.token_cache import check_shows_images
from softgen.files import write_json
from softgen.generation import Generated, TokenSource, balanced_labels, generate_batches
from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.protocol import Protocol, adm_protocol, small_protocol
from softgen.pretrained import CONFIG_NAME
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer

INCEPTION = "inception"
"""In place of the folder of an extractor: the FID of the papers."""
PUBLISHED_N = 50_000
"""Images of a published FID."""


@dataclass(frozen=True)
class Row:
    """One line of a table: `fd` is the Frechet distance that the protocol names."""

    name: str
    protocol: str
    fd: float
    n: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    entropy_score: float | None
    seconds: float


def default_n(*, extractor: str | None, is_digits: bool) -> int:
    """As many samples as figures of that kind are over."""
    if extractor == INCEPTION:
        return PUBLISHED_N
    return 1797 if is_digits else 10_000


def protocol_of(
    num_classes: int,
    image_size: int,
    *,
    data: ImageDataModule | None,
    data_name: Literal["digits", "fashion_mnist"],
    data_root: str,
    extractor: str | None,
    statistics: str | None,
    inception_weights: str | None,
    device: torch.device,
) -> Protocol:
    """What real images the samples are compared with, and through which network."""
    if extractor == INCEPTION:
        if data is not None:
            _check_data(data, num_classes=num_classes, image_size=image_size, key="data")
        return adm_protocol(statistics=statistics, data=data, weights=inception_weights, device=device)
    for name, value in (("statistics", statistics), ("inception_weights", inception_weights)):
        if value is not None:
            raise ValueError(f"{name}: expected extractor {INCEPTION} to go with it, got {extractor or 'none'}")
    real = named_data(data_name, data_root=data_root) if data is None else data
    if data is not None and extractor is None:
        raise ValueError(f"extractor: expected the folder of a classifier or {INCEPTION} to go with data, got none")
    key = "data_name" if data is None else "data"
    _check_data(real, num_classes=num_classes, image_size=image_size, key=key)
    if extractor is not None:
        _check_extractor(extractor, real, needed=data is not None)
    if data is None:
        return named_protocol(data_name, data_root=data_root, folder=extractor)
    assert extractor is not None
    return small_protocol(data, name=Path(extractor).name, epochs=8, folder=extractor)


def _check_data(data: ImageDataModule, *, num_classes: int, image_size: int, key: str) -> None:
    check_shows_images(data, key=key)
    if num_classes and data.num_classes != num_classes:
        raise ValueError(f"{key}: expected {num_classes} classes as the model has, got {data.num_classes}")
    if data.image_size != image_size:
        raise ValueError(f"{key}: expected images of {image_size} pixels as the model draws, got {data.image_size}")


def _check_extractor(folder: str, data: ImageDataModule, *, needed: bool) -> None:
    """Before any sample is drawn: a classifier of other images is not one for these."""
    if not (Path(folder) / CONFIG_NAME).is_file():
        if needed:
            raise ValueError(f"extractor: expected the folder of a classifier or {INCEPTION}, got {folder!r}")
        return
    extractor = SmallClassifier.from_pretrained(folder, key="extractor")
    for name in ("image_size", "num_classes"):
        expected, got = getattr(data, name), getattr(extractor, name)
        if expected != got:
            raise ValueError(f"extractor.{name}: expected {expected} as the data has, got {got}")


def named_protocol(
    name: Literal["digits", "fashion_mnist"],
    *,
    data_root: str,
    folder: str | None = None,
    progress: bool = True,
) -> Protocol:
    """The protocol of a data set that comes with the toolkit: `digitsnet` or `fashionnet`."""
    from softgen.data import Digits

    recipe = RECIPES[name]
    return small_protocol(
        named_data(name, data_root=data_root),
        name=recipe.name,
        epochs=recipe.epochs,
        width=recipe.width,
        folder=folder if folder is not None else f"runs/{name}/extractor",
        reference=Digits(train_on_all=True) if name == "digits" else None,
        progress=progress,
    )


def score_classes(
    sources: Mapping[str, TokenSource],
    decoder: ImageTokenizer | ContinuousTokenizer,
    *,
    num_classes: int,
    protocol: Protocol,
    n: int,
    seed: int,
    batch_size: int,
    out: str | None,
    facts: Mapping[str, object],
) -> None:
    """Sample, score and print a row a source."""
    if protocol.metric == "fid" and n != PUBLISHED_N:
        warnings.warn(
            f"n: a published FID is over {PUBLISHED_N:,} images, this one over {n:,}: the two do not compare",
            stacklevel=2,
        )
    rows = []
    labels = balanced_labels(n, num_classes=num_classes)
    for name, source in sources.items():
        seconds: list[float] = []
        batches = generate_batches(source, decoder, labels, seed=seed, batch_size=batch_size, progress=name)
        quality = protocol.score(_timed(batches, seconds), labels if num_classes else None)
        row = Row(name=name, protocol=protocol.name(n), seconds=round(sum(seconds), 3), **asdict(quality))
        rows.append(row)
        print(_line(row))
    if protocol.facts:
        print(", ".join(f"{name} {value}" for name, value in protocol.facts.items()))
    if out is not None:
        write_json(Path(out), {**facts, **protocol.facts, "rows": [asdict(row) for row in rows]})


def _timed(batches: Iterable[Generated], seconds: list[float]) -> Iterator[Tensor]:
    """The images alone; what their sampling took goes to `seconds`."""
    for batch in batches:
        seconds.append(batch.seconds)
        yield batch.images


def _line(row: Row) -> str:
    parts = [f"{row.name:12s} {row.protocol} {row.fd:.3f}"]
    for key in ("accuracy", "precision", "recall", "entropy_score"):
        value = getattr(row, key)
        if value is not None:
            parts.append(f"{key} {value:.3f}")
    return "  ".join([*parts, f"n {row.n}", f"sampling {row.seconds:.1f} s"])
