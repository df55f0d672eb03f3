"""transformers' CLIP with the face of open_clip's."""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewards.errors import one_line
from rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        ImportError: It is not installed; the message has the command.
    """
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "reward: expected transformers, got no such package: pip install 'softgen[rewards]'"
        ) from error


class TransformersCLIP(nn.Module):
    """A `CLIPModel` with `encode_image`, `encode_text`, `visual` and `logit_scale`.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def visual(self) -> nn.Module:
        """The image tower."""
        tower: nn.Module = self.model.vision_model
        return tower

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of what the cosines are multiplied by."""
        scale: Tensor = self.model.logit_scale
        return scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Projected features (B, D) of preprocessed images."""
        return _projected(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Projected features (B, D) of token ids (B, L). What follows the end of the text is not seen: it is causal."""
        return _projected(self.model.get_text_features(input_ids=tokens))


def _projected(output: Any) -> Tensor:
    """Release 5 returns an object where those before returned the tensor."""
    projected: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return projected


class LazyTokenizer:
    """A tokenizer of transformers that is opened when it is first needed.

    Args:
        source: A folder or a hub id.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._tokenizer: Any = None

    def open(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: It cannot be opened.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = import_transformers().AutoTokenizer.from_pretrained(self.source)
            except Exception as error:  # transformers and the hub each have errors of their own
                raise ValueError(
                    f"tokenizer: expected one in '{self.source}', got an error ({one_line(error)})"
                ) from error
        return self._tokenizer


class TransformersTokenizer:
    """A tokenizer of transformers, called as open_clip's are.

    Args:
        source: A folder or a hub id.
        context_length: Tokens that the model takes.
    """

    def __init__(self, source: str, *, context_length: int) -> None:
        self._lazy = LazyTokenizer(source)
        self.context_length = context_length

    def __call__(self, prompts: Sequence[str], *, context_length: int | None = None) -> Tensor:
        """Token ids (B, L), cut and padded to the context."""
        length = context_length or self.context_length
        encoded = self._lazy.open()(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = encoded["input_ids"]
        return ids


def image_preprocessing(processor: Any | None, *, size: int) -> Preprocessing:
    """What an image processor of transformers does, differentiable; OpenAI's at `size` pixels where there is none.

    Raises:
        ValueError: If it does something else than resize the shortest edge and crop the centre.
    """
    if processor is None:
        return Preprocessing(size=(size, size), mean=OPENAI_MEAN, std=OPENAI_STD, crop="floor")
    resized, crop = dict(processor.size), dict(processor.crop_size or {})
    side = resized.get("shortest_edge")
    if side is None or not (crop.get("height") == crop.get("width") == side):
        raise ValueError(
            f"processor: expected one that resizes the shortest edge and crops to it, got {resized}, {crop}"
        )
    return Preprocessing(
        size=(side, side), mean=tuple(processor.image_mean), std=tuple(processor.image_std), crop="floor"
    )


def truncated(tokenizer: Any, prompts: Sequence[str], *, length: int) -> int:
    """How many prompts have more than `length` tokens."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False)["input_ids"]]
    return int((torch.tensor(lengths) > length).sum())
