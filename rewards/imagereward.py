"""ImageReward (arXiv 2304.05977) on transformers' BLIP classes."""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.backend import Backend, is_official, open_official
from rewards.base import Reward
from rewards.checkpoints import find_file, load_checked, part_of, read_checkpoint
from rewards.compute import Compute
from rewards.errors import one_line
from rewards.heads import LinearStack
from rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing
from rewards.transformers_clip import LazyTokenizer, import_transformers, truncated

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_MAX_LENGTH = 35
_TOKENIZER, _HEADS = "bert-base-uncased", 16
_OFFICIAL = "rewards.official.imagereward.OfficialImageReward"
_FILES = ("ImageReward.pt", "model.safetensors")
# Official names of the vision tower, and those of transformers.
_RENAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageRewardReward(Reward):
    """(MLP(first text state, which sees the image) - 0.167) / 1.033: about standard normal, -2.3 to 2.

    The checkpoint is `ImageReward.pt` of `THUDM/ImageReward` (Apache-2.0 licence), with `med_config.json` beside it: a
    ViT-L/16 at 224 pixels and a BERT with cross-attention, 447 M parameters, 1.8 GB in float32. The tokenizer is
    `bert-base-uncased`'s with two tokens more.

    Args:
        checkpoint: The file, or a folder or hub id that holds it.
        tokenizer: Folder or hub id of BERT's tokenizer.
        med_config: The text model's settings; by default `med_config.json` beside the checkpoint, or BERT-base's.
        vision_heads: Attention heads of the vision tower, which shapes do not tell.
        class_names: Prompts that stand for class labels.
        backend: "official" has the package image-reward compute, in a process and an environment of its own (`python -m
            rewards env imagereward`), on the CPU unless `compute.device` says otherwise.
        python: For "official": the interpreter of another environment that has the package.
        compute: Precision, micro-batches, recomputed activations and device.
        name: Name in logs and errors.

    Raises:
        ImportError: transformers is not installed; the message has the command.
        ValueError: The checkpoint or the tokenizer cannot be opened, or does not fit; for "official", there is no such
            environment, it lacks the package, or its process dies.
    """

    def __init__(
        self,
        checkpoint: str | Path = "THUDM/ImageReward",
        *,
        tokenizer: str = _TOKENIZER,
        med_config: Mapping[str, Any] | None = None,
        vision_heads: int = _HEADS,
        class_names: Sequence[str] | None = None,
        backend: Backend = "native",
        python: str | Path | None = None,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        name: str = "imagereward",
    ) -> None:
        super().__init__(name=name, class_names=class_names, compute=compute)
        self.official: Reward | None = None
        if is_official(backend, python=python):
            self.official = open_official(
                _OFFICIAL,
                environment="imagereward",
                python=python,
                options={"checkpoint": str(checkpoint)},
                unread={
                    "tokenizer": tokenizer != _TOKENIZER,
                    "med_config": med_config is not None,
                    "vision_heads": vision_heads != _HEADS,
                },
                compute=compute,
                name=name,
            )
        else:
            self._open(checkpoint, tokenizer=tokenizer, med_config=med_config, vision_heads=vision_heads)

    def _open(
        self, checkpoint: str | Path, *, tokenizer: str, med_config: Mapping[str, Any] | None, vision_heads: int
    ) -> None:
        transformers = import_transformers()
        state = {
            key: value
            for key, value in read_checkpoint(checkpoint, key="checkpoint", names=_FILES).items()
            if not key.startswith(_UNUSED)
        }
        beside = find_file(checkpoint, key="checkpoint", names=_FILES).parent / "med_config.json"
        settings = med_config or (_read_settings(beside) if beside.is_file() else {})
        vision = {_renamed(key): value for key, value in part_of(state, "blip.visual_encoder.").items()}
        if "embeddings.patch_embedding.weight" not in vision:
            raise ValueError("checkpoint: expected one of ImageReward with 'blip.visual_encoder.*', got none")
        self.vision = transformers.BlipVisionModel(_vision_config(transformers, vision, heads=vision_heads))
        width = self.vision.config.hidden_size
        self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(
            _text_config(transformers, state, settings, width=width), add_pooling_layer=False
        )
        self.mlp = LinearStack(self.text.config.hidden_size)
        load_checked(self.vision, vision, key="checkpoint (blip.visual_encoder)")
        load_checked(self.text, part_of(state, "blip.text_encoder."), key="checkpoint (blip.text_encoder)")
        load_checked(self.mlp, part_of(state, "mlp."), key="checkpoint (mlp)")
        size = self.vision.config.image_size
        self.preprocessing = Preprocessing(size=(size, size), mean=OPENAI_MEAN, std=OPENAI_STD)
        self._tokenizer = LazyTokenizer(tokenizer)
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1]; prompts of more than 35 tokens are cut, with a warning."""
        if self.official is not None:
            return self.official(images, prompts)
        tokenizer = self._tokenizer.open()
        cut = truncated(tokenizer, prompts, length=_MAX_LENGTH)
        if cut:
            warnings.warn(
                f"reward {self.name}: cut {cut} of {len(prompts)} prompts to {_MAX_LENGTH} tokens", stacklevel=3
            )
        encoded = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_LENGTH, return_tensors="pt"
        )
        ids, mask = (encoded[key].to(images.device) for key in ("input_ids", "attention_mask"))
        return self.score(self.preprocessing(images), ids, mask)

    def image_states(self, pixels: Tensor) -> Tensor:
        """States (B, P + 1, W) of preprocessed images (B, 3, S, S)."""
        states: Tensor = self.vision(pixels.to(next(self.vision.parameters()).dtype)).last_hidden_state
        return states

    def text_states(self, image_states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """States (B, L, d) of prompts that see their image."""
        states: Tensor = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=image_states,
            encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long, device=ids.device),
            is_decoder=False,
        ).last_hidden_state
        return states

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores (B,) of preprocessed images (B, 3, S, S) and token ids (B, L) with their mask."""
        states = self.text_states(self.image_states(pixels), ids, mask)
        raw: Tensor = self.mlp(states[:, 0])
        return (raw[:, 0] - _MEAN) / _STD


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint: expected JSON in {path}, got an error ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"checkpoint: expected a mapping in {path}, got a {type(settings).__name__}")
    return settings


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _vision_config(transformers: Any, state: Mapping[str, Tensor], *, heads: int) -> Any:
    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    if width % heads:
        raise ValueError(f"vision_heads: expected a divisor of the width {width}, got {heads}")
    depth = 0
    while f"encoder.layers.{depth}.layer_norm1.weight" in state:
        depth += 1
    return transformers.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=patch * math.isqrt(state["embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(transformers: Any, state: Mapping[str, Tensor], settings: Mapping[str, Any], *, width: int) -> Any:
    rows, hidden = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    return transformers.BlipTextConfig(
        vocab_size=rows,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=settings.get("intermediate_size", 3072),
        num_hidden_layers=settings.get("num_hidden_layers", 12),
        num_attention_heads=settings.get("num_attention_heads", 12),
        max_position_embeddings=settings.get("max_position_embeddings", 512),
        hidden_act=settings.get("hidden_act", "gelu"),
        layer_norm_eps=settings.get("layer_norm_eps", 1e-12),
        is_decoder=True,  # so that it has cross-attention; it is called as an encoder
        use_cache=False,
    )
