"""Opening a CLIP model of open_clip, from local weights or by one of its tags."""

import difflib
import importlib.util
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.errors import one_line
from rewards.preprocessing import Preprocessing

RANDOM = "random"
_TRANSFORMERS = "transformers:"
_SCHEMAS = ("hf-hub:", "local-dir:")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class CLIPParts:
    """A CLIP model in float32 on the CPU, and what belongs to it.

    Attributes:
        model: With `encode_image`, `encode_text` and `logit_scale`.
        tokenizer: Maps strings to token ids (B, context_length), and has `context_length`.
        preprocessing: Of the images.
    """

    model: Any
    tokenizer: Callable[..., Any]
    preprocessing: Preprocessing


def load_clip(model_name: str, *, pretrained: str | Path | None, quick_gelu: bool) -> CLIPParts:
    """Build the model and load its weights, by safetensors or `torch.load(weights_only=True)` alone.

    Args:
        model_name: An architecture of open_clip, such as "ViT-B-32"; or "local-dir:FOLDER" or "hf-hub:OWNER/NAME",
            which bring their weights; or "transformers:SOURCE", see `load_transformers_clip`.
        pretrained: A file of weights, a folder with one such file, or a tag of open_clip, which is downloaded; "random"
            for untrained weights. None where `model_name` brings the weights.
        quick_gelu: Use the activation of OpenAI's own weights. A tag knows this by itself.

    Raises:
        ImportError: open_clip is not installed, or transformers, which the model's text tower or tokenizer needs.
        ValueError: An unknown model, tag or file, or weights that cannot be loaded or do not fit.
    """
    if model_name.startswith(_TRANSFORMERS):
        if pretrained is not None:
            raise ValueError(
                f"pretrained: expected none beside {model_name!r}, which brings its weights, got '{pretrained}'"
            )
        return load_transformers_clip(model_name.removeprefix(_TRANSFORMERS))
    open_clip = _open_clip()
    brings_weights = model_name.startswith(_SCHEMAS)
    if brings_weights and pretrained is not None:
        raise ValueError(
            f"pretrained: expected none beside {model_name!r}, which brings its weights, got '{pretrained}'"
        )
    name = model_name if brings_weights else _architecture(open_clip, model_name)
    weights = None if brings_weights else _weights(open_clip, name, pretrained)
    tag = open_clip.get_pretrained_cfg(name, weights) if weights and not Path(weights).is_file() else {}
    try:
        model = open_clip.create_model(
            name,
            pretrained=weights,
            force_quick_gelu=quick_gelu or bool(tag.get("quick_gelu", False)),
            pretrained_text=False,
            require_pretrained=brings_weights or weights is not None,
            weights_only=True,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, torch and the hub each have errors of their own
        raise _in_one_line(error, model_name=model_name, pretrained=pretrained) from error
    return CLIPParts(model, tokenizer, _preprocessing(open_clip.get_model_preprocess_cfg(model), model_name))


def load_transformers_clip(source: str, *, processor: str | None = None) -> CLIPParts:
    """Open a `CLIPModel` of transformers.

    Args:
        source: A folder or a hub id.
        processor: Where tokenizer and image processor are; by default beside the model. A folder without
            preprocessor_config.json stands for OpenAI's preprocessing at the model's size.

    Raises:
        ImportError: transformers is not installed.
        ValueError: What is there cannot be opened.
    """
    from rewards.transformers_clip import (
        TransformersCLIP,
        TransformersTokenizer,
        image_preprocessing,
        import_transformers,
    )

    transformers, beside = import_transformers(), processor or source
    try:
        model, found = transformers.CLIPModel.from_pretrained(source, weights_only=True, output_loading_info=True)
        if found["missing_keys"]:  # transformers would go on with random weights in their place
            missing = sorted(found["missing_keys"])
            raise ValueError(f"{len(missing)} missing, first {missing[0]!r}")
        config, images = model.config, None
        if not (Path(beside).is_dir() and not (Path(beside) / "preprocessor_config.json").is_file()):
            images = transformers.AutoImageProcessor.from_pretrained(beside)
    except Exception as error:  # transformers, torch and the hub each have errors of their own
        raise ValueError(f"reward clip: expected to open '{source}', got an error ({one_line(error)})") from error
    return CLIPParts(
        TransformersCLIP(model),
        TransformersTokenizer(beside, context_length=config.text_config.max_position_embeddings),
        image_preprocessing(images, size=config.vision_config.image_size),
    )


def _in_one_line(error: Exception, *, model_name: str, pretrained: str | Path | None) -> Exception:
    if "transformers" in str(error) and importlib.util.find_spec("transformers") is None:
        command = "pip install transformers"
        return ImportError(f"reward clip: expected transformers, which {model_name!r} needs: {command}")
    source = f"{model_name!r} from '{pretrained}'" if pretrained else repr(model_name)
    return ValueError(f"reward clip: expected to open {source}, got an error ({one_line(error)})")


def _open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ImportError(
            "reward clip: expected open_clip, got no such package: pip install 'softgen[clip]'"
        ) from error


def _architecture(open_clip: Any, model_name: str) -> str:
    name = model_name.replace("/", "-")
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
        raise ValueError(f"model_name: expected an architecture of open_clip, such as {', '.join(near)}, got {name!r}")
    return name


def _weights(open_clip: Any, name: str, pretrained: str | Path | None) -> str | None:
    """The file or the tag to load; None for untrained weights."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    choices = f"a file, a folder, '{RANDOM}' or one of the tags of {name} ({', '.join(tags) or 'it has none'})"
    if pretrained is None:
        raise ValueError(f"pretrained: expected {choices}, got none")
    if pretrained == RANDOM:
        return None
    path = Path(pretrained)
    if path.is_file():
        return _checkpoint([path], path)
    if path.is_dir():
        return _checkpoint(sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES), path)
    if not open_clip.is_pretrained_cfg(name, str(pretrained)):
        raise ValueError(f"pretrained: expected {choices}, got '{pretrained}'")
    return str(pretrained)


def _checkpoint(files: list[Path], source: Path) -> str:
    safe = [file for file in files if file.suffix == ".safetensors"]
    found = safe if len(safe) == 1 else files
    if len(found) != 1 or found[0].suffix not in _SUFFIXES:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"pretrained: expected one file of {', '.join(_SUFFIXES)} at {source}, got {names}")
    if not _is_whole(found[0]):
        raise ValueError(f"pretrained: expected a whole file of weights, got {found[0]}")
    return str(found[0])


def _is_whole(path: Path) -> bool:
    """Whether a file looks like weights: told before a model of gigabytes is built for it."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                return True
        except (SafetensorError, OSError):
            return False
    with path.open("rb") as file:
        older = file.read(1) == b"\x80"  # torch's format before 1.6
    return older or zipfile.is_zipfile(path)


def _preprocessing(config: Mapping[str, Any], model_name: str) -> Preprocessing:
    mode, size = config["resize_mode"], config["size"]
    if mode not in ("shortest", "squash"):
        raise ValueError(
            f"model_name: expected a model that resizes by 'shortest' or 'squash', got {mode!r} ({model_name})"
        )
    return Preprocessing(
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        resize_mode=mode,
    )
