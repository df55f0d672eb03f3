"""Saving a module as a folder, config.json + model.safetensors, and opening it from a path or a hub id."""

import hashlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from softgen.messages import reason_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_FORMAT = 1

M = TypeVar("M", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that knows the arguments it was built from, and so can be saved and rebuilt.

    Subclasses set `self.config` in `__init__` to their own arguments: JSON values, or other `Pretrained` modules.
    """

    config: dict[str, Any]

    def on_weights_averaged(self) -> None:
        """Called after the weights were replaced by an average: restore what averaging breaks."""

    def restore_buffers(self) -> None:
        """Called on a module that was built on the meta device: compute the buffers that no checkpoint holds."""

    def write_weights(self, folder: Path) -> None:
        """Write model.safetensors; a class whose weights others open too may write their format instead."""
        from safetensors.torch import save_file

        # Clones: tied tensors share storage, which safetensors refuses.
        weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_NAME)

    def read_weights(self, folder: Path, *, key: str) -> None:
        """Load what `write_weights` wrote.

        Raises:
            ValueError: If it is missing, truncated, foreign or not finite.
        """
        load_weights(self, folder / WEIGHTS_NAME, key=key)

    def save_pretrained(self, folder: str | Path, *, tokenizer: "Pretrained | None" = None) -> None:
        """Write config.json and model.safetensors, all of it or nothing.

        Args:
            folder: Replaced if it exists and holds a saved module.
            tokenizer: The tokenizer whose codes this module models, saved in the subfolder `tokenizer`, so that
                one path is enough for every later stage.

        Raises:
            ValueError: If the folder exists and is something else.
        """
        target = Path(folder)
        check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
        try:
            _write(self, scratch)
            if tokenizer is not None:
                _write(tokenizer, scratch / "tokenizer")
            _swap(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def from_pretrained(cls: type[M], source: str | Path, *, key: str = "path") -> M:
        """Open a folder written by `save_pretrained`, or a hub repository that holds one.

        Args:
            source: A folder, or a hub id `owner/name`.
            key: The config key that named the source, for error messages.

        Returns:
            The module in eval mode, its weights of the types that were saved.

        Raises:
            ValueError: If the source is missing, truncated, foreign or of another class.
        """
        folder = resolve_folder(source, key=key)
        config, config_key = read_config(folder, key=key), f"{key} ({folder / CONFIG_NAME})"
        module = _from_config_without_memory(config, key=config_key)
        if not isinstance(module, cls):
            raise ValueError(f"{key}: expected a {cls.__name__} in {folder}, got a {type(module).__name__}")
        module.read_weights(folder, key=key)
        if _is_hollow(module):
            module = from_config(config, key=config_key)
            module.read_weights(folder, key=key)
        return cast(M, module.eval())


def to_config(module: Pretrained) -> dict[str, Any]:
    """The module's class and arguments as JSON values, nested modules included."""
    init_args = {
        name: to_config(value) if isinstance(value, Pretrained) else value for name, value in module.config.items()
    }
    return {"class_path": f"{type(module).__module__}.{type(module).__qualname__}", "init_args": init_args}


def from_config(config: Mapping[str, Any], *, key: str) -> Pretrained:
    """Build the module that `to_config` described, with fresh weights."""
    module_name, _, class_name = str(config["class_path"]).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: expected an importable class_path, got {config['class_path']!r}") from error
    if not (isinstance(cls, type) and issubclass(cls, Pretrained)):
        raise ValueError(f"{key}: expected the class_path of a softgen module, got {config['class_path']!r}")
    given = config.get("init_args", {})
    if not isinstance(given, dict):
        raise ValueError(f"{key}: expected init_args to be a mapping, got a {type(given).__name__}")
    init_args = {
        name: from_config(value, key=key) if isinstance(value, dict) and "class_path" in value else value
        for name, value in given.items()
    }
    try:
        return cls(**init_args)
    except (TypeError, KeyError, ZeroDivisionError) as error:
        got = error if isinstance(error, TypeError) else repr(error)
        raise ValueError(f"{key}: expected the arguments of {class_name}, got {got}") from error


def resolve_folder(source: str | Path, *, key: str, patterns: Sequence[str] = ("*.json", "*.safetensors")) -> Path:
    """A local folder as it is; otherwise the hub repository of that id, its files of `patterns` downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "/", "~")):
        raise ValueError(f"{key}: expected a folder or a hub id 'owner/name', got {str(source)!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except Exception as error:
        raise ValueError(
            f"{key}: expected a folder or a reachable hub id, got {str(source)!r} ({reason_of(error)})"
        ) from error


def read_config(folder: Path, *, key: str) -> dict[str, Any]:
    """The parsed config.json of a saved module."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{key}: expected a folder with {CONFIG_NAME}, got {folder} without one")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: expected valid JSON in {path}, got {error}") from error
    if not isinstance(config, dict) or "class_path" not in config:
        raise ValueError(f"{key}: expected {path} to name a class_path, got a config of another project")
    if config.get("softgen_format", _FORMAT) != _FORMAT:
        raise ValueError(f"{key}: expected softgen_format {_FORMAT} in {path}, got {config['softgen_format']}")
    return config


