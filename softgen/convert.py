"""Turn a published checkpoint into our folder, once.

python -m softgen.convert --family maskgit --source MaskGIT_ImageNet_256.pth --tokenizer last.ckpt --out DIR
python -m softgen.convert --family meissonic --source MeissonFlow/Meissonic --tokenizer MeissonFlow/Meissonic --out DIR
"""

from pathlib import Path
from typing import Any

from softgen.checkpoints import converting, published_families
from softgen.cli import run_command
from softgen.models.base import MaskedDiffusionModel
from softgen.models.generator import OneStepGenerator
from softgen.pretrained import Pretrained, check_target

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
        tokenizer: Checkpoint of the model's tokenizer, saved in the subfolder `tokenizer`.
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
    with converting():
        model = _open(model_class, source, options, key="source")
        beside = None
        if tokenizer is not None and tokenizer_class is not None:
            beside = _open(tokenizer_class, tokenizer, tokenizer_options, key="tokenizer")
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
