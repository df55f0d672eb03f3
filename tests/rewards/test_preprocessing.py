from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, functional

from rewards.preprocessing import Preprocessing

open_clip = pytest.importorskip("open_clip")

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)


def noise(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width)


def soft(height: int, width: int) -> Tensor:
    return F.interpolate(torch.rand(1, 3, 5, 5), size=(height, width), mode="bilinear")[0]


def edges(height: int, width: int) -> Tensor:
    return (F.interpolate(torch.rand(1, 3, 8, 8), size=(height, width))[0] > 0.5).float()


def levels(pixels: Tensor) -> Tensor:
    """Normalised pixels in units of an 8-bit level."""
    return pixels * torch.tensor(STD)[:, None, None] * 255


@pytest.mark.parametrize("draw", [noise, soft, edges])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 90), (301, 200), (50, 400), (400, 257)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("target", [(32, 32), (120, 120), (24, 40)])
def test_it_agrees_with_the_transform_of_open_clip(
    draw: Callable[[int, int], Tensor], size: tuple[int, int], mode: str, target: tuple[int, int]
) -> None:
    # PIL rounds to 8 bits after either pass: half a level from the second, and half a level, times what the bicubic
    # filter makes of it, from the first. In which order the passes come depends on Pillow's release; square images go
    # by rows first in all.
    images = (draw(*size) * 255).round() / 255
    picture = Image.fromarray((images * 255).round().byte().permute(1, 2, 0).numpy())
    official = open_clip.image_transform(target, is_train=False, mean=MEAN, std=STD, resize_mode=mode)(picture)
    ours = Preprocessing(size=target, mean=MEAN, std=STD, resize_mode=mode)(images[None])[0]
    difference = levels(ours - official).abs()
    assert ours.shape == official.shape == (3, *target)
    if size[0] != size[1] or target[0] != target[1]:
        turned = Preprocessing(size=target[::-1], mean=MEAN, std=STD, resize_mode=mode)(images.mT[None])[0].mT
        difference = min(difference, levels(turned - official).abs(), key=torch.max)
    assert difference.max() < 1.2
    assert difference.mean() < 0.35


@pytest.mark.parametrize("size", [(20, 20), (300, 200), (40, 90)])
def test_on_tensors_what_overshoots_is_kept(size: tuple[int, int]) -> None:
    images = edges(*size)[None]
    whole = Preprocessing(size=(64, 64), mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode="longest", clip=False)(images)
    shape = [round(side * 64 / max(size)) for side in size]
    official = functional.resize(images, shape, InterpolationMode.BICUBIC, antialias=True)
    top, left = ((64 - side) // 2 for side in shape)
    torch.testing.assert_close(whole[..., top : top + shape[0], left : left + shape[1]], official, rtol=0, atol=1e-6)
    assert official.max() > 1.01


def test_bilinear_agrees_too() -> None:
    images = (noise(50, 70) * 255).round() / 255
    picture = Image.fromarray((images * 255).round().byte().permute(1, 2, 0).numpy())
    official = open_clip.image_transform(
        32, is_train=False, mean=MEAN, std=STD, resize_mode="squash", interpolation="bilinear"
    )(picture)
    ours = Preprocessing(size=(32, 32), mean=MEAN, std=STD, resize_mode="squash", interpolation="bilinear")
    assert levels(ours(images[None])[0] - official).abs().max() < 1.2


@pytest.mark.parametrize("size", [(6, 9), (20, 17)])
def test_the_gradient_agrees_with_finite_differences(size: tuple[int, int]) -> None:
    # Away from black and white, where nothing is clipped.
    images = (0.4 + 0.2 * torch.rand(1, 3, *size, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(Preprocessing(size=(8, 8), mean=MEAN, std=STD), images)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_black_and_white_keep_their_gradient(value: float) -> None:
    images = torch.full((1, 3, 28, 28), value, requires_grad=True)
    Preprocessing(size=(50, 50), mean=MEAN, std=STD)(images).sum().backward()
    assert images.grad is not None
    assert images.grad.min() > 0


def test_an_image_of_the_right_size_is_only_normalised() -> None:
    images = torch.rand(2, 3, 32, 32)
    expected = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(Preprocessing(size=(32, 32), mean=MEAN, std=STD)(images), expected)


def test_half_precision_is_filtered_in_float32() -> None:
    assert Preprocessing(size=(8, 8), mean=MEAN, std=STD)(torch.rand(1, 3, 9, 9).bfloat16()).dtype == torch.float32
