"""How and where a reward computes: precision, micro-batches, recomputed activations, another device."""

import copy
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import AGAIN, BUILDERS, architecture, clip
from torch import Tensor, nn
from toy_rewards import Scripted

from rewards import CompositeReward, Compute, Reward, build
from rewards.heads import WideHead

PROMPTS = ["a red cat", "photo of two blue dog", "a"]
NAMES = [*sorted(BUILDERS), "clip"]
EACH = pytest.mark.parametrize("name", NAMES)


def pair(name: str, folder: Path, compute: Compute) -> tuple[Reward, Reward]:
    """A reward, and the same one computed as asked."""
    torch.manual_seed(2)
    builder: Any = clip if name == "clip" else BUILDERS[name]
    plain = builder(folder)
    if name == "hpsv3":
        torch.manual_seed(2)
        return plain, builder(folder, compute=compute)
    return plain, AGAIN[name](folder, compute)


def score(reward: Reward, images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_()
    scores = reward(leaf, PROMPTS)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (gradient,) = torch.autograd.grad((scores * weights).sum(), leaf)
    return scores.detach(), gradient


@EACH
def test_recomputed_activations_change_nothing_and_stay_in_eval_mode(name: str, tmp_path: Path) -> None:
    plain, slim = pair(name, tmp_path, Compute(checkpoint_activations=True))
    images = torch.rand(3, 3, 56, 56)
    assert _recomputing(slim)
    for wanted, got in zip(score(plain, images), score(slim, images), strict=True):
        assert torch.equal(wanted, got)
    assert not any(module.training for module in slim.train().modules())


def _recomputing(reward: Reward) -> list[nn.Module]:
    return [module for module in reward.modules() if "forward" in vars(module)]


def test_layers_run_again_in_the_backward_pass_and_a_copy_uses_its_own_weights(tmp_path: Path) -> None:
    _, slim = pair("imagereward", tmp_path, Compute(checkpoint_activations=True))
    blocks = _recomputing(slim)
    assert len(blocks) == 4  # two of the vision tower, two of the text model
    runs: list[str] = []
    attention = blocks[0].self_attn
    assert isinstance(attention, nn.Module)
    attention.register_forward_hook(lambda *_: runs.append("forward"))
    leaf = torch.rand(3, 3, 40, 40).requires_grad_()
    scores = slim(leaf, PROMPTS)
    assert len(runs) == 1
    scores.sum().backward()
    assert len(runs) == 2
    with torch.no_grad():
        slim(leaf, PROMPTS)
    assert len(runs) == 3
    other = copy.deepcopy(slim)
    with torch.no_grad():
        for parameter in _recomputing(other)[-1].parameters():
            parameter.mul_(3)
        assert not torch.equal(other(leaf, PROMPTS), slim(leaf, PROMPTS))
        assert torch.equal(slim(leaf, PROMPTS), scores)


@EACH
def test_weights_in_bfloat16_but_heads_scales_and_scores_in_float32(name: str, tmp_path: Path) -> None:
    plain, narrow = pair(name, tmp_path, Compute(dtype="bfloat16"))
    images = torch.rand(3, 3, 56, 56)
    scores, gradient = score(narrow, images)
    assert scores.dtype == gradient.dtype == torch.float32
    wanted, slope = score(plain, images)
    torch.testing.assert_close(scores, wanted, rtol=0.05, atol=0.05)
    assert not torch.equal(scores, wanted)
    directions = [each.double().flatten() / each.double().norm() for each in (gradient, slope)]
    assert float(directions[0] @ directions[1]) > 0.97
    heads = {id(weight) for head in narrow.modules() if isinstance(head, WideHead) for weight in head.parameters()}
    for parameter in narrow.parameters():
        wide = id(parameter) in heads or parameter.ndim == 0
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_batch_norms_go_with_their_statistics(dtype: Any) -> None:
    class Normed(Reward):
        def __init__(self, compute: Compute) -> None:
            super().__init__(name="normed", compute=compute)
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
            nn.init.uniform_(self.net[1].running_var, 0.5, 2)  # type: ignore[arg-type]
            self.settle()

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.net(images.to(self.net[0].weight.dtype)).float().mean(dim=(1, 2, 3))  # type: ignore[arg-type]

    images = torch.rand(3, 3, 8, 8)
    narrow, plain = Normed(Compute(dtype=dtype)), Normed(Compute())
    assert narrow.net[0].weight.dtype == getattr(torch, dtype)
    for got, wanted in zip(score(narrow, images), score(plain, images), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.01)


@EACH
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    plain, parts = pair(name, tmp_path, Compute(micro_batch=2))
    images = torch.rand(3, 3, 56, 56)
    for wanted, got in zip(score(plain, images), score(parts, images), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(parts(images, PROMPTS), plain(images, PROMPTS), rtol=1e-4, atol=1e-5)


class Wide(Reward):
    """Keeps weak references to its activations."""

    def __init__(self, compute: Compute) -> None:
        super().__init__(name="wide", compute=compute)
        self.sizes: list[int] = []
        self.seen: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in self.seen))
        activation = images.exp()
        self.seen.append(weakref.ref(activation))
        self.sizes.append(len(images))
        return activation.square().mean(dim=(1, 2, 3)) * len(prompts[0])


