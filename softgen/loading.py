"""Opening what a stage left behind: one path, or a hub id, is enough."""

from pathlib import Path

from softgen.models.base import ImageCodeModel, MaskedDiffusionModel
from softgen.models.generator import OneStepGenerator
from softgen.models.sit import SiT
from softgen.models.text import read_alike
from softgen.pretrained import CONFIG_NAME, resolve_folder
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer


def load_model(source: str | Path, *, key: str = "model") -> MaskedDiffusionModel:
    """Open a masked diffusion model.

    Args:
        source: A folder written by a teacher stage, or a hub id `owner/name`.
        key: The config key that named the source, for error messages.

    Raises:
        ValueError: If it is missing, truncated, foreign, or not such a model.
    """
    model = MaskedDiffusionModel.from_pretrained(source, key=key)
    model.check(key=key)
    return model


def load_generator(source: str | Path, *, key: str = "generator") -> OneStepGenerator:
    """Open a one-step generator. Arguments and errors as `load_model`."""
    return OneStepGenerator.from_pretrained(source, key=key)


def load_tokenizer(source: str | Path, *, key: str = "tokenizer") -> ImageTokenizer:
    """Open a tokenizer: its own folder, or that of a model, which holds its tokenizer beside it.

    Arguments and errors as `load_model`.
    """
    return ImageTokenizer.from_pretrained(_tokenizer_folder(source, key=key), key=key)


def load_continuous_tokenizer(source: str | Path, *, key: str = "tokenizer") -> ContinuousTokenizer:
    """As `load_tokenizer`, a tokenizer of continuous latents."""
    return ContinuousTokenizer.from_pretrained(_tokenizer_folder(source, key=key), key=key)


def _tokenizer_folder(source: str | Path, *, key: str) -> Path:
    """The tokenizer's own folder, or the one in a model's."""
    folder = resolve_folder(source, key=key)
    inner = folder / "tokenizer"
    return inner if (inner / CONFIG_NAME).is_file() else folder


def check_latents(model: SiT, tokenizer: ContinuousTokenizer, *, key: str = "tokenizer") -> None:
    """Refuse a tokenizer whose latents are not those of the model.

    Raises:
        ValueError: Naming the number that differs.
    """
    for name in ("num_latents", "latent_dim"):
        expected, got = getattr(model, name), getattr(tokenizer, name)
        if expected != got:
            raise ValueError(f"{key}.{name}: expected {expected} as the model has, got {got}")


def check_compatible(model: ImageCodeModel, tokenizer: ImageTokenizer, *, key: str = "tokenizer") -> None:
    """Refuse a tokenizer whose codes are not those of the model.

    Raises:
        ValueError: Naming the number that differs.
    """
    for name in ("num_codes", "num_sites"):
        expected, got = getattr(model, name), getattr(tokenizer, name)
        if expected != got:
            raise ValueError(f"{key}.{name}: expected {expected} as the model has, got {got}")
    check_square(model, key=key)


def check_square(model: ImageCodeModel, *, key: str) -> None:
    """Refuse a model whose tokens are not as many rows as columns, which no tokenizer here decodes.

    Raises:
        ValueError: Naming both.
    """
    grid = getattr(model, "grid", None)
    if isinstance(grid, tuple) and grid[0] != grid[1]:
        raise ValueError(f"{key}: expected a model of a square grid, as tokenizers have it, got {grid[0]} x {grid[1]}")


def check_same_sites(model: MaskedDiffusionModel, teacher: MaskedDiffusionModel, *, key: str) -> None:
    """Refuse a model that cannot stand beside the teacher: other sites, codes or classes, or another text encoder.

    Raises:
        ValueError: Naming what differs.
    """
    for name in ("num_codes", "num_sites", "mask_id", "num_classes"):
        expected, got = getattr(teacher, name), getattr(model, name)
        if expected != got:
            raise ValueError(f"{key}.{name}: expected {expected} as the teacher has, got {got}")
    encoders = [one.text_encoder for one in (model, teacher) if one.text_encoder is not None]
    alike = not encoders or (len(encoders) == 2 and read_alike(*encoders))
    if not alike or model.condition_dim != teacher.condition_dim:
        raise ValueError(f"{key}.text_encoder: expected one as the teacher has, got another or none")
