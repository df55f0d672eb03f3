"""PickScore, HPSv2, HPSv3, ImageReward, the aesthetic predictor: on tiny random checkpoints."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import AGAIN, BUILDERS, architecture, hpsv3, imagereward, pickscore

from rewards import Compute, HPSv2Reward, HPSv3Reward, ImageRewardReward, PickScoreReward, Reward, probe_reward
from rewards.qwen_images import fitted_size, patch_rows

EACH = pytest.mark.parametrize("name", sorted(BUILDERS))
PROMPTS = ["a red cat", "photo of two blue dog"]
Builder = Callable[..., Reward]


def build(name: str, folder: Path, **options: Any) -> Reward:
    torch.manual_seed(2)
    builder: Builder = BUILDERS[name]
    return builder(folder, **options)


@EACH
def test_scores_and_gradients(name: str, tmp_path: Path) -> None:
    reward = build(name, tmp_path)
    assert reward.name == name
    probe_reward(reward, image_size=(40, 32), conditions=PROMPTS)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not reward.train().training
    images = torch.rand(2, 3, 40, 32)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(reward(images, PROMPTS), scores, rtol=0, atol=0)
    # One image's score does not depend on the others of its batch.
    torch.testing.assert_close(reward(images[1:], PROMPTS[1:]), scores[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"aesthetic"}))
def test_the_prompt_counts(name: str, tmp_path: Path) -> None:
    reward = build(name, tmp_path)
    images = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    one, other = reward(images, PROMPTS)
    assert abs(float(one - other)) > 1e-7


def test_hpsv3_against_finite_differences(tmp_path: Path) -> None:
    reward = build("hpsv3", tmp_path, compute=Compute(dtype="float64"))
    images = torch.rand(1, 3, 56, 56, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:1]).sum(), images)
    # transformers computes norms and rotations in float32 whatever the weights: one pixel's difference drowns in its
    # rounding, so that all pixels go together, along the signs of the gradient.
    direction, step = gradient.sign(), 5e-4
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:1]) for sign in (1, -1))
    slope = float((ahead - behind) / (2 * step))
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    reward, slim = build("hpsv3", tmp_path), build("hpsv3", tmp_path, compute=Compute(checkpoint_activations=True))
    images = torch.rand(2, 3, 56, 56)
    gradients = []
    for each in (reward, slim):
        leaf = images.clone().requires_grad_()
        each(leaf, PROMPTS).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert not any(module.training for module in slim.modules())


def test_a_bfloat16_backbone_keeps_its_head_in_float32(tmp_path: Path) -> None:
    reward, half = build("hpsv3", tmp_path), build("hpsv3", tmp_path, compute=Compute(dtype="bfloat16"))
    images = torch.rand(2, 3, 56, 56)
    scores = half(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(images, PROMPTS), rtol=0.05, atol=0.05)


def test_hpsv3_asks_as_officially(tmp_path: Path) -> None:
    reward = hpsv3(tmp_path)
    ids, mask = reward.tokens(["a red cat", "a"], image_tokens=4)
    assert (ids == reward.reward_token_id).sum(dim=1).tolist() == [1, 1]
    assert (ids == 5).sum(dim=1).tolist() == [4, 4]
    lengths = mask.sum(dim=1).tolist()
    assert lengths[0] - lengths[1] == 2
    assert mask[1].tolist() == [1] * lengths[1] + [0] * 2


def test_a_text_without_its_reward_token_is_refused(tmp_path: Path) -> None:
    reward = BUILDERS["hpsv3"](tmp_path)
    assert isinstance(reward, HPSv3Reward)
    reward.reward_token_id = -5
    with pytest.raises(
        ValueError, match=r"^reward hpsv3: expected one token -5 \(reward_token_id\) a text, got another"
    ):
        reward(torch.rand(1, 3, 56, 56), ["a red cat"])


def test_long_prompts_are_cut_with_a_warning(tmp_path: Path) -> None:
    long = " ".join(["cat"] * 60)
    images = torch.rand(2, 3, 32, 32)
    for builder, length in ((imagereward, 35), (pickscore, 12)):
        folder = tmp_path / builder.__name__
        folder.mkdir()
        reward = builder(folder)
        with pytest.warns(UserWarning, match=rf"cut 1 of 2 prompts to {length} tokens"):
            cut = reward(images, ["a", long])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.isfinite(reward(images, ["a", "red"])).all()
        assert torch.isfinite(cut).all()


@pytest.mark.parametrize("size", [(100, 132), (28, 28), (500, 60), (56, 56)])
def test_qwen_sizes(size: tuple[int, int]) -> None:
    height, width = fitted_size(*size, least=12544, most=12544)
    assert height % 28 == width % 28 == 0
    assert 0.5 * 12544 <= height * width <= 2 * 12544
    rows, grids = patch_rows(torch.rand(2, 3, *size), least=12544, most=12544)
    assert rows.shape == (2 * height * width // 196, 1176)
    assert grids.tolist() == [[1, height // 14, width // 14]] * 2


@EACH
def test_wrong_checkpoints_are_one_line(name: str, tmp_path: Path) -> None:
    reward = build(name, tmp_path)
    cls: Any = type(reward)
    with pytest.raises(ValueError, match=r"expected") as caught:
        cls(str(tmp_path / "nowhere" / "file.pt"))
    assert "\n" not in str(caught.value)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"expected") as caught:
        cls(str(tmp_path / "broken.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_no_clip_is_built_for_a_file_that_is_no_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("open_clip.create_model", create_model)
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"^pretrained: expected a whole file of weights, got .*{name}$"):
        HPSv2Reward(str(tmp_path / name))


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    build("hpsv3", tmp_path)
    state = load_file(tmp_path / "HPSv3.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "HPSv3.safetensors")
    from tiny_checkpoints import QWEN

    with pytest.raises(ValueError, match=r"^checkpoint: expected .* got 'language_model.norm.weight' missing$"):
        HPSv3Reward(tmp_path, config={**QWEN, "image_token_id": 5})
    with pytest.raises(ValueError, match=r"^checkpoint: expected one of ImageReward with 'blip.visual_encoder"):
        ImageRewardReward(tmp_path / "HPSv3.safetensors")


def test_a_clip_with_missing_weights_is_refused(tmp_path: Path) -> None:
    build("pickscore", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected to open .* \(1 missing, first 'visual_projection.weight'\)$"):
        PickScoreReward(str(tmp_path))


@pytest.mark.parametrize(("name", "file"), [("hpsv2", "HPS_v2.1_compressed.pt"), ("imagereward", "ImageReward.pt")])
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(name: str, file: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    content = torch.load(tmp_path / file, weights_only=True)
    state = content.get("state_dict", content)
    lost = next(key for key in state if key.endswith("bias") and ("resblocks" in key or "text_encoder" in key))
    del state[lost]
    torch.save(content, tmp_path / file)
    with pytest.raises(ValueError, match=r"expected") as caught:
        AGAIN[name](tmp_path, Compute())
    assert lost.removeprefix("blip.text_encoder.") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "got"), [("{", "an error"), ("[]", "a list")])
def test_broken_settings_beside_imagereward_are_named(content: str, got: str, tmp_path: Path) -> None:
    build("imagereward", tmp_path)
    settings = tmp_path / "med_config.json"
    settings.write_text(content)
    with pytest.raises(ValueError, match=rf"^checkpoint: expected .* in {re.escape(str(settings))}, got {got}"):
        ImageRewardReward(tmp_path / "ImageReward.pt")


def test_the_hub_id_of_hpsv2_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build("hpsv2", tmp_path)
    asked: list[object] = []

    def download(source: str, *, allow_patterns: list[str]) -> str:
        asked.append((source, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    reward = HPSv2Reward(model_name=architecture(tmp_path))
    assert asked == [("xswu/HPSv2", ["HPS_v2.1_compressed.pt", "*.json"])]
    assert reward.preprocessing.resize_mode == "longest"
    assert not reward.preprocessing.clip