def test_micro_batches_keep_the_activations_of_one_part() -> None:
    reward, images = Wide(Compute(micro_batch=2)), torch.rand(5, 3, 4, 4).requires_grad_()
    scores = reward(images, ["a"] * 5)
    gc.collect()
    assert reward.sizes == [2, 2, 1]
    assert reward.alive == [0, 0, 0]
    assert all(ref() is None for ref in reward.seen)
    (gradient,) = torch.autograd.grad((scores * scores.new_tensor([1, 2, 3, 4, 5])).sum(), images)
    wanted = 2 * (2 * images).exp() / 48 * torch.arange(1, 6).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, wanted.detach())


def test_a_reward_without_a_gradient_has_none_in_micro_batches_either() -> None:
    reward = Scripted(lambda images: images.detach().mean(dim=(1, 2, 3)))
    reward.compute = Compute(micro_batch=1)
    assert not reward(torch.rand(3, 3, 2, 2).requires_grad_(), PROMPTS).requires_grad


class Placed(Reward):
    """Claims to have its weights on another device, and records what gets there."""

    def __init__(self, moved: list[str]) -> None:
        super().__init__(name="placed")
        self.moved = moved

    def place(self) -> torch.device:
        return torch.device("meta")

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


def test_images_go_to_the_weights_and_scores_and_gradients_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is one device that computes here: what is held is who is moved where, and that the graph is whole.
    moves: list[str] = []
    really = Tensor.to

    def move(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], torch.device):
            moves.append(f"{'x'.join(map(str, tensor.shape))} to {args[0]}")
            return tensor * 1
        return really(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "to", move)
    images = torch.rand(2, 3, 4, 4).requires_grad_()
    scores = Placed(moves)(images, ["a", "b"])
    assert moves == ["2x3x4x4 to meta", "2 to cpu"]
    scores.sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 48))
    moves.clear()
    part = Placed(moves)
    CompositeReward([part, Scripted(lambda images: images.sum(dim=(1, 2, 3)))])(images, ["a", "b"])
    assert moves[:2] == ["2x3x4x4 to meta", "2 to cpu"]


class Weighted(Reward):
    def __init__(self, compute: Compute = Compute()) -> None:  # noqa: B008
        super().__init__(name="weighted", compute=compute)
        self.weight = nn.Parameter(torch.ones(3))
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.mean(dim=(2, 3)) * self.weight).sum(dim=1)


def test_a_device_of_its_own_outlasts_every_move() -> None:
    reward = Weighted(Compute(device="meta"))
    assert reward.place() == torch.device("meta")
    outer = nn.Sequential(reward, nn.Linear(2, 2))
    outer.to(torch.float64)
    assert reward.weight.dtype == torch.float64
    assert reward.weight.device.type == "meta"
    here = Weighted(Compute(device="cpu"))
    nn.Sequential(here, nn.Linear(2, 2)).to(torch.device("cpu"))
    assert here.weight.device.type == "cpu"
    follower = Weighted()
    nn.Sequential(follower).to("meta")
    assert follower.weight.device.type == "meta"
    # Values on their way to another device stop at the one that was asked for.
    moved: list[torch.device] = []
    here._apply(lambda tensor: moved.append(tensor.device) or tensor)
    assert moved == [torch.device("cpu")]
    assert here(torch.full((1, 3, 2, 2), 0.5), ["a"]).item() == pytest.approx(1.5)


def test_settings_are_checked_and_come_from_mappings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^compute\.dtype: expected one of float32, bfloat16, float64, got 'int8'$"):
        Compute(dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^compute\.micro_batch: expected at least 0, got -1$"):
        Compute(micro_batch=-1)
    with pytest.raises(ValueError, match=r"^compute\.device: expected a device of torch, got 'abacus' \("):
        Compute(device="abacus")
    with pytest.raises(ValueError, match=r"^compute\.checkpoint_activations: expected layers to recompute, got none"):
        Weighted(Compute(checkpoint_activations=True))
    clip(tmp_path)
    options = {"model_name": architecture(tmp_path), "pretrained": str(tmp_path / "clip.pt")}
    assert build("clip", **options, compute={"micro_batch": 2}).compute == Compute(micro_batch=2)
    with pytest.raises(ValueError, match=r"^compute: expected the fields of Compute, got an error \(.*'speed'"):
        build("clip", **options, compute={"speed": 2})


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.full((2, 3, 4, 4), 1.5), "1.5 to 1.5"),
        (torch.linspace(-1, 1, 96).view(2, 3, 4, 4), "-1 to 1"),
        (torch.full((2, 3, 4, 4), 255.0), "255 to 255"),
    ],
)
def test_images_out_of_range_are_refused(images: Tensor, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward weighted: expected images in \[0, 1\], got values from {got}$"):
        Weighted()(images, ["a", "b"])


def test_rounding_is_let_through() -> None:
    Weighted()(torch.tensor([-0.004, 1.0, 1.004]).view(1, 3, 1, 1), ["a"])
