"""HPSv3, and Qwen2-VL's image preprocessing."""

from typing import Any

import torch

from rewards.hpsv3 import HPSv3Reward
from rewards.qwen_images import fitted_size, patch_rows
from tests.parity.fixture import Family, Fixture, Outputs
from tests.parity.reward_models import _gradient

_EIGHT_BIT = 0.02


def hpsv3(fixture: Fixture) -> Outputs:
    special, pixels = fixture.config["special"], fixture.config["min_max_pixels"]
    reward = HPSv3Reward(
        fixture.weights(),
        config=fixture.config["args"],
        pixels=pixels,
        reward_token_id=special["reward_token_id"],
        pad_token_id=special["pad_token_id"],
    )
    rows, grids = fixture["pixel_values"], fixture["image_grid_thw"]
    text: tuple[Any, Any] = (fixture["input_ids"], fixture["attention_mask"])
    images = fixture["image_uint8"] / 255
    own_rows, own_grids = patch_rows(images, least=pixels, most=pixels)
    yield "pixel_values", own_rows, _EIGHT_BIT
    yield "pixel_values_diff", own_rows
    yield "image_grid_thw", own_grids
    score = reward.score(rows, grids, *text)
    yield "reward", score
    yield "reward_diff", reward.score(own_rows, own_grids, *text)
    yield "grad_pixel_values", _gradient(lambda x: reward.score(x, grids, *text)[:, 0], rows)

    def of_image(x: torch.Tensor) -> torch.Tensor:
        return reward.score(patch_rows(x / 255, least=pixels, most=pixels)[0], grids, *text)[:, 0]

    yield "grad_image_255", _gradient(of_image, fixture["image_uint8"].float())
    # A negative control: grid positions give another score.
    assert ((score - fixture["reward_if_mrope"]).abs().amax() > 1e-2).item()


def image_processing(fixture: Fixture) -> Outputs:
    images, pixels = fixture["image_uint8"] / 255, fixture.config["min_max_pixels"]
    rows, grids = patch_rows(images, least=pixels, most=pixels)
    for name in ("v4", "v5", "hpsv3"):
        yield f"pixel_values_{name}", rows, _EIGHT_BIT
    yield "pixel_values_v5_float", rows, 0.0
    yield "image_grid_thw", grids
    yield "image_grid_thw_hpsv3", grids
    size = fitted_size(*images.shape[-2:], least=56 * 56, most=28 * 28 * 1280)
    yield "image_grid_thw_default", torch.tensor([[1, size[0] // 14, size[1] // 14]] * len(images))

    def weighted(x: torch.Tensor) -> torch.Tensor:
        return patch_rows(x, least=pixels, most=pixels)[0] * fixture["weight"]

    yield "grad_image", _gradient(weighted, images)


FAMILIES = {
    "hpsv3_qwen2vl": Family(
        hpsv3, 1e-5, ("image_uint8", "input_ids", "attention_mask", "reward_if_mrope", "mrope_position_ids")
    ),
    "qwen2vl_imgproc": Family(image_processing, 1e-5, ("image_uint8", "weight")),
}
