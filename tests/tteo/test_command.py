"""`python -m tteo` from a saved generator to its files."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rewards import Reward
from softgen.metrics import SmallClassifier
from softgen.models import MaskedTransformer, OneStepGenerator, WordTextEncoder
from softgen.tokenizers import ConvVQTokenizer
from tteo.__main__ import main


class Brightness(Reward):
    """The mean of the pixels."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    torch.manual_seed(0)
    model = MaskedTransformer(num_codes=7, num_sites=16, num_classes=10, width=16, depth=1, heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    OneStepGenerator(model).save_pretrained(tmp_path / "student", tokenizer=tokenizer)
    SmallClassifier(name="net", image_size=8, num_classes=10, width=4).save(tmp_path / "net")
    return str(tmp_path / "student"), str(tmp_path / "net")


def test_writes_images_scores_and_pictures(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, net = folders
    words = [f"--generator={student}", "--label=[3,5]", "--reward=rewards.ClassifierReward", "--device=cpu"]
    options = [
        "--settings.steps=4",
        "--settings.candidates=2",
        "--settings.keep_every=2",
        "--settings.lr=5",
        f"--out={tmp_path / 'out'}",
    ]
    main([*words, f"--reward.classifier={net}", *options])
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert len(scores["after"]) == 4
    assert all(after >= before for before, after in zip(scores["before"], scores["after"], strict=True))
    assert len(scores["soft"]) == 4
    assert len(scores["hard"]) == 5
    assert len(list((tmp_path / "out/images").glob("*.png"))) == 4
    assert (tmp_path / "out/before_after.png").is_file()
    assert (tmp_path / "out/curve.png").is_file()
    assert (tmp_path / "out/trajectory.png").is_file()
    kept = load_file(tmp_path / "out/result.safetensors")
    assert {name: value.shape for name, value in kept.items()} == {
        "tokens": (4, 16),
        "start_tokens": (4, 16),
        "embeddings": (4, 16, 16),
    }
    assert "mean score" in capsys.readouterr().out
    fewer = [word.replace("[3,5]", "3") for word in words]
    main([*fewer, f"--reward.classifier={net}", "--settings.steps=1", f"--out={tmp_path / 'out'}"])
    assert [path.name for path in (tmp_path / "out/images").iterdir()] == ["00000.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "before_after.png",
        "curve.png",
        "images",
        "result.safetensors",
        "scores.json",
    ]


def test_bad_input_is_one_line(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    student, net = folders
    words = [f"--generator={student}", "--reward=rewards.ClassifierReward", f"--reward.classifier={net}"]
    for extra, message in (
        ("--label=[11]", "labels: expected classes in 0..9, got 11"),
        ("--label=11", "labels: expected classes in 0..9, got 11"),
        ("--label=[]", "labels: expected at least one class, got none"),
        ("--seed=1", "conditions: expected at least one label or prompt, got none"),
        ("--prompt=three", "prompts: expected labels, since this model is class-conditional, got prompts"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, extra, "--device=cpu"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_an_unknown_reward_is_answered_by_the_known_ones(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"--generator={folders[0]}", "--label=3", "--reward=nonsense", "--device=cpu"])
    assert stop.value.code == 2
    message = "reward: expected one of aesthetic, classifier, clip, hpsv2, hpsv3, imagereward, pickscore, or the dotted"
    assert message in capsys.readouterr().err


def test_prompts_of_a_text_conditional_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = WordTextEncoder(vocabulary=["a", "red", "circle"], num_words=8, width=8, heads=2)
    model = MaskedTransformer(num_codes=7, num_sites=16, width=16, depth=1, heads=2, text_encoder=encoder)
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    OneStepGenerator(model).save_pretrained(tmp_path / "student", tokenizer=tokenizer)
    (tmp_path / "prompts.txt").write_text("a red circle\n\na circle\n")
    words = [f"--generator={tmp_path}/student", "--reward=test_command.Brightness", "--device=cpu"]
    for given, count in (("--prompt=a red circle", 1), (f"--prompt_file={tmp_path}/prompts.txt", 2)):
        main([*words, given, "--settings.steps=1", f"--out={tmp_path / str(count)}"])
        assert len(json.loads((tmp_path / str(count) / "scores.json").read_text())["after"]) == count
    with pytest.raises(SystemExit):
        main([*words, "--label=3"])
    assert "labels: expected prompts, since this model is text-conditional, got labels" in capsys.readouterr().err
