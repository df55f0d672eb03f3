"""CLIP models of open_clip, to train here and to be opened by whatever opens open_clip's own."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.pretrained import Pretrained, load_weights

_WEIGHTS, _CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_IMAGE_SIZE = 224  # open_clip's own default
_MAX_LOG_SCALE = 4.6052  # log 100, as CLIP is trained (arXiv 2103.00020, section 2.5)

SMALL: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 16, "width": 96, "heads": 3, "layers": 2},
}
"""A CLIP of 6 M parameters, most of them word embeddings, for images of 32 pixels."""


class OpenCLIP(Pretrained):
    """A model of open_clip. Its folder is also one of open_clip's: `open_clip.create_model("local-dir:FOLDER")`.

    Args:
        architecture: An architecture's name in open_clip, or its settings as in open_clip's model configs; by default
            `SMALL`. Weights begin at random.
        image_size: Pixels a side; by default that of the architecture.

    Attributes:
        image_size: Pixels a side.
        embed_dim: D, of the features.

    Raises:
        ImportError: open_clip is not installed; the message has the command.
        ValueError: An unknown name, or settings that open_clip does not take.
    """

    def __init__(self, *, architecture: str | Mapping[str, Any] | None = None, image_size: int | None = None) -> None:
        super().__init__()
        open_clip = _open_clip()
        settings = _settings(open_clip, SMALL if architecture is None else architecture)
        if missing := [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in settings]:
            raise ValueError(f"clip.architecture: expected settings of open_clip, got none for {missing[0]}")
        if image_size is not None:
            settings["vision_cfg"]["image_size"] = image_size
        self.config = {"architecture": settings}
        self.image_size = int(settings["vision_cfg"].get("image_size", _IMAGE_SIZE))
        self.embed_dim = int(settings["embed_dim"])
        try:
            self.model = open_clip.CLIP(**settings)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"clip.architecture: expected settings of open_clip, got an error ({error})") from error
        context = self.model.context_length
        self._tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=context)

    def encode_images(self, images: Tensor) -> Tensor:
        """Unit features (B, D) of images (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: The images are not of the model's size.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"clip: expected images (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (_MEAN, _STD))
        return F.normalize(self.model.encode_image((images - mean) / std).float(), dim=-1)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit features (B, D) of B prompts; those longer than the context are cut."""
        device = self.model.logit_scale.device
        return F.normalize(self.model.encode_text(self._tokenizer(list(prompts)).to(device)).float(), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by in the loss."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Bring it back to 100 where a step has taken it above."""
        self.model.logit_scale.clamp_(max=_MAX_LOG_SCALE)

    def write_weights(self, folder: Path) -> None:
        """Write open_clip's own files."""
        from safetensors.torch import save_file

        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self.model.state_dict().items()}
        save_file(weights, folder / _WEIGHTS)
        size = self.image_size
        preprocessing = {"size": [size, size], "mean": list(_MEAN), "std": list(_STD)}
        content = {"model_cfg": self.config["architecture"], "preprocess_cfg": preprocessing}
        (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n")

    def read_weights(self, folder: Path, *, key: str) -> None:
        """Load open_clip's own file."""
        load_weights(self.model, folder / _WEIGHTS, key=key)


_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _settings(open_clip: Any, architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(architecture, str):
        return json.loads(json.dumps(dict(architecture)))  # type: ignore[no-any-return] # a copy, nested
    known = open_clip.get_model_config(architecture)
    if known is None:
        raise ValueError(f"clip.architecture: expected one that open_clip knows, got {architecture!r}")
    return {name: known[name] for name in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu") if name in known}


def _open_clip() -> Any:
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ImportError("clip: expected open_clip, got no such package: pip install 'softgen[clip]'") from error
