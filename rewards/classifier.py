"""A classifier as a judge: is this image of the wanted class?"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import Reward
from rewards.conditions import check_labels
from rewards.saved import load_module


class ClassifierReward(Reward):
    """log p(class | image) under a classifier: at most 0, which means certain.

    The conditions are labels: integers, a tensor (B,), decimal strings, or class names.

    Args:
        classifier: A module that maps images (B, 3, H, W) in [0, 1] to logits (B, C), by a method `logits` or else by
            being called; or a folder that holds one as config.json + model.safetensors. It is frozen and put in eval
            mode in place.
        class_names: What each of the C classes is called, so that strings can name them.
        name: Name in logs and errors.

    Raises:
        ValueError: It is no module, the folder does not hold a classifier, or `class_names` are empty, blank or not
            unique.
    """

    takes: Literal["prompts", "labels", "any"] = "labels"

    def __init__(
        self,
        # A module, typed as what it does: of nn.Module the command line would list a thousand subclasses.
        classifier: Callable[[Tensor], Tensor] | str | Path,
        *,
        class_names: Sequence[str] | None = None,
        name: str = "classifier",
    ) -> None:
        super().__init__(name=name, class_names=class_names)
        if isinstance(classifier, (str, Path)):
            classifier = load_module(classifier, key="classifier")
        if not isinstance(classifier, nn.Module):
            got = type(classifier).__name__
            raise ValueError(f"reward {self.name}: expected a module or the folder of one as classifier, got a {got}")
        self.classifier = classifier
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities (B,) of labels (B,) int64, from logits in float32 or better.

        Args:
            images: (B, 3, H, W), float, in [0, 1], of a size that the classifier takes.
            labels: (B,), in [0, C).

        Raises:
            ValueError: The classifier does not return logits (B, C), C is not the number of class names, or a label is
                out of range.
        """
        logits = self._logits(images)
        check_labels(labels, num_classes=logits.shape[1], name=self.name)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]

    def _logits(self, images: Tensor) -> Tensor:
        weight = next((value for value in self.classifier.parameters() if value.is_floating_point()), images)
        images = images.to(weight.dtype)
        method = getattr(self.classifier, "logits", None)
        output = method(images) if callable(method) else self.classifier(images)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
            got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(f"reward {self.name}: expected logits of shape ({len(images)}, C), got {got}")
        if self.class_names is not None and len(self.class_names) != output.shape[1]:
            count = len(self.class_names)
            raise ValueError(f"reward {self.name}: expected {output.shape[1]} class_names, one a logit, got {count}")
        return output