def load_weights(module: nn.Module, path: Path, *, key: str) -> None:
    """Load a safetensors file, with names and shapes checked both ways; onto the meta device by assignment."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{key}: expected weights in {path}, got no such file")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}: expected a whole safetensors file, got {path} ({error})") from error
    check_keys(module.state_dict(), weights, key=f"{key} ({path})")
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{key}: expected finite weights in {path}, got NaN or infinity in {name!r}")
    on_meta = {name for name, value in module.state_dict().items() if value.is_meta}
    module.load_state_dict(weights, assign=bool(on_meta))
    for part in module.modules():
        if on_meta and isinstance(part, Pretrained):
            part.restore_buffers()


def _from_config_without_memory(config: Mapping[str, Any], *, key: str) -> Pretrained:
    """The module on the meta device, to which the file's tensors are given; as usual where it needs values to begin."""
    try:
        with torch.device("meta"):
            return from_config(config, key=key)
    except (RuntimeError, NotImplementedError):
        return from_config(config, key=key)


def _is_hollow(module: nn.Module) -> bool:
    """Whether a module that was built on the meta device still holds a tensor without values, registered or not."""
    for part in module.modules():
        held = [*part.parameters(recurse=False), *part.buffers(recurse=False), *vars(part).values()]
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in held):
            return True
    return False


def check_keys(expected: Mapping[str, Any], got: Mapping[str, Any], *, key: str) -> None:
    """Compare two state dicts by name and shape.

    Raises:
        ValueError: Naming the first missing, the first unexpected and the first misshapen tensor.
    """
    problems = []
    if missing := [name for name in expected if name not in got]:
        problems.append(f"{len(missing)} missing, first {missing[0]!r}")
    if unexpected := [name for name in got if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected, first {unexpected[0]!r}")
    for name, value in expected.items():
        if name in got and getattr(value, "shape", None) != getattr(got[name], "shape", None):
            problems.append(f"{name!r} of shape {tuple(got[name].shape)} instead of {tuple(value.shape)}")
            break
    if problems:
        raise ValueError(f"{key}: expected the tensors of this model, got {'; '.join(problems)}")


def _write(module: Pretrained, folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"softgen_format": _FORMAT, **to_config(module)}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    module.write_weights(folder)


def check_target(folder: Path) -> None:
    """Refuse to overwrite what is no saved module.

    Raises:
        ValueError: If the folder exists and is something else.
    """
    if not folder.exists() or _is_empty(folder):
        return
    try:
        read_config(folder, key="save_pretrained")
    except ValueError as error:
        message = f"save_pretrained: expected {folder} to be new or a saved module, got something else"
        raise ValueError(message) from error


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _swap(scratch: Path, target: Path) -> None:
    """Put `scratch` in the place of `target`; whatever was there goes only after the new folder is complete."""
    if not target.exists():
        os.replace(scratch, target)
        return
    old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    os.replace(target, old)
    os.replace(scratch, target)
    shutil.rmtree(old)


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def fingerprint(module: nn.Module) -> str:
    """A short hash of the names, shapes and values of a module's parameters and buffers.

    And of the settings of one of ours that are plain values: how many tokens an image has is in no weight.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(module, Pretrained):
        plain = {name: value for name, value in module.config.items() if _is_plain(value)}
        digest.update(json.dumps(plain, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
