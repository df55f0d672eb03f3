"""Tiny random checkpoints of the published rewards, in their layouts, with tokenizers to go with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from rewards import (
    AestheticReward,
    CLIPReward,
    Compute,
    HPSv2Reward,
    HPSv3Reward,
    ImageRewardReward,
    PickScoreReward,
    Reward,
)

WORDS = ["a", "red", "blue", "cat", "dog", "of", "photo", "zero", "one", "two"]
QWEN: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "hidden_act": "quick_gelu",
    },
}
MED = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40}
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def _tokenizer(folder: Path, *, special: list[str], unknown: str, **options: Any) -> Any:
    """A tokenizer of whole words; the special tokens come first."""
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "template" in options:
        names = [name for name in special if name in options["template"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=options.pop("template"), special_tokens=[(name, vocabulary[name]) for name in names]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, additional_special_tokens=special, **options
    )
    fast.save_pretrained(folder)
    return fast


def pickscore(folder: Path) -> PickScoreReward:
    """A CLIPModel of transformers in a folder."""
    names = ["<unk>", "<start>", "<end>"]
    tokenizer = _tokenizer(folder, special=names, unknown="<unk>", template="<start> $A <end>", pad_token="<end>")
    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**common, "vocab_size": len(tokenizer), "eos_token_id": 2, "max_position_embeddings": 12},
        vision_config={**common, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return PickScoreReward(str(folder))


def architecture(folder: Path) -> str:
    """The name of a small architecture that open_clip knows from now on."""
    path = folder / "softgen-tiny.json"
    path.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(path)
    return path.stem


def hpsv2(folder: Path) -> HPSv2Reward:
    """A torch file with `state_dict`."""
    name = architecture(folder)
    model = open_clip.create_model(name)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return HPSv2Reward(folder / "HPS_v2.1_compressed.pt", model_name=name)


def aesthetic(folder: Path) -> AestheticReward:
    """A torch file of the head, and one of the tower."""
    name = architecture(folder)
    torch.save(open_clip.create_model(name, force_quick_gelu=True).state_dict(), folder / "clip.pt")
    sizes = {0: (8, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    state = {}
    for index, size in sizes.items():
        for key, value in nn.Linear(*size).state_dict().items():
            state[f"layers.{index}.{key}"] = value
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return AestheticReward(
        folder / "sac+logos+ava1-l14-linearMSE.pth", clip_weights=folder / "clip.pt", model_name=name
    )


def imagereward_state(*, rows: int, width: int = 16) -> dict[str, Tensor]:
    """The official layout, from transformers' own modules."""
    vision = transformers.BlipVisionModel(
        transformers.BlipVisionConfig(
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )
    text = transformers.models.blip.modeling_blip_text.BlipTextModel(
        transformers.BlipTextConfig(
            vocab_size=rows, hidden_size=16, encoder_hidden_size=width, is_decoder=True, use_cache=False, **MED
        ),
        add_pooling_layer=False,
    )
    back = (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("encoder.layers.", "blocks."),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("post_norm", "norm"),
        ("post_layernorm", "norm"),
    )
    state = {}
    for name, value in vision.state_dict().items():
        official = name
        for ours, theirs in back:
            official = official.replace(ours, theirs)
        state[f"blip.visual_encoder.{official.replace('post_norm', 'norm')}"] = value
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state["blip.text_proj.weight"] = torch.zeros(4, 16)
    sizes = {0: (16, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    for index, size in sizes.items():
        for key, value in nn.Linear(*size).state_dict().items():
            state[f"mlp.layers.{index}.{key}"] = value
    return {name: value.clone() for name, value in state.items()}


def imagereward(folder: Path) -> ImageRewardReward:
    """ImageReward.pt with med_config.json beside it."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = _tokenizer(folder, special=names, unknown="[UNK]", template="[CLS] $A [SEP]", pad_token="[PAD]")
    torch.save(imagereward_state(rows=len(tokenizer) + 2), folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    return ImageRewardReward(folder, tokenizer=str(folder), vision_heads=2)


def hpsv3(folder: Path, **options: Any) -> HPSv3Reward:
    """HPSv3.safetensors in the layout of transformers 4, with lm_head."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = _tokenizer(folder, special=special, unknown="<unk>", pad_token="<unk>")
    rows = len(tokenizer) + 1
    config = {**QWEN, "image_token_id": 5, "vision_start_token_id": 3, "vision_end_token_id": 4}
    model = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**config, vocab_size=rows))
    head = nn.Sequential(
        nn.Linear(16, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    state = {name.replace("language_model.", "model."): value for name, value in model.state_dict().items()}
    state |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file({name: value.clone() for name, value in state.items()}, folder / "HPSv3.safetensors")
    return HPSv3Reward(
        folder,
        base=str(folder),
        config=config,
        pixels=56 * 56,
        reward_token_id=rows - 1,
        pad_token_id=0,
        **options,
    )


BUILDERS = {
    "aesthetic": aesthetic,
    "hpsv2": hpsv2,
    "hpsv3": hpsv3,
    "imagereward": imagereward,
    "pickscore": pickscore,
}


def clip(folder: Path) -> CLIPReward:
    """A torch file, kept if it is there."""
    path = folder / "clip.pt"
    name = architecture(folder)
    if not path.is_file():
        torch.save(open_clip.create_model(name).state_dict(), path)
    return CLIPReward(name, pretrained=path)


# How the tiny checkpoint in a folder is opened once more, computed in another way.
AGAIN: dict[str, Callable[[Path, Compute], Reward]] = {
    "aesthetic": lambda folder, compute: AestheticReward(
        folder / "sac+logos+ava1-l14-linearMSE.pth",
        clip_weights=folder / "clip.pt",
        model_name=architecture(folder),
        compute=compute,
    ),
    "clip": lambda folder, compute: CLIPReward(architecture(folder), pretrained=folder / "clip.pt", compute=compute),
    "hpsv2": lambda folder, compute: HPSv2Reward(
        folder / "HPS_v2.1_compressed.pt", model_name=architecture(folder), compute=compute
    ),
    "imagereward": lambda folder, compute: ImageRewardReward(
        folder, tokenizer=str(folder), vision_heads=2, compute=compute
    ),
    "pickscore": lambda folder, compute: PickScoreReward(str(folder), compute=compute),
}
