"""Opening a module that was saved as a folder: config.json with class_path and init_args, and model.safetensors."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rewards.base import Reward
from rewards.errors import one_line


def load_module(folder: str | Path, *, key: str) -> nn.Module:
    """Import the class that the folder's config names, build it and load its weights. Nothing is unpickled.

    Args:
        folder: Holds config.json, {"class_path": ..., "init_args": {...}}, in which an argument may be such a mapping
            itself, and model.safetensors.
        key: The argument that named the folder, for error messages.

    Returns:
        The module in eval mode.

    Raises:
        ValueError: The folder is missing or foreign, its class cannot be imported or built, or the weights do not fit.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{key}: expected a folder with config.json and model.safetensors, got '{folder}'")
    module = _build(_config(path / "config.json", key=key), key=key)
    _load_weights(module, path / "model.safetensors", key=key)
    return module.eval()


def _config(path: Path, *, key: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: expected a readable {path}, got an error ({one_line(error)})") from error
    if not isinstance(config, dict) or "class_path" not in config:
        raise ValueError(f"{key}: expected {path} to name a class_path, got none")
    return config


def _build(config: Mapping[str, Any], *, key: str) -> nn.Module:
    class_path = str(config["class_path"])
    module_name, _, class_name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: expected an importable class_path, got {class_path!r} ({one_line(error)})") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{key}: expected the class_path of an nn.Module, got {class_path!r}")
    if issubclass(cls, Reward):  # one of them starts programs
        raise ValueError(f"{key}: expected the class_path of an nn.Module that is no reward, got {class_path!r}")
    init_args = {
        name: _build(value, key=key) if isinstance(value, dict) and "class_path" in value else value
        for name, value in config.get("init_args", {}).items()
    }
    try:
        return cls(**init_args)
    except TypeError as error:
        raise ValueError(f"{key}: expected the arguments of {class_name}, got an error ({one_line(error)})") from error


def _load_weights(module: nn.Module, path: Path, *, key: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}: expected whole weights in {path}, got an error ({one_line(error)})") from error
    except RuntimeError as error:
        name = type(module).__name__
        raise ValueError(
            f"{key}: expected the weights of a {name} in {path}, got others ({one_line(error)})"
        ) from error
