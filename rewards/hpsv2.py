"""Human Preference Score v2 and v2.1 (arXiv 2306.09341)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewards.checkpoints import find_file
from rewards.clip import CLIPReward
from rewards.clip_loading import load_clip
from rewards.compute import Compute


class HPSv2Reward(CLIPReward):
    """The cosine of image and prompt under a CLIP ViT-H/14 that learned human choices; about 0.15 to 0.35.

    Published tables show it times 100. The checkpoints are `HPS_v2_compressed.pt` and `HPS_v2.1_compressed.pt` of
    `xswu/HPSv2` (Apache-2.0 licence), 986 M parameters, 3.9 GB in float32. The longer side of an image is resized, the
    shorter one padded with black, as the official package does; on tensors, so that what overshoots is not clipped.

    Args:
        checkpoint: The file, or a folder with one such file, or a hub id that holds version 2.1.
        model_name: Its architecture in open_clip.
        class_names: Prompts that stand for class labels.
        compute: Precision, micro-batches, recomputed activations and device.
        name: Name in logs and errors.

    Raises:
        ImportError: open_clip is not installed; the message has the command.
        ValueError: The checkpoint cannot be opened.
    """

    def __init__(
        self,
        checkpoint: str | Path = "xswu/HPSv2",
        *,
        model_name: str = "ViT-H-14",
        class_names: Sequence[str] | None = None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        name: str = "hpsv2",
    ) -> None:
        if not Path(checkpoint).exists():
            checkpoint = find_file(checkpoint, key="checkpoint", names=("HPS_v2.1_compressed.pt",))
        parts = load_clip(model_name, pretrained=checkpoint, quick_gelu=False)
        parts = replace(parts, preprocessing=replace(parts.preprocessing, resize_mode="longest", clip=False))
        self._begin(parts, scale=1.0, class_names=class_names, compute=compute, name=name)
