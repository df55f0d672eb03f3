"""The idx format of the MNIST family: a magic number, big-endian dimensions, then the bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

_UINT8 = 0x08


def read_idx(path: Path, *, ndim: int) -> Tensor:
    """Read an idx file of unsigned bytes, gzipped or plain.

    Args:
        path: The file; a name that ends in `.gz` is unzipped.
        ndim: Number of dimensions that it must have: 3 for grey images, 1 for labels.

    Returns:
        uint8 tensor of the file's own shape.

    Raises:
        ValueError: The file is truncated, is not idx, or has other dimensions.
    """
    content = _read_bytes(path)
    header = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, _UINT8, ndim)):
        raise ValueError(
            f"{path}: expected an idx file of bytes with {ndim} dimension(s), "
            f"magic 0x{_UINT8:06x}{ndim:02x}, got magic 0x{content[:4].hex()}"
        )
    if len(content) < header:
        raise ValueError(f"{path}: expected an idx header of {header} bytes, got {len(content)} bytes")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, got {len(content) - header}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got one that does not unzip ({error})") from error
