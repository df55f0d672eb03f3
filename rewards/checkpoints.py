"""Reading weights, and putting them into a module with names and shapes checked both ways. Nothing is unpickled."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.errors import one_line


def read_checkpoint(source: str | Path, *, key: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a file (.safetensors, or what `torch.load(weights_only=True)` reads).

    Args:
        source: The file; or a folder or a hub id that holds one of `names`.
        key: The argument that named it, for error messages.
        names: Files to look for, in this order.

    Raises:
        ValueError: There is no such file, it is truncated, or it holds more than tensors.
    """
    path = find_file(source, key=key, names=names)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # safetensors, zip and torch each have errors of their own
        raise ValueError(f"{key}: expected a whole file of weights, got {path} ({one_line(error)})") from error
    for entry in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{key}: expected a state dict in {path}, got something else")
    return content


def find_file(source: str | Path, *, key: str, names: Sequence[str]) -> Path:
    """The file that a source stands for. Arguments and errors as `read_checkpoint`."""
    path = Path(source)
    if path.is_file():
        return path
    folder = path
    if not path.is_dir():
        folder = _download(str(source), key=key, names=names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{key}: expected a file, or a folder with {' or '.join(names) or 'one'}, got '{source}'")


def _download(source: str, *, key: str, names: Sequence[str]) -> Path:
    parts = source.split("/")
    if not names or len(parts) != 2 or not all(parts) or source.startswith((".", "~")):
        raise ValueError(f"{key}: expected a file{', a folder or a hub id' if names else ''}, got '{source}'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[*names, "*.json"]))
    except Exception as error:  # the hub has errors of its own
        raise ValueError(f"{key}: expected a reachable hub id, got {source!r} ({one_line(error)})") from error


def load_checked(module: nn.Module, state: Mapping[str, Any], *, key: str) -> None:
    """Load weights, naming the first missing, unexpected and misshapen tensor where they do not fit.

    Raises:
        ValueError: They do not fit.
    """
    expected = module.state_dict()
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"{len(missing)} missing, first {missing[0]!r}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected, first {unexpected[0]!r}")
    for name, value in expected.items():
        if name in state and state[name].shape != value.shape:
            problems.append(f"{name!r} of shape {tuple(state[name].shape)} instead of {tuple(value.shape)}")
            break
    if problems:
        raise ValueError(f"{key}: expected the weights of a {type(module).__name__}, got {'; '.join(problems)}")
    module.load_state_dict(dict(state))


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
