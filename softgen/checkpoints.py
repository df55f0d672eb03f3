"""Published checkpoints: reading their files, checking their names, and building a module around them.

A module is built without memory for weights and takes the file's tensors as they are, so that a checkpoint is read once
and held once.
"""

import importlib
import json
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from softgen.messages import reason_of
from softgen.pretrained import Pretrained, check_keys, resolve_folder

_WRAPPERS = ("module.", "_orig_mod.")
_ENTRIES = ("model_state_dict", "state_dict")
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_INDEX = ".safetensors.index.json"

# A tensor that tells a family, and how its checkpoints are called.
_SIGNATURES = (
    ("transformer.layers.0.0.fn.mha.in_proj_weight", "MaskGIT"),
    ("bits_to_indices", "MaskBit"),
    ("quantize.bits_to_indices", "the MaskBit tokenizer"),
    ("single_transformer_blocks.0.norm.linear.weight", "Meissonic"),
    ("text_embed_proj.weight", "MaskGen"),
    ("model.embeddings.word_embeddings.weight", "ImageBert"),
    ("in_blocks.0.attn.qkv.weight", "UViTBert"),
    ("decoder.text_guidance_proj.weight", "TA-TiTok"),
    ("decoder.learnable_embedding.weight", "SFTok"),
    ("latent_tokens", "TiTok"),
    ("encoder.latent_pos_embed", "SoftVQ-VAE"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight", "a VQModel of diffusers"),
    ("decoder.mid.attn_1.q.weight", "the Taming VQGAN"),
    ("decoder.mid.0.conv1.weight", "MaskGIT's VQGAN"),
    ("quantize.embedding.weight", "a VQ tokenizer"),
    ("text_model.embeddings.token_embedding.weight", "a CLIP text encoder"),
)

# The model of each published family, and its tokenizer; a tokenizer stands alone.
_FAMILIES: dict[str, tuple[str, str | None]] = {
    "maskgit": ("softgen.models.MaskGIT", "softgen.tokenizers.TamingVQGAN"),
    "maskbit": ("softgen.models.MaskBit", "softgen.tokenizers.MaskBitTokenizer"),
    "imagebert": ("softgen.models.ImageBert", "softgen.tokenizers.TiTok"),
    "uvitbert": ("softgen.models.UViTBert", "softgen.tokenizers.TiTok"),
    "meissonic": ("softgen.models.Meissonic", "softgen.tokenizers.DiffusersVQ"),
    "maskgen": ("softgen.models.MaskGen", "softgen.tokenizers.TATiTok"),
    "taming_vqgan": ("softgen.tokenizers.TamingVQGAN", None),
    "maskgit_vqgan": ("softgen.tokenizers.MaskGITVQGAN", None),
    "titok": ("softgen.tokenizers.TiTok", None),
    "tatitok": ("softgen.tokenizers.TATiTok", None),
    "sftok": ("softgen.tokenizers.SFTok", None),
    "softvq": ("softgen.tokenizers.SoftVQ", None),
    "diffusers_vq": ("softgen.tokenizers.DiffusersVQ", None),
    "vqgan_plus": ("softgen.tokenizers.VQGANPlusTokenizer", None),
}

M = TypeVar("M", bound=Pretrained)


def read_checkpoint(source: str | Path, *, key: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a published checkpoint.

    Nothing is unpickled but tensors (`torch.load(weights_only=True)`), and they are mapped from the file, not copied.
    A dictionary with `model_state_dict` or `state_dict` in it is opened at that entry; prefixes left by DDP and
    torch.compile are dropped.

    Args:
        source: A file (.safetensors, .bin, .pth, .pt, .ckpt), the .safetensors.index.json of one in several parts, a
            folder, or a hub id `owner/name`.
        key: The config key that named the source, for error messages.
        names: Files to look for in a folder or repository, in this order, whole or in parts; by default
            model.safetensors and pytorch_model.bin.

    Raises:
        ValueError: If there is no such file, or it is truncated, of another kind, or holds more than tensors.
    """
    path = find_checkpoint(source, key=key, names=names)
    if path.name.endswith(_INDEX):
        return _strip(_read_parts(path, key=key))
    if path.suffix == ".safetensors":
        return _strip(_read_safetensors(path, key=key))
    try:
        with _placeholders(path):
            # Files of before torch 1.6 are no archives, which alone can be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise ValueError(f"{key}: expected a checkpoint, got {path}, which does not exist") from error
    except Exception as error:
        hint = "" if _converting.get() else "; `python -m softgen.convert` drops what is not a tensor"
        raise ValueError(
            f"{key}: expected a whole checkpoint of tensors alone, got {path} ({reason_of(error)}){hint}"
        ) from error
    for entry in _ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{key}: expected a state dict in {path}, got something else")
    return _strip(content)


_converting: ContextVar[bool] = ContextVar("converting", default=False)


@contextmanager
def converting() -> Iterator[None]:
    """Within, objects that a checkpoint pickles besides tensors are read as inert placeholders.

    Their classes are neither imported nor called: `torch.load` keeps to `weights_only=True`.
    """
    token = _converting.set(True)
    try:
        yield
    finally:
        _converting.reset(token)


@contextmanager
def _placeholders(path: Path) -> Iterator[None]:
    if not _converting.get() or not path.is_file():
        yield
        return
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # what is no checkpoint is refused by the load that follows
        names = []
    with safe_globals([(_placeholder(name), name) for name in names]):
        yield


def _placeholder(name: str) -> type:
    """An empty class under a name; it takes any arguments and any state."""

    def ignore(self: object, *_: object, **__: object) -> None:
        return None

    return type(name.rpartition(".")[2], (), {"__init__": ignore, "__setstate__": ignore})


def published_families(name: str) -> tuple[type[Pretrained], type[Pretrained] | None]:
    """The class of a family's model, and that of its tokenizer; the class of a tokenizer, and None.

    Raises:
        ValueError: If the family is unknown.
    """
    if name not in _FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(sorted(_FAMILIES))}, got {name!r}")
    model, tokenizer = _FAMILIES[name]
    return _find_class(model), None if tokenizer is None else _find_class(tokenizer)


def _find_class(path: str) -> type[Pretrained]:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Pretrained)
    return cast(type[Pretrained], found)


def find_checkpoint(source: str | Path, *, key: str, names: Sequence[str] = ()) -> Path:
    """The file that a source stands for. Arguments and errors as `read_checkpoint`."""
    path = Path(source)
    if path.is_file():
        if path.suffix not in _SUFFIXES and not path.name.endswith(_INDEX):
            raise ValueError(f"{key}: expected a file of {', '.join(_SUFFIXES)}, got {path}")
        return path
    wanted = tuple(names) or ("model.safetensors", "pytorch_model.bin")
    parts = [name.replace(".safetensors", "-*.safetensors") for name in wanted if name.endswith(".safetensors")]
    folder = resolve_folder(source, key=key, patterns=("*.json", *wanted, *parts))
    for name in wanted:
        for file in (name, name.replace(".safetensors", _INDEX)):
            if (folder / file).is_file():
                return folder / file
    raise ValueError(f"{key}: expected {' or '.join(wanted)} in {folder}, got none of them")


def diffusers_names(part: str) -> tuple[str, ...]:
    """Files that may hold the weights of a part of a diffusers folder, seen from that folder or from the part's own."""
    files = ("diffusion_pytorch_model", "model", "pytorch_model")
    return tuple(
        f"{folder}{file}{suffix}"
        for folder in (f"{part}/", "")
        for file in files
        for suffix in (".safetensors", ".bin")
    )


def settings_beside(path: Path) -> dict[str, Any]:
    """What the config.json beside a checkpoint says; empty without one.

    Raises:
        ValueError: If it is no JSON object.
    """
    file = path.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"config.json: expected valid JSON in {file}, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config.json: expected a JSON object in {file}, got a {type(content).__name__}")
    return content


def published_settings(path: Path, *sections: str) -> dict[str, Any]:
    """What some sections of `model` say in the config.json beside a checkpoint, the later of them first.

    So TiTok's, MaskGen's and SFTok's authors publish them. Empty without such a file or section; errors as
    `settings_beside`.
    """
    model = settings_beside(path).get("model")
    found: dict[str, Any] = {}
    for section in sections:
        if isinstance(model, Mapping) and isinstance(model.get(section), Mapping):
            found |= model[section]
    return found


def build(
    cls: type[M],
    arguments: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    key: str,
    optional: Collection[str] = (),
    dropped: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> M:
    """A module of `arguments` that holds the tensors of `state`, in eval mode.

    Args:
        cls: The module's class; it overrides `Pretrained.restore_buffers` if it has buffers outside its state dict.
        arguments: Of its constructor.
        state: The checkpoint's tensors, named as the module's.
        key: The config key that named the checkpoint, for error messages.
        optional: Names that a checkpoint may lack, buffers that `restore_buffers` fills.
        dropped: Prefixes of tensors that have no part in the module, such as a training loss's.
        dtype: Of floating-point tensors; None keeps the checkpoint's.

    Raises:
        ValueError: If names or shapes disagree, saying of which family the checkpoint is where that is known.
    """
    prefixes = tuple(dropped)
    kept = {name: value for name, value in state.items() if not (prefixes and name.startswith(prefixes))}
    with _WithoutWeights():
        module = cls(**arguments)
    expected = module.state_dict()
    for name in optional:
        if name not in kept:
            expected.pop(name, None)
    try:
        check_keys(expected, kept, key=key)
    except ValueError as error:
        family = family_of(state)
        raise ValueError(f"{error} (a checkpoint of {family})" if family is not None else str(error)) from error
    if dtype is not None:
        kept = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
    module.load_state_dict(kept, strict=False, assign=True)
    module.restore_buffers()
    empty = [name for name, value in _tensors(module) if value.is_meta]
    assert not empty, f"restore_buffers of {cls.__name__} leaves out {', '.join(empty)}"
    return module.eval()


class _WithoutWeights(TorchFunctionMode):
    """Within, weights are neither allocated nor drawn; what a constructor computes, such as a buffer, is computed.

    Under `torch.device("meta")` alone the first draw, or the first product, loads torch's compiler, which takes longer
    than reading a large checkpoint.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == nn.init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if func in (torch.empty, torch.randn, torch.rand):
            given.pop("generator", None)
            hollow = torch.empty(*args, **{**given, "device": "meta"})
            return hollow if func is torch.empty else torch.zeros((), dtype=hollow.dtype).expand(hollow.shape)
        return func(*args, **given)


def family_of(state: Mapping[str, Any]) -> str | None:
    """What family a checkpoint is of, by its tensors' names; None if it is none that is known."""
    return next((family for name, family in _SIGNATURES if name in state), None)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _read_safetensors(path: Path, *, key: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key}: expected a whole safetensors file, got {path} ({error})") from error


def _read_parts(index: Path, *, key: str) -> dict[str, Tensor]:
    """The tensors of all the safetensors files that an index names, which lie beside it."""
    try:
        files = sorted({Path(file).name for file in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}: expected an index with a weight_map, got {index} ({reason_of(error)})") from error
    state: dict[str, Tensor] = {}
    for file in files:
        if not (index.parent / file).is_file():
            raise ValueError(f"{key}: expected {file} beside {index}, got none")
        state |= _read_safetensors(index.parent / file, key=key)
    return state


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before every name, and those of parts that were compiled by themselves."""
    stripped = {name.replace("._orig_mod.", "."): value for name, value in state.items()}
    while prefix := next((some for some in _WRAPPERS if stripped and all(n.startswith(some) for n in stripped)), None):
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped
