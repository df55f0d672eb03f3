"""What `SoftDiMO` begins with: teacher, tokenizer and student, from folders or hub ids or as they are given."""

import copy

from lightning.pytorch.utilities import rank_zero_warn

from distill.memory import widen_weights
from softgen.loading import check_same_sites, load_generator, load_model, load_tokenizer
from softgen.models.base import MaskedDiffusionModel
from softgen.models.generator import MaskUnit, OneStepGenerator
from softgen.pretrained import CONFIG_NAME, resolve_folder
from softgen.tokenizers.base import ImageTokenizer

R_INIT, NOISE = 0.6, 0.1  # published
MASK_UNIT: MaskUnit = "site"


def open_teacher(teacher: str | MaskedDiffusionModel) -> MaskedDiffusionModel:
    """The teacher, in float32 at least."""
    opened = load_model(teacher, key="model.teacher") if isinstance(teacher, str) else teacher
    opened.check(key="model.teacher")
    return widen_weights(opened)


def open_tokenizer(
    tokenizer: str | ImageTokenizer | None, teacher: str | MaskedDiffusionModel
) -> ImageTokenizer | None:
    """The tokenizer, or by default the one in the teacher's folder, if there is one."""
    if isinstance(tokenizer, str):
        return load_tokenizer(tokenizer, key="model.tokenizer")
    if tokenizer is not None:
        return tokenizer
    if isinstance(teacher, str):
        folder = resolve_folder(teacher, key="model.teacher")
        if (folder / "tokenizer" / CONFIG_NAME).is_file():
            return load_tokenizer(folder, key="model.teacher")
    return None


def open_student(
    student: str | OneStepGenerator | None,
    teacher: MaskedDiffusionModel,
    *,
    r_init: float,
    noise: float,
    mask_unit: MaskUnit,
) -> OneStepGenerator:
    """A generator that keeps its own settings, or by default a copy of the teacher with those that are given.

    Raises:
        ValueError: If the student shares weights with the teacher, or does not fit its sites or text encoder.
    """
    if student is None:
        return OneStepGenerator(copy.deepcopy(teacher), r_init=r_init, noise=noise, mask_unit=mask_unit)
    opened = load_generator(student, key="model.student") if isinstance(student, str) else student
    if set(opened.parameters()) & set(teacher.parameters()):
        raise ValueError("model.student: expected weights of its own, got those of the teacher, which would be trained")
    check_same_sites(opened.model, teacher, key="model.student")
    widen_weights(opened.model)
    settings: tuple[tuple[str, object, object, object], ...] = (
        ("r_init", r_init, R_INIT, opened.r_init),
        ("noise", noise, NOISE, opened.noise),
        ("mask_unit", mask_unit, MASK_UNIT, opened.mask_unit),
    )
    for name, asked, default, kept in settings:
        if asked not in (default, kept):
            rank_zero_warn(f"model.{name}: {asked} is ignored, since the student that was given has {kept}")
    return opened
