"""The package image-reward."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rewards.base import Reward
from rewards.checkpoints import find_file
from rewards.official.package import import_package


class OfficialImageReward(Reward):
    """`score_gard` of image-reward 1.5, which takes tensors, after its own transforms of tensors.

    Args:
        checkpoint: The file ImageReward.pt, or a folder or hub id that holds it; med_config.json stands beside it.
        device: Where to compute.
        name: Name in logs and errors.

    Raises:
        ImportError: This environment lacks the package.
        ValueError: The checkpoint cannot be found.
    """

    def __init__(self, checkpoint: str, *, device: str = "cpu", name: str = "imagereward") -> None:
        super().__init__(name=name)
        package = import_package("ImageReward", package="image-reward", environment="imagereward")
        path = find_file(checkpoint, key="checkpoint", names=("ImageReward.pt",))
        settings = path.parent / "med_config.json"
        self.model: Any = package.load(
            str(path), device=device, med_config=str(settings) if settings.is_file() else None
        )
        # Its other two transforms make a tensor of a PIL image.
        kept = ("Resize", "CenterCrop", "Normalize")
        self.transforms = [step for step in self.model.preprocess.transforms if type(step).__name__ in kept]
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; prompts of more than 35 tokens are cut."""
        pixels = images
        for step in self.transforms:
            pixels = step(pixels)
        text = self.model.blip.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        ids, mask = text["input_ids"].to(images.device), text["attention_mask"].to(images.device)
        scores: Tensor = self.model.score_gard(ids, mask, pixels)
        return scores[:, 0]
