"""Turn a published checkpoint into our folder, once.

python -m softgen.convert --family maskgit --source MaskGIT_ImageNet_256.pth --tokenizer last.ckpt --out DIR
python -m softgen.convert --family meissonic --source MeissonFlow/Meissonic --tokenizer MeissonFlow/Meissonic --out DIR
"""

import inspect
import math
from pathlib import Path
from typing import Any

from softgen.checkpoints import converting, published_families
from softgen.cli import run_command
from softgen.loading import check_compatible, check_square
from softgen.models.base import ImageCodeModel, MaskedDiffusionModel
from softgen.models.generator import OneStepGenerator
from softgen.models.maskbit import MaskBit
from softgen.pretrained import Pretrained, check_target
from softgen.tokenizers.base import ImageTokenizer

PROGRAM = "softgen.convert"

# Share of masks and weight of the noise of the published students.
_STUDENT = (0.6, 0.1)
_STUDENTS = {"meissonic": (0.5, 0.3)}


def convert(
    *,
    family: str,
    source: str,
    out: str,
    tokenizer: str | None = None,
    options: dict[str, Any] | None = None,
    tokenizer_options: dict[str, Any] | None = None,
    student: bool = False,
    r_init: float | None = None,
    noise: float | None = None,
) -> None:
    """Write config.json and model.safetensors of a published checkpoint, and of its tokenizer beside it.

    Nothing in a checkpoint is executed: of a file that pickles more than tensors, such as a Lightning checkpoint, the
    rest is read as inert placeholders and dropped.

    Args:
        family: One of the families that the toolkit knows, a model or a tokenizer.
        source: The checkpoint: a file, or a folder or hub id that holds it; of diffusers' layout, the whole folder.
        out: Folder to write; a saved module there is replaced.
        tokenizer: Checkpoint of the model's tokenizer, saved in the subfolder `tokenizer`; for images of the size that
            the model's number of tokens asks for.
        options: Arguments of the family's `from_checkpoint`, such as {"heads": 16}.
        tokenizer_options: Arguments of the tokenizer's.
        student: The checkpoint is a Di[M]O student: write a one-step generator, with the two options that follow.
        r_init: Share of masks in its initial tokens, in [0, 1]; by default as published: 0.5 of Meissonic, else 0.6.
        noise: Weight of the noise on its initial embeddings, in [0, 1]; by default as published: 0.3 of Meissonic, else
            0.1.

    Raises:
        ValueError: Naming the option, what was expected and what was got.
    """
    model_class, tokenizer_class = published_families(family)
    check_target(Path(out))
    if tokenizer is not None and tokenizer_class is None:
        raise ValueError(f"tokenizer: expected none with {family}, which is a tokenizer itself, got {tokenizer!r}")
    if tokenizer is None and tokenizer_options:
        raise ValueError(f"tokenizer_options: expected a tokenizer to go with them, got {', '.join(tokenizer_options)}")
    for name, value in (("r_init", r_init), ("noise", noise)):
        if value is not None and not student:
            raise ValueError(f"{name}: expected student true to go with it, got {value} alone")
    with converting():
        model = _open(model_class, source, options, key="source")
        beside = None
        if tokenizer is not None and tokenizer_class is not None:
            assert isinstance(model, ImageCodeModel)
            beside = _open_beside(model, tokenizer_class, tokenizer, tokenizer_options or {})
        if student:
            if not isinstance(model, MaskedDiffusionModel):
                raise ValueError(f"student: expected a masked diffusion model's family, got {family}")
            default = _STUDENTS.get(family, _STUDENT)
            model = OneStepGenerator(
                model,
                r_init=default[0] if r_init is None else r_init,
                noise=default[1] if noise is None else noise,
            )
        model.save_pretrained(out, tokenizer=beside)
    print(f"{type(model).__name__}: {out}")


def _open_beside(model: ImageCodeModel, cls: Any, source: str, options: dict[str, Any]) -> ImageTokenizer:
    """The model's tokenizer; what no shape tells, the size of images and the groups of bits, is the model's."""
    check_square(model, key="tokenizer")
    known = {"codebook_splits": model.config["codebook_splits"]} if isinstance(model, MaskBit) else {}
    opened = _open(cls, source, {**known, **options}, key="tokenizer")
    assert isinstance(opened, ImageTokenizer)
    scale = math.sqrt(model.num_sites / opened.num_sites)
    if scale != 1 and "image_size" not in options and _takes_image_size(cls):
        size = {"image_size": round(scale * opened.image_size)}
        opened = _open(cls, source, {**known, **size, **options}, key="tokenizer")
        assert isinstance(opened, ImageTokenizer)
    check_compatible(model, opened)
    return opened


def _takes_image_size(cls: Any) -> bool:
    parameters = inspect.signature(cls.from_checkpoint).parameters.values()
    return any(parameter.name == "image_size" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _open(cls: Any, source: str, options: dict[str, Any] | None, *, key: str) -> Pretrained:
    try:
        opened: Pretrained = cls.from_checkpoint(source, key=key, **(options or {}))
    except TypeError as error:
        raise ValueError(f"{key}: expected options of {cls.__name__}.from_checkpoint, got {error}") from error
    return opened


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(convert, program=PROGRAM, args=args)


if __name__ == "__main__":
    main()
