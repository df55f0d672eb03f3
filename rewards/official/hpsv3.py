"""The package hpsv3."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.checkpoints import find_file
from rewards.official.package import import_package


class OfficialHPSv3(Reward):
    """hpsv3 1.0.0 with `differentiable=True`, image by image, since it takes several for the frames of a video.

    In bfloat16 as its settings say; in float32 on the CPU, where its training settings refuse bfloat16.

    Args:
        checkpoint: The file HPSv3.safetensors, or a folder or hub id that holds it.
        base: Folder or hub id of Qwen2-VL.
        device: Where to compute.
        name: Name in logs and errors.

    Raises:
        ImportError: This environment lacks the package.
        ValueError: The checkpoint cannot be found.
    """

    def __init__(self, checkpoint: str, *, base: str, device: str = "cpu", name: str = "hpsv3") -> None:
        super().__init__(name=name)
        package = import_package("hpsv3", package="hpsv3", environment="hpsv3")
        path = find_file(checkpoint, key="checkpoint", names=("HPSv3.safetensors",))
        with tempfile.TemporaryDirectory() as folder:
            config = _write_settings(package, Path(folder), base=base, device=torch.device(device))
            self.inferencer: Any = package.HPSv3RewardInferencer(
                config_path=str(config), checkpoint_path=str(path), device=device, differentiable=True
            )
        self.model = self.inferencer.model
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]."""
        # Floats of 0 to 255: its processor divides.
        pairs = zip(images, prompts, strict=True)
        return torch.cat([self.inferencer.reward([image * 255], [prompt])[:, 0] for image, prompt in pairs])


def _write_settings(package: Any, folder: Path, *, base: str, device: torch.device) -> Path:
    """The package's own settings, but for what is asked here."""
    import yaml

    own = Path(package.__file__).parent / "config" / "HPSv3_7B.yaml"
    settings = {**yaml.safe_load(own.read_text()), "model_name_or_path": base, "output_dir": str(folder)}
    if device.type == "cpu":
        settings |= {"bf16": False, "torch_dtype": "float32"}
    path = folder / own.name
    path.write_text(yaml.safe_dump(settings))
    return path
