"""Reward models: PickScore, HPSv2, the aesthetic predictor, ImageReward."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rewards.aesthetic import AestheticReward
from rewards.hpsv2 import HPSv2Reward
from rewards.imagereward import ImageRewardReward
from rewards.pickscore import PickScoreReward
from tests.parity.fixture import Family, Fixture, Outputs

_GIVEN = ("image_uint8", "input_ids", "attention_mask", "text_tokens")
# The official pipeline rounds to 8 bits.
_EIGHT_BIT = 0.02


def _gradient(score: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """d sum(score) / d inputs."""
    with torch.enable_grad():
        leaf = inputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
    return gradient


def pickscore(fixture: Fixture) -> Outputs:
    import transformers

    arguments = fixture.config["args"]
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.CLIPConfig(
            text_config=arguments["text_config"],
            vision_config=arguments["vision_config"],
            projection_dim=arguments["projection_dim"],
        )
        config.save_pretrained(folder)
        save_file(load_file(fixture.weights()), f"{folder}/model.safetensors", metadata={"format": "pt"})
        reward = PickScoreReward(folder)
    pixels, ids = fixture["pixel_values_pil"], fixture["input_ids"]
    text = reward.model.encode_text(ids)
    unit = F.normalize(text, dim=-1)
    yield "pixel_values_pil", reward.preprocessing(fixture["image_uint8"] / 255), _EIGHT_BIT
    yield "image_features", reward.model.encode_image(pixels)
    yield "text_features", text
    score = reward.score(pixels, unit)
    yield "score_pil", score
    yield "cosine_pil", score / reward.model.logit_scale.exp()
    each = torch.stack([reward.score(pixels[i : i + 1].expand_as(pixels), unit) for i in range(len(pixels))], dim=1)
    yield "logits_per_text", each
    yield "model_logits_per_image", each.T
    yield "grad_pixel_values", _gradient(lambda x: reward.score(x, unit), pixels)
    # Torchvision's crop rule, on the floats.
    loose = _with_crop(reward)
    yield "pixel_values_tensor", loose.preprocessing(fixture["image_uint8"] / 255), _EIGHT_BIT
    size = fixture.config["image_size"]
    yield "score_tensor", reward.score(fixture["pixel_values_tensor"], unit)
    yield "grad_image", _gradient(lambda x: loose.score(_plain(x, size), unit), fixture["image_uint8"] / 255)


def _with_crop(reward: PickScoreReward) -> PickScoreReward:
    from dataclasses import replace

    reward.preprocessing = replace(reward.preprocessing, crop="round")
    return reward


def _plain(images: Tensor, size: int) -> Tensor:
    """The tensor transforms that these gradients were made with: resize, crop, normalise, nothing clipped."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as T

    from rewards.preprocessing import OPENAI_MEAN, OPENAI_STD

    resized = T.resize(images, [size], InterpolationMode.BICUBIC, antialias=True)
    return T.normalize(T.center_crop(resized, [size]), list(OPENAI_MEAN), list(OPENAI_STD))


@contextmanager
def _architecture(arguments: dict[str, object]) -> Iterator[str]:
    """An architecture of these sizes under a name that open_clip knows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "softgen-parity.json"
        path.write_text(json.dumps(arguments))
        open_clip.add_model_config(path)
        yield path.stem


def hpsv2(fixture: Fixture) -> Outputs:
    arguments = fixture.config["args"]
    with _architecture(arguments) as name:
        reward = HPSv2Reward(fixture.weights(), model_name=name)
    tokens, pixels, images = fixture["text_tokens"], fixture["pixel_values"], fixture["image_uint8"] / 255
    text = F.normalize(reward.model.encode_text(tokens), dim=-1)
    yield "pixel_values", reward.preprocessing(images), _EIGHT_BIT
    yield "image_features", F.normalize(reward.model.encode_image(pixels), dim=-1)
    yield "text_features", text
    yield "score", reward.score(pixels, text)
    yield "grad_pixel_values", _gradient(lambda x: reward.score(x, text), pixels)
    yield "score_tensor", reward.score(reward.preprocessing(images), text)
    yield "grad_image", _gradient(lambda x: reward.score(reward.preprocessing(x), text), images)


def aesthetic(fixture: Fixture) -> Outputs:
    given = fixture.config["args"]
    vision = {
        "image_size": given["image_size"],
        "layers": given["vision_layers"],
        "width": given["vision_width"],
        "head_width": given["vision_width"] // given["vision_heads"],
        "patch_size": given["patch_size"],
    }
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    with _architecture({"embed_dim": given["embed_dim"], "vision_cfg": vision, "text_cfg": text}) as name:
        reward = AestheticReward(fixture.weights(), model_name=name)
    pixels = fixture["pixel_values"]
    yield "pixel_values", reward.preprocessing(fixture["image_uint8"] / 255), _EIGHT_BIT
    yield "image_features", reward.features(pixels)
    yield "score", reward.score(pixels)
    yield "score_official", reward.score(pixels)
    yield "grad_pixel_values", _gradient(reward.score, pixels)


def imagereward(fixture: Fixture) -> Outputs:
    arguments = fixture.config["args"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(fixture.weights(), f"{folder}/model.safetensors")
        Path(folder, "med_config.json").write_text(json.dumps(arguments["med"]))
        reward = ImageRewardReward(folder, vision_heads=arguments["vit"]["num_heads"])
    ids, mask, pixels = fixture["input_ids"], fixture["attention_mask"], fixture["pixel_values_pil"]
    images = fixture["image_uint8"] / 255
    states = reward.image_states(pixels)
    yield "pixel_values_pil", reward.preprocessing(images), _EIGHT_BIT
    yield "image_embeds", states
    yield "text_last_hidden_state", reward.text_states(states, ids, mask)
    yield "score_pil", reward.score(pixels, ids, mask)
    yield "grad_pixel_values", _gradient(lambda x: reward.score(x, ids, mask), pixels)
    size = arguments["image_size"]
    yield "pixel_values_tensor", _plain(images, size)
    yield "score_tensor", reward.score(fixture["pixel_values_tensor"], ids, mask)
    yield "grad_image", _gradient(lambda x: reward.score(_plain(x, size), ids, mask), images)


FAMILIES = {
    "pickscore_clip": Family(pickscore, 1e-5, _GIVEN),
    "hpsv2": Family(hpsv2, 1e-5, _GIVEN),
    "laion_aesthetic": Family(aesthetic, 1e-5, _GIVEN),
    "imagereward": Family(imagereward, 1e-5, _GIVEN),
}
