"""LAION's aesthetic predictor v2: how much people like the look of an image, whatever the prompt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import Reward
from rewards.checkpoints import load_checked, part_of, read_checkpoint
from rewards.clip_loading import load_clip
from rewards.compute import Compute
from rewards.heads import LinearStack


class AestheticReward(Reward):
    """A linear head on the normalised image feature of OpenAI's CLIP ViT-L/14; 1 to 10, typically 4.5 to 7.

    The head is `sac+logos+ava1-l14-linearMSE.pth` of improved-aesthetic-predictor (licence: see its page), 0.9 M
    parameters; the tower has 304 M, 1.2 GB in float32.

    Args:
        checkpoint: The head's file, with tensors `layers.*`; or one with `mlp.layers.*` and `clip.visual.*`, which
            brings the tower too.
        clip_weights: Weights of the tower: a file, a folder, or a tag of open_clip; not used where the checkpoint
            brings them.
        model_name: The tower's architecture in open_clip, with OpenAI's activation.
        compute: Precision, micro-batches, recomputed activations and device.
        name: Name in logs and errors.

    Raises:
        ImportError: open_clip is not installed; the message has the command.
        ValueError: The checkpoint cannot be opened, or does not fit.
    """

    takes: Literal["prompts", "labels", "any"] = "any"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        clip_weights: str | Path = "openai",
        model_name: str = "ViT-L-14",
        compute: Compute = Compute(),  # noqa: B008 - frozen
        name: str = "aesthetic",
    ) -> None:
        super().__init__(name=name, compute=compute)
        state = read_checkpoint(checkpoint, key="checkpoint")
        tower = part_of(state, "clip.visual.")
        parts = load_clip(model_name, pretrained="random" if tower else clip_weights, quick_gelu=True)
        self.visual: nn.Module = parts.model.visual
        self.preprocessing = parts.preprocessing
        if tower:
            load_checked(self.visual, tower, key="checkpoint (clip.visual)")
        head = {name.removeprefix("mlp."): value for name, value in state.items() if not name.startswith("clip.")}
        self.head = LinearStack(_width(head))
        load_checked(self.head, head, key="checkpoint")
        self.settle()

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; the conditions play no part."""
        return self.score(self.preprocessing(images))

    def features(self, pixels: Tensor) -> Tensor:
        """Image features (B, D) of preprocessed images, not normalised."""
        features: Tensor = self.visual(pixels.to(next(self.visual.parameters()).dtype))
        return features

    def score(self, pixels: Tensor) -> Tensor:
        """Scores (B,) of preprocessed images (B, 3, S, S)."""
        features = self.features(pixels)
        features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        head: Tensor = self.head(features)
        return head[:, 0]


def _width(head: Mapping[str, Tensor]) -> int:
    if "layers.0.weight" not in head:
        raise ValueError("checkpoint: expected a head with 'layers.0.weight', got none")
    return head["layers.0.weight"].shape[1]
