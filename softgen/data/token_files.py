"""The files of a token cache: meta.json, and memory-mapped tokens and labels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

CACHE_FORMAT = "softgen-token-cache-1"
META_NAME = "meta.json"


@dataclass(frozen=True)
class TokenCacheMeta:
    """What `meta.json` says.

    Attributes:
        format: Always "softgen-token-cache-1".
        num_sites: Tokens an image, N.
        num_codes: Number of codes, K.
        dtype: "uint16" where all codes fit, else "int32".
        num_train: Training images.
        num_val: Held-out images.
        tokenizer_fingerprint: Hash of the tokenizer's weights, as `softgen.pretrained.fingerprint` gives it.
        image_size: Height and width of the encoded images in pixels.
        num_classes: Number of classes, or 0 where there are no labels.
    """

    format: str
    num_sites: int
    num_codes: int
    dtype: str
    num_train: int
    num_val: int
    tokenizer_fingerprint: str
    image_size: int
    num_classes: int


def read_meta(folder: Path) -> TokenCacheMeta:
    """Read a cache's `meta.json`.

    Raises:
        ValueError: The folder is missing or is not a token cache.
    """
    path = folder / META_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"data.root: expected a token cache, got '{folder}' ({error})") from error
    names = {field.name for field in fields(TokenCacheMeta)}
    if not isinstance(content, dict) or set(content) != names or content["format"] != CACHE_FORMAT:
        raise ValueError(f"data.root: expected a token cache, got '{folder}', whose {META_NAME} is of another kind")
    return TokenCacheMeta(**content)


class TokenSource:
    """Tokens and labels in memory-mapped files. A copy in a loader process maps the files anew.

    Args:
        folder: The token cache.
        split: "train" or "val".

    Raises:
        ValueError: A file is missing, truncated or does not fit `meta.json`.
    """

    def __init__(self, folder: Path, split: str) -> None:
        meta = read_meta(folder)
        n = meta.num_train if split == "train" else meta.num_val
        self.folder = folder
        self.split = split
        self.tokens = _open(folder / f"{split}_tokens.npy", shape=(n, meta.num_sites), dtype=meta.dtype)
        self.labels = _open(folder / f"{split}_labels.npy", shape=(n,), dtype="int64") if meta.num_classes else None

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenSource, (self.folder, self.split)

    def fetch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`token` (B, N) int64 and, where there are classes, `label` (B,) int64."""
        index = np.asarray(indices, dtype=np.int64)
        batch = {"token": torch.from_numpy(self.tokens[index].astype(np.int64))}
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[index].astype(np.int64))
        return batch


def _open(path: Path, *, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"data.root: expected a whole token cache, got '{path}' ({error})") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path}: expected {dtype} of shape {shape}, got {array.dtype} of shape {array.shape}")
    return array
