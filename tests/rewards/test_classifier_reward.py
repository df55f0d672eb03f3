import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from toy_rewards import LinearClassifier

from rewards import ClassifierReward, probe_reward
from softgen.metrics import SmallClassifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"class_path": "toy_rewards.LinearClassifier", "init_args": {"num_classes": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(LinearClassifier(5).state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_the_score_is_the_log_probability_of_the_class() -> None:
    classifier = LinearClassifier(5)
    reward = ClassifierReward(classifier, class_names=["a", "b", "c", "d", "e"])
    images = torch.rand(3, 3, 4, 4)
    expected = F.log_softmax(classifier(images), dim=1)[torch.arange(3), torch.tensor([4, 0, 2])]
    torch.testing.assert_close(reward(images, torch.tensor([4, 0, 2])), expected)
    assert torch.equal(reward(images, ["e", "a", "2"]), reward(images, [4, 0, 2]))


def test_the_gradient_agrees_with_finite_differences_and_the_weights_are_frozen() -> None:
    reward = ClassifierReward(LinearClassifier(5)).double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reward(x, [1, 4]), images)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    probe_reward(reward.float(), image_size=4, conditions=[0, 4])


def test_low_precision_logits_are_normalised_in_float32() -> None:
    class Half(LinearClassifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).bfloat16()

    scores = ClassifierReward(Half(5))(torch.rand(2, 3, 4, 4), [0, 1])
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_method_logits_is_preferred_and_the_mode_is_eval() -> None:
    torch.manual_seed(0)
    classifier = SmallClassifier(name="net", image_size=8, num_classes=4, width=4).train()
    reward = ClassifierReward(classifier)
    reward.train()
    assert not any(module.training for module in reward.modules())
    images = torch.rand(2, 3, 8, 8)
    expected = F.log_softmax(classifier.eval().logits(images), dim=1)[:, 3]
    torch.testing.assert_close(reward(images, [3, 3]), expected)


def test_a_saved_classifier_is_opened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = SmallClassifier(name="net", image_size=8, num_classes=4, width=4).eval()
    classifier.save(tmp_path / "net")
    images = torch.rand(2, 3, 8, 8)
    expected = ClassifierReward(classifier)(images, [0, 3])
    assert torch.equal(ClassifierReward(tmp_path / "net")(images, [0, 3]), expected)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3, 5), "expected logits of shape (2, C), got (3, 5)"),
        (torch.zeros(2), "expected logits of shape (2, C), got (2,)"),
        (SimpleNamespace(), "expected logits of shape (2, C), got a SimpleNamespace"),
        (torch.zeros(2, 4), "expected 4 class_names, one a logit, got 3"),
    ],
)
def test_wrong_logits_are_named(output: object, message: str) -> None:
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> object:
            return output

    reward = ClassifierReward(Odd(), class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=f"^{re.escape(f'reward classifier: {message}')}$"):
        reward(torch.rand(2, 3, 4, 4), [0, 1])


def test_a_label_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"^reward classifier: expected labels in \[0, 4\], got 5$"):
        ClassifierReward(LinearClassifier(5))(torch.rand(2, 3, 4, 4), ["0", "5"])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = f"classifier: expected a folder with config.json and model.safetensors, got '{tmp_path / 'none'}'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ClassifierReward(tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "expected a readable .*config.json, got an error"),
        ("{}", "expected .*config.json to name a class_path, got none"),
        ('{"class_path": "toy_rewards.Nobody"}', "expected an importable class_path, got 'toy_rewards.Nobody'"),
        ('{"class_path": "nobody"}', "expected an importable class_path, got 'nobody'"),
        ('{"class_path": "json.dumps"}', "expected the class_path of an nn.Module, got 'json.dumps'"),
        (
            '{"class_path": "rewards.Isolated", "init_args": {"reward": "os.getpid"}}',
            "expected the class_path of an nn.Module that is no reward, got 'rewards.Isolated'",
        ),
        (
            '{"class_path": "toy_rewards.LinearClassifier", "init_args": {"depth": 1}}',
            "expected the arguments of LinearClassifier, got an error .*depth",
        ),
        (
            '{"class_path": "toy_rewards.LinearClassifier", "init_args": {"num_classes": 6}}',
            "expected the weights of a LinearClassifier in .*, got others .*size mismatch for head.weight",
        ),
    ],
)
def test_a_foreign_folder_is_named(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=f"^classifier: {message}") as caught:
        ClassifierReward(folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"^classifier: expected whole weights in .*model.safetensors, got an error"):
        ClassifierReward(folder)


def test_nested_modules_are_built(tmp_path: Path) -> None:
    inner = {"class_path": "toy_rewards.LinearClassifier", "init_args": {"num_classes": 3}}
    (tmp_path / "config.json").write_text(
        json.dumps({"class_path": "test_classifier_reward.Wrapper", "init_args": {"inner": inner}})
    )
    wrapper = Wrapper(LinearClassifier(3))
    save_file(wrapper.state_dict(), tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(ClassifierReward(tmp_path)(images, [0, 2]), ClassifierReward(wrapper)(images, [0, 2]))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images) * 2


def test_a_classifier_is_a_module() -> None:
    with pytest.raises(ValueError, match=r"^reward classifier: expected a module or the folder of one .* a function$"):
        ClassifierReward(lambda images: images.mean(dim=(2, 3)))
