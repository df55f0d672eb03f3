"""Human Preference Score v2 and v2.1 (arXiv 2306.09341)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewards.clip import CLIPReward
from rewards.clip_loading import load_clip


class HPSv2Reward(CLIPReward):
    """The cosine of image and prompt under a CLIP ViT-H/14 that learned human choices; about 0.15 to 0.35.

    Published tables show it times 100. The checkpoints are `HPS_v2_compressed.pt` and `HPS_v2.1_compressed.pt` of
    `xswu/HPSv2` (Apache-2.0 licence), 986 M parameters, 3.9 GB in float32. The longer side of an image is resized, the
    shorter one padded with black, as the official package does.

    Args:
        checkpoint: The file, or a folder with one such file.
        model_name: Its architecture in open_clip.
        class_names: Prompts that stand for class labels.
        name: Name in logs and errors.

    Raises:
        ImportError: open_clip is not installed; the message has the command.
        ValueError: The checkpoint cannot be opened.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        model_name: str = "ViT-H-14",
        class_names: Sequence[str] | None = None,
        name: str = "hpsv2",
    ) -> None:
        parts = load_clip(model_name, pretrained=checkpoint, quick_gelu=False)
        parts = replace(parts, preprocessing=replace(parts.preprocessing, resize_mode="longest"))
        self._begin(parts, scale=1.0, class_names=class_names, name=name)
