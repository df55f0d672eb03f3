"""The backend "official", on stand-ins for the packages; on the packages themselves in test_official_packages.py."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_packages import write_fake_packages
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rewards import Compute, HPSv3Reward, ImageRewardReward, Reward, probe_reward
from rewards.isolated import Isolated, WorkerError

PROMPTS = ["a red cat", "dog"]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both packages where the worker finds them, and checkpoints for them."""
    (tmp_path / "packages").mkdir()
    write_fake_packages(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    torch.save({"weight": torch.tensor([1.0, 2.0, 4.0])[:, None, None]}, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    save_file({"weight": torch.tensor([3.0])}, tmp_path / "HPSv3.safetensors")
    return tmp_path


def _gradient(reward: Reward, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_()
    scores = reward(leaf, PROMPTS)
    (gradient,) = torch.autograd.grad((scores * torch.tensor([1.0, -2.0])).sum(), leaf)
    return scores.detach(), gradient


def _end(reward: ImageRewardReward | HPSv3Reward) -> None:
    assert isinstance(reward.official, Isolated)
    reward.official.close()


def test_imagereward_gets_its_own_transforms_of_tensors(packages: Path) -> None:
    reward = ImageRewardReward(packages, backend="official", python=sys.executable)
    images = torch.rand(2, 3, 16, 16)
    leaf = images.clone().requires_grad_()
    pixels = (F.interpolate(leaf, (8, 8), mode="bilinear", antialias=True) - 0.5) / 0.25
    weights = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    expected = (pixels * weights).mean(dim=(1, 2, 3)) * torch.tensor([3, 1])
    (slope,) = torch.autograd.grad((expected * torch.tensor([1.0, -2.0])).sum(), leaf)
    scores, gradient = _gradient(reward, images)
    torch.testing.assert_close(scores, expected.detach())
    torch.testing.assert_close(gradient, slope)
    probe_reward(reward, image_size=16, conditions=PROMPTS)
    _end(reward)


def test_hpsv3_gets_one_image_at_a_time_in_0_to_255(packages: Path) -> None:
    reward = HPSv3Reward(packages, base="a/base", backend="official", python=sys.executable)
    images = torch.rand(2, 3, 5, 4)
    scores, gradient = _gradient(reward, images)
    lengths = torch.tensor([9.0, 3.0])
    torch.testing.assert_close(scores, 3 * images.mean(dim=(1, 2, 3)) * lengths)
    wanted = 3 * lengths * torch.tensor([1.0, -2.0]) / 60
    torch.testing.assert_close(gradient, wanted[:, None, None, None].expand_as(images))
    _end(reward)


def test_micro_batches_reach_the_worker(packages: Path) -> None:
    whole, parts = (
        ImageRewardReward(packages, backend="official", python=sys.executable, compute=Compute(micro_batch=size))
        for size in (0, 1)
    )
    images = torch.rand(2, 3, 16, 16)
    for one, other in zip(_gradient(whole, images), _gradient(parts, images), strict=True):
        torch.testing.assert_close(one, other)
    _end(whole)
    _end(parts)


@pytest.fixture
def _no_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return


@pytest.mark.usefixtures("_no_environments")
def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^backend: expected native or official, got 'remote'$"):
        ImageRewardReward(tmp_path, backend="remote")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^python: expected none beside backend 'native', got '/a/python'$"):
        HPSv3Reward(tmp_path, python="/a/python")
    folder = tmp_path / "cache" / "softgen" / "environments"
    for cls, name in ((ImageRewardReward, "imagereward"), (HPSv3Reward, "hpsv3")):
        missing = (
            f"python: expected the environment of {name}, got none in {folder / name}: python -m rewards env {name}"
        )
        with pytest.raises(ValueError, match=f"^{missing}$"):
            cls(tmp_path, backend="official")
    with pytest.raises(ValueError, match=r"^python: expected an interpreter, got '/a/python'$"):
        ImageRewardReward(tmp_path, backend="official", python="/a/python")
    for options, argument in (
        ({"tokenizer": "mine"}, "tokenizer"),
        ({"vision_heads": 2}, "vision_heads"),
        ({"compute": Compute(dtype="bfloat16")}, "compute.dtype"),
    ):
        with pytest.raises(ValueError, match=rf"^{argument}: expected its default beside backend 'official'"):
            ImageRewardReward(tmp_path, backend="official", **options)  # type: ignore[arg-type]


def test_an_environment_without_the_package_is_one_line(tmp_path: Path) -> None:
    for cls, name, package in (
        (ImageRewardReward, "imagereward", "image-reward"),
        (HPSv3Reward, "hpsv3", "hpsv3"),
    ):
        with pytest.raises(
            WorkerError,
            match=rf"^reward {name}: ImportError: expected the package {package} in \S+, got none: "
            rf"python -m rewards env {name}$",
        ):
            cls(tmp_path, backend="official", python=sys.executable)


def test_a_package_that_fails_and_a_worker_that_dies_are_one_line(packages: Path) -> None:
    (packages / "packages" / "ImageReward" / "__init__.py").write_text("from torch import nothing_of_that_name")
    with pytest.raises(WorkerError, match=r"^reward imagereward: ImportError: cannot import name 'nothing_of_that"):
        ImageRewardReward(packages, backend="official", python=sys.executable)
    (packages / "packages" / "ImageReward" / "__init__.py").write_text("import os; os._exit(1)")
    with pytest.raises(WorkerError, match=r"^reward imagereward: expected .* to run the worker, got one that died"):
        ImageRewardReward(packages, backend="official", python=sys.executable)
    with pytest.raises(WorkerError, match=r"^reward hpsv3: ValueError: checkpoint: expected a file"):
        HPSv3Reward(packages / "none", backend="official", python=sys.executable)
