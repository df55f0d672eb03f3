"""Frozen networks that losses look through, LPIPS from a file, and DiffAugment."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from softgen.metrics import SmallClassifier
from softgen.tokenizers import ConvVQTokenizer
from softgen.tokenizers.alignment import imagenet_range
from softgen.training.augmentation import DRAWS, augment
from softgen.training.frozen_features import open_features, patches, resized
from softgen.training.perceptual import LPIPSDistance, open_perceptual


def transformers_vit(folder: Path) -> str:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder / "dino")
    return str(folder / "dino")


def timm_vit(folder: Path) -> str:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    target = folder / "timm"
    target.mkdir()
    save_file(model.state_dict(), target / "model.safetensors")
    settings = {"input_size": [3, 28, 28], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "num_classes": 0}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": settings, "model_args": sizes}
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_a_vit_of_transformers_gives_its_patches(tmp_path: Path) -> None:
    features = open_features(transformers_vit(tmp_path), key="features").eval()
    images = torch.rand(2, 3, 28, 28, requires_grad=True)
    maps = features(images)
    assert [tuple(layer.shape) for layer in maps] == [(2, 8, 4, 4)] * 3
    states = features.model(pixel_values=imagenet_range(images)).last_hidden_state  # type: ignore[operator]
    torch.testing.assert_close(patches(maps), states[:, 1:])
    assert torch.autograd.grad(maps[0].sum(), images)[0].abs().sum() > 0
    assert features.shapes(64) == [torch.Size((8, 4, 4))] * 3


def test_a_vit_of_timm_gives_its_patches(tmp_path: Path) -> None:
    features = open_features(timm_vit(tmp_path), key="features").eval()
    images = torch.rand(2, 3, 28, 28)
    maps = features(images)
    assert [tuple(layer.shape) for layer in maps] == [(2, 12, 2, 2)] * 2
    states = features.model.forward_features((images - 0.5) / 0.25)  # type: ignore[operator]
    torch.testing.assert_close(patches(maps), states[:, 1:])


def test_a_classifier_of_ours_gives_its_convolutions(tmp_path: Path) -> None:
    SmallClassifier(name="judge", image_size=28, num_classes=10, width=4).save(tmp_path / "judge")
    features = open_features(str(tmp_path / "judge"), key="features").eval()
    assert features.shapes(28) == [torch.Size(shape) for shape in ((4, 14, 14), (8, 14, 14), (8, 7, 7))]
    images = torch.rand(2, 3, 28, 28)
    judge = features.classifier
    assert isinstance(judge, SmallClassifier)
    last = judge.body[:-1](2 * images - 1)
    torch.testing.assert_close(patches(features(images)), last.flatten(2).transpose(1, 2))


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    ConvVQTokenizer(image_size=8, num_codes=4, channels=[8]).save_pretrained(tmp_path / "conv")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    expected = {
        "conv": "features: expected a SmallClassifier in ",
        "empty": "features: expected a folder with config.json, got ",
        "other": "features: expected a classifier of ours, or a ViT of transformers or timm, got ",
        "broken": "features: expected valid JSON in ",
    }
    for name, start in expected.items():
        with pytest.raises(ValueError, match="expected") as caught:
            open_features(str(tmp_path / name), key="features")
        assert str(caught.value).startswith(start)
        assert "\n" not in str(caught.value)
    (tmp_path / "bert").mkdir()
    config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^features: expected a model that can be opened in "):
        open_features(str(tmp_path / "bert"), key="features")


@pytest.mark.parametrize(("name", "net"), [("alexnet", "alex"), ("squeezenet1_1", "squeeze")])
def test_lpips_takes_its_network_from_a_file(name: str, net: str, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    backbone = getattr(torchvision.models, name)(weights=None).eval()
    torch.save(backbone.state_dict(), tmp_path / "net.pth")
    distance = open_perceptual(str(tmp_path / "net.pth"), key="network").eval()
    assert isinstance(distance, LPIPSDistance)
    assert distance.net == net
    images, real = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    scaled = (2 * images - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
        [0.458, 0.448, 0.450]
    ).view(3, 1, 1)
    first = backbone.features[:2](scaled)
    torch.testing.assert_close(distance.lpips.net(scaled)[0], first)
    assert distance(images, images).item() == pytest.approx(0, abs=1e-7)
    assert distance(images, real).item() > 0
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"^network: expected torchvision's vgg16, alexnet or squeezenet1_1 in "):
        open_perceptual(str(tmp_path / "other.pth"), key="network")


def middle(**at: float) -> Tensor:
    """Draws of two samples that change nothing, but for those given by place."""
    draws = torch.full((2, DRAWS), 0.5)
    draws[:, :3] = 0.0
    for place, value in at.items():
        draws[0, int(place[1:])] = value
    return draws


def test_augmentation_does_what_its_draws_say() -> None:
    images = torch.rand(2, 3, 8, 8)
    options = {"probability": 0.5, "cutout": 0.5}
    same = augment(images, middle(), kinds=["translation", "colour"], **options)
    torch.testing.assert_close(same, images)
    # A draw of 1 moves by an eighth of the side, down; what comes in is 0.
    moved = augment(images, middle(_6=1.0), kinds=["translation"], **options)
    torch.testing.assert_close(moved[0, :, 1:], images[0, :, :-1])
    assert (moved[0, :, 0] == 0).all()
    torch.testing.assert_close(moved[1], images[1])
    left = augment(images, middle(_7=0.0), kinds=["translation"], **options)
    torch.testing.assert_close(left[0, :, :, :-1], images[0, :, :, 1:])
    brighter = augment(images, middle(_3=0.9), kinds=["colour"], **options)
    torch.testing.assert_close(brighter[0], images[0] + 0.4)
    grey = augment(images, middle(_4=0.0), kinds=["colour"], **options)
    torch.testing.assert_close(grey[0], images[0].mean(dim=0).expand(3, 8, 8))
    flat = augment(images, middle(_5=0.0), kinds=["colour"], **options)
    torch.testing.assert_close(flat[0], images[0].mean() + (images[0] - images[0].mean()) / 2)
    holed = augment(images, middle(_2=0.0), kinds=["cutout"], **options)
    assert (holed[:, :, 2:6, 2:6] == 0).all()
    torch.testing.assert_close(holed[:, :, :2], images[:, :, :2])
    assert (holed == 0).sum() == 2 * 3 * 16
    none = augment(
        images, middle(_0=0.9, _1=0.9, _2=0.9, _3=0.9, _6=0.0), kinds=["translation", "colour", "cutout"], **options
    )
    torch.testing.assert_close(none[0], images[0])


def test_augmentation_is_differentiable_and_applied_as_often_as_asked() -> None:
    images = torch.rand(2000, 3, 4, 4, requires_grad=True)
    draws = torch.rand(2000, DRAWS, generator=torch.Generator().manual_seed(0))
    changed = augment(images, draws, kinds=["colour"], probability=0.3, cutout=0.2)
    share = ((changed - images).abs().amax(dim=(1, 2, 3)) > 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / 2000))
    assert torch.autograd.grad(changed.sum(), images)[0].isfinite().all()


def test_resizing() -> None:
    images = torch.rand(1, 3, 8, 8)
    assert resized(images, 8) is images
    assert resized(images, 6).shape == (1, 3, 6, 6)
    assert torch.allclose(resized(torch.full((1, 3, 8, 8), 0.25), 20), torch.tensor(0.25))


def test_pixels_out_of_range_are_pulled_back_through_a_resize() -> None:
    images = torch.tensor([-0.5, 1.5]).repeat_interleave(96).view(2, 3, 8, 4).repeat(1, 1, 1, 2).requires_grad_()
    (gradient,) = torch.autograd.grad((resized(images, 6) - 0.5).square().sum(), images)
    assert (gradient[0] < 0).all()
    assert (gradient[1] > 0).all()
