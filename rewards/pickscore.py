"""PickScore (arXiv 2305.01569): which of two images people picked."""

from collections.abc import Sequence

from rewards.clip import CLIPReward
from rewards.clip_loading import load_transformers_clip
from rewards.compute import Compute


class PickScoreReward(CLIPReward):
    """exp(logit scale) cos(image, prompt) under a CLIP ViT-H/14 that learned from Pick-a-Pic; about 15 to 26.

    The checkpoint is `yuvalkirstain/PickScore_v1` (licence: see its card), 986 M parameters, 3.9 GB in float32;
    tokenizer and image processor are those of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.

    Args:
        checkpoint: A folder or a hub id of transformers' `CLIPModel`.
        processor: Where tokenizer and image processor are; by default LAION's for the published checkpoint, else beside
            the model.
        class_names: Prompts that stand for class labels.
        compute: Precision, micro-batches, recomputed activations and device.
        name: Name in logs and errors.

    Raises:
        ImportError: transformers is not installed; the message has the command.
        ValueError: The checkpoint cannot be opened.
    """

    def __init__(
        self,
        checkpoint: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str | None = None,
        class_names: Sequence[str] | None = None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        name: str = "pickscore",
    ) -> None:
        if processor is None and checkpoint == "yuvalkirstain/PickScore_v1":
            processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        parts = load_transformers_clip(checkpoint, processor=processor)
        self._begin(parts, scale="model", class_names=class_names, compute=compute, name=name)
