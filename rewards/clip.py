"""Similarity of image and prompt under a CLIP model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rewards.base import Reward
from rewards.clip_loading import CLIPParts, load_clip
from rewards.compute import Compute
from rewards.prompt_features import PromptFeatures


class CLIPReward(Reward):
    """scale * cos(image feature, prompt feature) under any architecture of open_clip (arXiv 2103.00020, 2104.08718).

    Images of any size are resized (antialiased) and cropped on tensors, so that the gradient reaches every pixel that
    the model sees. Prompts are encoded once each. The model is frozen, in eval mode and in float32; `.to()` moves it
    and changes its precision, the score stays in float32.

    Args:
        model_name: An architecture of open_clip, such as "ViT-B-32"; or "local-dir:FOLDER" or "hf-hub:OWNER/NAME",
            which bring their weights; or "transformers:FOLDER" or "transformers:OWNER/NAME" for a checkpoint of
            transformers' `CLIPModel`.
        pretrained: Where the weights are: a file (.safetensors, or what `torch.load(weights_only=True)` reads), a
            folder with one such file, or a tag of open_clip, which is downloaded. "random" leaves the model untrained.
        scale: What the cosine is multiplied by: a number above 0, or "model" for the model's own logit scale, which is
            about 100 after training.
        quick_gelu: For local weights that were trained with OpenAI's activation; a tag knows this by itself.
        class_names: Prompts that stand for class labels: label k is read as `class_names[k]`.
        compute: Precision, micro-batches, recomputed activations and device.
        name: Name in logs and errors.

    Raises:
        ImportError: open_clip is not installed, or transformers, which some models need; the message has the command.
        ValueError: An unknown model or tag, weights that cannot be loaded or do not fit, or `scale` is not above 0.
    """

    takes: Literal["prompts", "labels", "any"] = "prompts"

    def __init__(
        self,
        model_name: str = "ViT-B-32",
        *,
        pretrained: str | Path | None = None,
        scale: float | Literal["model"] = 1.0,
        quick_gelu: bool = False,
        class_names: Sequence[str] | None = None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        name: str = "clip",
    ) -> None:
        _check_scale(scale)
        parts = load_clip(model_name, pretrained=pretrained, quick_gelu=quick_gelu)
        self._begin(parts, scale=scale, class_names=class_names, compute=compute, name=name)

    def _begin(
        self,
        parts: CLIPParts,
        *,
        scale: float | Literal["model"],
        class_names: Sequence[str] | None,
        compute: Compute,
        name: str,
    ) -> None:
        """What every reward on a CLIP model starts with."""
        Reward.__init__(self, name=name, class_names=class_names, compute=compute)
        self.model = parts.model
        self.preprocessing = parts.preprocessing
        self.prompt_features = PromptFeatures(parts.model, tokenizer=parts.tokenizer, name=name)
        self.scale = scale
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), in float32 or better: a cosine in [-1, 1] times the scale.

        Args:
            images: (B, 3, H, W), float, in [0, 1], of any size.
            prompts: B strings. Those longer than the context are cut, with a warning that says how many.

        Raises:
            ValueError: A prompt is empty.
        """
        return self.score(self.preprocessing(images), self.prompt_features(prompts, device=images.device))

    def score(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Scores (B,) of preprocessed images (B, 3, S, S) and unit text features (B, D)."""
        features = self.model.encode_image(pixels.to(next(self.model.visual.parameters()).dtype))
        features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
        scale = self.model.logit_scale.exp() if self.scale == "model" else self.scale
        return (features * text).sum(dim=-1) * scale


def _check_scale(scale: object) -> None:
    if scale != "model" and not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a finite number above 0 or 'model', got {scale!r}")
