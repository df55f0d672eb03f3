import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import CLIPReward, probe_reward

open_clip = pytest.importorskip("open_clip")

PROMPTS = ["a red shoe", "a green coat", "a red shoe"]
LONG = "a very long prompt of many words that says a lot about one small shoe"
IMAGES = torch.rand(3, 3, 40, 50, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reward(tiny_clip: str, clip_weights: Path) -> CLIPReward:
    return CLIPReward(tiny_clip, pretrained=clip_weights)


def direct(name: str, weights: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosines by open_clip itself: its PIL transform, tokenizer and towers."""
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        image_features = model.eval().encode_image(pixels, normalize=True)
        text_features = model.encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
    return (image_features @ text_features.T).diagonal()


def test_the_score_is_open_clips_cosine(reward: CLIPReward, tiny_clip: str, clip_weights: Path) -> None:
    images = (IMAGES * 255).round() / 255
    scores = reward(images, PROMPTS)
    expected = direct(tiny_clip, clip_weights, images, PROMPTS)
    assert expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)  # PIL's 8 bits; nothing else differs
    exact = (IMAGES[:, :, :32, :32] * 255).round() / 255
    torch.testing.assert_close(
        reward(exact, PROMPTS), direct(tiny_clip, clip_weights, exact, PROMPTS), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("scale", "factor"), [(100.0, 100.0), ("model", 7.389056)])
def test_the_scale_multiplies_the_cosine(
    scale: float | str, factor: float, reward: CLIPReward, tiny_clip: str, clip_weights: Path
) -> None:
    scaled = CLIPReward(tiny_clip, pretrained=clip_weights, scale=scale)
    torch.testing.assert_close(scaled(IMAGES, PROMPTS), reward(IMAGES, PROMPTS) * factor)


def test_the_gradient_agrees_with_finite_differences(reward: CLIPReward) -> None:
    double = copy.deepcopy(reward).double()
    images = (0.3 + 0.4 * torch.rand(2, 3, 12, 15, dtype=torch.float64)).requires_grad_()
    direction = torch.randn_like(images)
    scores = double(images, PROMPTS[:2])
    assert scores.dtype == torch.float64
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    step = 1e-5
    with torch.no_grad():
        sides = [double(images + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1)]
    torch.testing.assert_close((gradient * direction).sum(), (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=0)
    assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_the_reward_is_frozen_and_passes_the_probe(reward: CLIPReward) -> None:
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.train().modules())
    probe_reward(reward, image_size=28, conditions=PROMPTS)


def test_labels_are_read_as_prompts(tiny_clip: str, clip_weights: Path, reward: CLIPReward) -> None:
    by_label = CLIPReward(tiny_clip, pretrained=clip_weights, class_names=["a green coat", "a red shoe"])
    assert torch.equal(by_label(IMAGES, torch.tensor([1, 0, 1])), reward(IMAGES, PROMPTS))


def test_each_prompt_is_encoded_once(tiny_clip: str, clip_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = CLIPReward(tiny_clip, pretrained=clip_weights)
    encoded: list[int] = []
    encode = reward.model.encode_text
    monkeypatch.setattr(reward.model, "encode_text", lambda tokens: (encoded.append(len(tokens)), encode(tokens))[1])
    first = reward(IMAGES, PROMPTS)
    assert torch.equal(reward(IMAGES, PROMPTS), first)
    reward(IMAGES, ["a hat", *PROMPTS[:2]])
    assert encoded == [2, 1]
    reward.prompt_features.capacity = 1
    reward(IMAGES, PROMPTS)
    # A prompt that is encoded alone, not beside another, may round otherwise.
    torch.testing.assert_close(reward(IMAGES, PROMPTS), first, rtol=1e-5, atol=1e-6)
    assert encoded == [2, 1, 1]  # "a green coat" was the one that went
    reward.prompt_features.capacity = 9
    reward.load_state_dict({name: value + 0.01 for name, value in reward.state_dict().items()})
    assert not torch.allclose(reward(IMAGES, PROMPTS), first)
    reward.double()(IMAGES.double(), PROMPTS)
    assert encoded == [2, 1, 1, 2, 2]


def test_prompts_encoded_in_inference_or_low_precision_serve_later_calls(
    tiny_clip: str, clip_weights: Path, reward: CLIPReward
) -> None:
    other = CLIPReward(tiny_clip, pretrained=clip_weights)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        other(IMAGES, PROMPTS)
    images = IMAGES.clone().requires_grad_()
    scores = other(images, PROMPTS)
    scores.sum().backward()
    torch.testing.assert_close(scores, reward(IMAGES, PROMPTS))


def test_low_precision_weights_give_float32_scores(tiny_clip: str, clip_weights: Path, reward: CLIPReward) -> None:
    scores = CLIPReward(tiny_clip, pretrained=clip_weights).bfloat16()(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(IMAGES, PROMPTS), atol=0.05, rtol=0)


def test_long_prompts_are_cut_with_a_warning_that_counts_them(reward: CLIPReward) -> None:
    fits = "a b c d e f g h i j"  # 10 tokens and 2 special ones
    message = re.escape("reward clip: cut 2 of 3 prompts to 12 tokens")
    with pytest.warns(UserWarning, match=f"^{message}$"):
        scores = reward(IMAGES[[0, 0, 0]], [LONG, f"{fits} k", fits])
    assert torch.equal(scores[1], scores[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once a prompt
        reward(IMAGES[:2], [LONG, fits])


@pytest.mark.parametrize("prompts", [["", "a", "b"], ["a", " \n", "b"]])
def test_empty_prompts_are_refused(prompts: list[str], reward: CLIPReward) -> None:
    message = "reward clip: expected prompts that are not empty, got 1 empty of 3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        reward(IMAGES, prompts)


def test_a_folder_of_weights_and_a_local_model_are_opened(
    tiny_clip: str, clip_weights: Path, reward: CLIPReward, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    expected = reward(IMAGES, PROMPTS)
    save_file(torch.load(clip_weights, weights_only=True), tmp_path / "model.safetensors")
    (tmp_path / "other.bin").write_bytes(b"")  # safetensors go first
    assert torch.equal(CLIPReward(tiny_clip, pretrained=tmp_path)(IMAGES, PROMPTS), expected)
    config = {"model_cfg": open_clip.get_model_config(tiny_clip), "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    local = CLIPReward(f"local-dir:{tmp_path}")
    assert local.preprocessing.resize_mode == "squash"
    torch.testing.assert_close(local(IMAGES[:, :, :32, :32], PROMPTS), reward(IMAGES[:, :, :32, :32], PROMPTS))
    config["preprocess_cfg"] = {"resize_mode": "longest"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"^model_name: expected a model that resizes by 'shortest' or 'squash', got 'l"
    ):
        CLIPReward(f"local-dir:{tmp_path}")


def test_a_local_model_without_weights_is_refused(tiny_clip: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": open_clip.get_model_config(tiny_clip)}))
    with pytest.raises(ValueError, match=r"^reward clip: expected to open 'local-dir:.*could not be loaded"):
        CLIPReward(f"local-dir:{tmp_path}")
    with pytest.raises(
        ValueError, match=r"^pretrained: expected none beside 'local-dir:.*', which brings its weights, got 'random'$"
    ):
        CLIPReward(f"local-dir:{tmp_path}", pretrained="random")


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tiny_clip: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "owned")}, tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"^reward clip: expected to open 'tiny-clip' from '.*weights.pt', got an error"
    ):
        CLIPReward(tiny_clip, pretrained=tmp_path / "weights.pt")
    assert not (tmp_path / "owned").exists()


def test_weights_of_another_model_are_refused_in_one_line(tiny_clip: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"^reward clip: expected to open .*Missing key\(s\) in state_dict") as caught:
        CLIPReward(tiny_clip, pretrained=tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)


def test_unknown_models_and_weights_list_what_there_is(tiny_clip: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^model_name: expected an architecture of open_clip, such as ViT-B-32.*, got"
    ):
        CLIPReward("ViT-B-23")
    choices = "expected a file, a folder, 'random' or one of the tags of ViT-B-32 \\(openai, .*laion2b_s34b_b79k.*\\)"
    with pytest.raises(ValueError, match=f"^pretrained: {choices}, got none$"):
        CLIPReward("ViT-B/32")
    with pytest.raises(ValueError, match=f"^pretrained: {choices}, got 'laion'$"):
        CLIPReward("ViT-B-32", pretrained="laion")
    with pytest.raises(ValueError, match=r"^pretrained: expected one file of \.safetensors, .*, got none$"):
        CLIPReward(tiny_clip, pretrained=tmp_path)


def test_a_tag_brings_its_activation(tiny_clip: str, clip_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No download: the registry of tags is told of a local file.
    from open_clip import factory

    cfg = {"quick_gelu": True}
    for module in (open_clip, factory):
        monkeypatch.setattr(module, "get_pretrained_cfg", lambda name, tag: cfg if tag == "mine" else {})
    monkeypatch.setattr(open_clip, "is_pretrained_cfg", lambda name, tag: tag == "mine")
    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, cache_dir: str(clip_weights))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward = CLIPReward(tiny_clip, pretrained="mine")
    expected = CLIPReward(tiny_clip, pretrained=clip_weights, quick_gelu=True)
    assert torch.equal(reward(IMAGES, PROMPTS), expected(IMAGES, PROMPTS))
    assert not torch.equal(reward(IMAGES, PROMPTS), CLIPReward(tiny_clip, pretrained=clip_weights)(IMAGES, PROMPTS))


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), "big"])
def test_a_wrong_scale_is_refused_before_anything_is_loaded(scale: object) -> None:
    with pytest.raises(ValueError, match=f"^scale: expected a finite number above 0 or 'model', got {scale!r}$"):
        CLIPReward("nowhere", scale=scale)


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"^reward clip: .* pip install 'softgen\[clip\]'$"):
        CLIPReward("ViT-B-32", pretrained="openai")


def test_a_model_that_needs_transformers_names_the_command(
    tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_clip.get_model_config(tiny_clip)
    config["text_cfg"]["hf_tokenizer_name"] = "somebody/tokenizer"
    (tmp_path / "tiny-hf.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = "reward clip: expected transformers, which 'tiny-hf' needs: pip install transformers"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        CLIPReward("tiny-hf", pretrained="random")


def test_open_clip_is_imported_late() -> None:
    code = "import sys, rewards; rewards.CLIPReward; print('open_clip' in sys.modules, 'torchvision' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
