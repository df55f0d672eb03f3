"""What images are scored under: prompts, or class labels, and how one becomes the other."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Conditions: TypeAlias = Tensor | Sequence[str] | Sequence[int]
"""One condition an image: B strings, or B class labels as integers or as a tensor (B,) of an integer type."""


def check_count(conditions: Conditions, *, batch: int, name: str) -> None:
    """Refuse conditions that are not one an image.

    Raises:
        ValueError: A lone string, no condition at all, or another number than `batch`.
    """
    if isinstance(conditions, str):
        raise ValueError(f"reward {name}: expected a list of {batch} conditions, got the single string {conditions!r}")
    if isinstance(conditions, Tensor) and conditions.ndim != 1:
        raise ValueError(f"reward {name}: expected labels of shape ({batch},), got {tuple(conditions.shape)}")
    if len(conditions) != batch or batch == 0:
        raise ValueError(f"reward {name}: expected one condition an image, got {len(conditions)} for {batch} images")


def as_prompts(conditions: Conditions, *, name: str, class_names: Sequence[str] | None) -> list[str]:
    """Strings as they are; a class label as the name of its class.

    Where classes have names, a decimal number is a label also as a string, as a command line has it.

    Args:
        conditions: B of them.
        name: Of the reward, for error messages.
        class_names: What class k is called, in words that the reward can read.

    Raises:
        ValueError: Labels without `class_names`, a label out of range, or neither strings nor labels.
    """
    words = [word for word in conditions if isinstance(word, str)]
    if len(words) == len(conditions):
        return [_in_words(word, class_names or (), name=name) for word in words]
    labels = _label_tensor(conditions, name=name).cpu()
    if class_names is None:
        raise ValueError(f"reward {name}: expected prompts, got class labels (class_names would turn them into words)")
    check_labels(labels, num_classes=len(class_names), name=name)
    return [class_names[label] for label in labels.tolist()]


def as_labels(
    conditions: Conditions, *, name: str, class_names: Sequence[str] | None, device: torch.device | None = None
) -> Tensor:
    """Labels as they are; a string as the class of that name, or else as a decimal number.

    Args:
        conditions: B of them.
        name: Of the reward, for error messages.
        class_names: What class k is called.
        device: Where the labels are wanted; by default where they are.

    Returns:
        (B,) int64. A number's range is for the reward to check, which knows its number of classes.

    Raises:
        ValueError: A string that is neither a class name nor a number, or neither strings nor labels.
    """
    if not isinstance(conditions, Tensor) and all(isinstance(word, str) for word in conditions):
        indices = {word: index for index, word in enumerate(class_names or ())}
        conditions = [_label(str(word), indices, name=name) for word in conditions]
    return _label_tensor(conditions, name=name).to(device)


def check_labels(labels: Tensor, *, num_classes: int, name: str) -> None:
    """Refuse labels (B,) outside [0, num_classes).

    Labels on an accelerator are not looked at, since that would make every step wait for it; indexing with a wrong
    one fails there by itself.

    Raises:
        ValueError: Naming the first label out of range.
    """
    if labels.device.type != "cpu":
        return
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(f"reward {name}: expected labels in [0, {num_classes - 1}], got {int(wrong[0])}")


def _in_words(word: str, class_names: Sequence[str], *, name: str) -> str:
    if not class_names or word in class_names or not _is_number(word):
        return word
    check_labels(torch.tensor([int(word)]), num_classes=len(class_names), name=name)
    return class_names[int(word)]


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _label(word: str, indices: dict[str, int], *, name: str) -> int:
    if word in indices:
        return indices[word]
    if _is_number(word):
        return int(word)
    known = f", one of {', '.join(indices)}," if indices else ""
    raise ValueError(f"reward {name}: expected a class name{known} or a label as a number, got {word!r}")


def _label_tensor(conditions: Conditions, *, name: str) -> Tensor:
    if isinstance(conditions, Tensor):
        if conditions.is_floating_point() or conditions.is_complex() or conditions.dtype == torch.bool:
            raise ValueError(f"reward {name}: expected labels of an integer type, got {conditions.dtype}")
        return conditions.long()
    for value in conditions:
        if not isinstance(value, int) or isinstance(value, bool):
            kind = type(value).__name__
            raise ValueError(f"reward {name}: expected all prompts or all integer labels, got a {kind} among them")
    return torch.tensor(list(conditions), dtype=torch.int64)
