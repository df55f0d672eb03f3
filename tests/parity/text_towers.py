"""CLIP text towers of fixtures as folders of their libraries, and the cliptext fixture."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softgen.models.pretrained_text import PretrainedTextEncoder, openai_clip_text
from tests.parity.fixture import Family, Fixture, Outputs


def save_tokenizer(folder: Path, *, length: int) -> None:
    """A tokenizer that no fixture uses, since the ids are given, and that no tower opens without."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", model_max_length=length
    ).save_pretrained(folder)


@contextmanager
def transformers_tower(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[Path]:
    """A folder of transformers with a text tower alone."""
    from transformers import CLIPTextConfig

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        CLIPTextConfig(**config, architectures=["CLIPTextModelWithProjection"]).save_pretrained(folder)
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(folder, length=config["max_position_embeddings"])
        yield folder


def as_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layout of a text tower as those of transformers."""
    embeddings = "text_model.embeddings."
    renamed = {
        f"{embeddings}token_embedding.weight": weights["token_embedding.weight"],
        f"{embeddings}position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        renamed[f"text_model.final_layer_norm.{kind}"] = weights[f"ln_final.{kind}"]
        layer = 0
        while f"transformer.resblocks.{layer}.ln_1.{kind}" in weights:
            old, new = f"transformer.resblocks.{layer}.", f"text_model.encoder.layers.{layer}."
            parts = zip("qkv", weights[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True)
            renamed |= {f"{new}self_attn.{name}_proj.{kind}": part.clone() for name, part in parts}
            for before, after in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                renamed[f"{new}{after}.{kind}"] = weights[f"{old}{before}.{kind}"]
            layer += 1
    return renamed


@contextmanager
def open_clip_tower(arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[Path]:
    """A folder of open_clip that does not say QuickGELU, with a small image tower, which it does not open without."""
    import open_clip

    inner = weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    vision = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}
    names = ("context_length", "vocab_size", "width", "heads", "layers")
    settings = {
        "embed_dim": arguments["embed_dim"],
        "vision_cfg": vision,
        "text_cfg": {**{name: arguments[name] for name in names}, "mlp_ratio": inner / arguments["width"]},
    }
    state = {**open_clip.CLIP(**settings).state_dict(), **weights}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mean = [0.5] * 3
        content = {"model_cfg": settings, "preprocess_cfg": {"size": [8, 8], "mean": mean, "std": mean}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
        yield folder


def cliptext(fixture: Fixture) -> Outputs:
    arguments, weights = fixture.config["args"], load_file(fixture.weights())
    ids = fixture["in.ids"]
    sizes = {
        "vocab_size": arguments["vocab_size"],
        "hidden_size": arguments["width"],
        "intermediate_size": weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "projection_dim": arguments["embed_dim"],
        "num_hidden_layers": arguments["layers"],
        "num_attention_heads": arguments["heads"],
        "max_position_embeddings": arguments["context_length"],
        "hidden_act": "gelu",  # what it says is overruled
        "bos_token_id": arguments["vocab_size"] - 2,
        "eos_token_id": arguments["vocab_size"] - 1,
        "pad_token_id": 0,
    }
    quick = arguments.get("quick_gelu", True)
    with transformers_tower(sizes, as_transformers(weights)) as folder:
        theirs = _three(str(folder), ids, quick_gelu=quick)
    with open_clip_tower(arguments, weights) as folder:
        ours = _three(f"local-dir:{folder}", ids, quick_gelu=quick)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
        yield name, value


def _three(source: str, ids: Tensor, *, quick_gelu: bool) -> dict[str, Tensor]:
    """What MaskGen's network is told, and what TA-TiTok's decoder is told."""
    encoders = [openai_clip_text(source, layer=layer) for layer in (-2, -1)]
    if not quick_gelu:
        encoders = [PretrainedTextEncoder(**{**each.config, "force_quick_gelu": False}) for each in encoders]
    condition, guidance = (each.encode_ids(ids, ids != 0) for each in encoders)
    return {
        "out.penultimate": condition.states,
        "out.pooled": condition.pooled.unsqueeze(1),
        "out.text_guidance": guidance.states,
    }


def opened(folder: Path, **options: Any) -> PretrainedTextEncoder:
    """The tower of a folder of transformers."""
    return PretrainedTextEncoder(str(folder), **options)


FAMILIES = {"cliptext": Family(cliptext)}
