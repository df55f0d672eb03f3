"""A data set's tokens: encoded once with a tokenizer, then read from memory-mapped files."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from tqdm.auto import tqdm

from softgen.data.base import ImageDataModule, SampleSource, TrainVal
from softgen.data.batches import source_batches
from softgen.data.token_files import CACHE_FORMAT, META_NAME, TokenCacheMeta, TokenSource, read_meta
from softgen.pretrained import fingerprint


class TokenCache(ImageDataModule):
    """Tokens that a tokenizer made of a data set, so that training need not encode the images every time.

    Args:
        root: Folder that `write_token_cache` wrote.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes.
        seed: Seed of the order of samples.

    Attributes:
        num_sites: Tokens an image, N.
        num_codes: Number of codes, K.
        tokenizer_fingerprint: Hash of the tokenizer's weights, to check that a model decodes with the same
            one.

    Raises:
        ValueError: An argument is out of range or `root` is no token cache; at setup: a file is missing,
            truncated or does not fit `meta.json`.
    """

    def __init__(self, root: str | Path, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.root = Path(root)
        meta = read_meta(self.root)
        self.image_size = meta.image_size
        self.num_classes = meta.num_classes
        self.num_sites = meta.num_sites
        self.num_codes = meta.num_codes
        self.tokenizer_fingerprint = meta.tokenizer_fingerprint

    def load_sources(self) -> TrainVal:
        """Map the files of both parts."""
        return TrainVal(train=TokenSource(self.root, "train"), val=TokenSource(self.root, "val"))


def check_shows_images(data: ImageDataModule, *, key: str = "data") -> None:
    """Refuse data whose batches hold no images but tokens, labels or prompts.

    Raises:
        ValueError: Naming the key.
    """
    if not data.has_images or isinstance(data, TokenCache):
        raise ValueError(f"{key}: expected images, got {type(data).__name__}")


class Tokenizer(Protocol):
    """What is asked of a tokenizer here, besides that it is an `nn.Module`."""

    num_sites: int
    num_codes: int

    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, N) int64 of images (B, 3, H, W) in [0, 1]."""
        ...


def write_token_cache(
    folder: str | Path,
    tokenizer: Tokenizer,
    data: ImageDataModule,
    *,
    batch_size: int = 256,
    progress: bool = True,
) -> None:
    """Encode the training and the held-out images, and write them as a folder for `TokenCache`.

    The folder appears whole or not at all: it is written as a temporary sibling and renamed. Tokens take 2
    bytes each where all codes fit (K up to 65,536), else 4.

    Args:
        folder: Where to write. An older token cache there is replaced.
        tokenizer: An `nn.Module` with `encode`, `num_sites` and `num_codes`; used in eval mode, on its
            device.
        data: The images, and their labels if `data.num_classes` is not 0.
        batch_size: Images a pass.
        progress: Show a progress bar.

    Raises:
        ValueError: The folder exists and is neither empty nor a token cache, the data has no images, or the tokenizer
            is no `nn.Module` or gives tokens of another shape or range than it declares.
    """
    check_shows_images(data)
    if not isinstance(tokenizer, nn.Module):
        raise ValueError(f"tokenizer: expected an nn.Module, got {type(tokenizer).__name__}")
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        read_meta(target)
    data.prepare_data()
    meta = _describe(tokenizer, data)
    with _written_as_a_whole(target) as scratch, _encoding(tokenizer):
        for split, source in (("train", data.train_source()), ("val", data.val_source())):
            bar = tqdm(total=len(source), desc=f"encoding {split}", unit="image", disable=not progress)
            with bar:
                for done in _write_split(scratch, split, source, tokenizer, meta=meta, batch_size=batch_size):
                    bar.update(done)
        (scratch / META_NAME).write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")


def _describe(tokenizer: Tokenizer, data: ImageDataModule) -> TokenCacheMeta:
    """The cache's `meta.json`, before anything is encoded."""
    assert isinstance(tokenizer, nn.Module)
    return TokenCacheMeta(
        format=CACHE_FORMAT,
        num_sites=tokenizer.num_sites,
        num_codes=tokenizer.num_codes,
        dtype="uint16" if tokenizer.num_codes <= 2**16 else "int32",
        num_train=len(data.train_source()),
        num_val=len(data.val_source()),
        tokenizer_fingerprint=fingerprint(tokenizer),
        image_size=data.image_size,
        num_classes=data.num_classes,
    )


def _write_split(
    folder: Path,
    split: str,
    source: SampleSource,
    tokenizer: Tokenizer,
    *,
    meta: TokenCacheMeta,
    batch_size: int,
) -> Iterator[int]:
    """Write one split's files; yields the number of images of each batch once it is written."""
    shape = (len(source), meta.num_sites)
    tokens = open_memmap(folder / f"{split}_tokens.npy", mode="w+", dtype=np.dtype(meta.dtype), shape=shape)
    labels = np.zeros(len(source), dtype=np.int64)
    start = 0
    for batch in source_batches(source, batch_size=batch_size):
        encoded = _encode(tokenizer, batch["image"], meta=meta)
        rows = slice(start, start + len(encoded))
        tokens[rows] = encoded.numpy()
        if meta.num_classes:
            labels[rows] = batch["label"].numpy()
        start = rows.stop
        yield len(encoded)
    tokens.flush()
    if meta.num_classes:
        np.save(folder / f"{split}_labels.npy", labels)


def _encode(tokenizer: Tokenizer, images: Tensor, *, meta: TokenCacheMeta) -> Tensor:
    """Checked tokens (B, N) on the CPU."""
    assert isinstance(tokenizer, nn.Module)
    parameter = next(tokenizer.parameters(), None)
    tokens = tokenizer.encode(images if parameter is None else images.to(parameter.device)).cpu()
    if tokens.shape != (len(images), meta.num_sites):
        raise ValueError(
            f"tokenizer: expected tokens of shape {(len(images), meta.num_sites)}, got {tuple(tokens.shape)}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= meta.num_codes:
        raise ValueError(f"tokenizer: expected tokens from 0 to {meta.num_codes - 1}, got {low} to {high}")
    return tokens


@contextmanager
def _encoding(tokenizer: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode is restored."""
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        tokenizer.train(was_training)


@contextmanager
def _written_as_a_whole(target: Path) -> Iterator[Path]:
    """A temporary sibling to write into, which takes the target's place if no error was raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
            os.replace(target, old)
            os.replace(scratch, target)
            shutil.rmtree(old)
        else:
            os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
