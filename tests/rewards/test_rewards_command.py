import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from toy_rewards import Brightness, LinearClassifier

from rewards import ClassifierReward, CLIPReward
from rewards.__main__ import main

ROOT = Path(__file__).parents[2]

Scores = Callable[..., list[tuple[float, str]]]
Fails = Callable[..., str]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """An RGB png of 4x4, a grey one and a palette gif of other sizes."""
    generator = np.random.default_rng(0)
    paths = [str(tmp_path / name) for name in ("rgb.png", "grey.png", "palette.gif")]
    Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(paths[0])
    Image.fromarray(generator.integers(0, 256, (6, 9), dtype=np.uint8)).save(paths[1])
    Image.fromarray(generator.integers(0, 256, (50, 40), dtype=np.uint8)).convert("P").save(paths[2])
    return paths


@pytest.fixture
def scores(capsys: pytest.CaptureFixture[str]) -> Scores:
    def run(*words: str) -> list[tuple[float, str]]:
        capsys.readouterr()
        main(["score", *words, "--tsv"])
        _, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        return [(float(score), path) for score, path, _ in rows]

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1
        return lines[0].partition(": error: ")[2]

    return run


def test_list_is_light_and_prints_name_and_origin() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = "import sys; from rewards.__main__ import main; main(['list']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    *table, imported = done.stdout.splitlines()
    assert table[0].split() == ["name", "range", "checkpoint", "memory", "licence", "source"]
    assert [line.split()[0] for line in table[1:]] == [
        "aesthetic",
        "classifier",
        "clip",
        "hpsv2",
        "hpsv3",
        "imagereward",
        "pickscore",
    ]
    assert len({line.index("built in, rewards.") for line in table[1:]}) == 1
    assert "THUDM/ImageReward" in table[6]
    assert imported == "False"


def test_images_of_any_size_and_mode_are_scored(images: list[str], scores: Scores) -> None:
    expected = [np.asarray(Image.open(path).convert("RGB")).mean() / 255 for path in images]
    got = scores(*images, "--reward", "toy_rewards.Brightness", "--prompt", "a")
    assert [path for _, path in got] == images
    assert [score for score, _ in got] == pytest.approx(expected, abs=1e-6)
    assert Brightness.name == "brightness"


def test_a_turned_photo_is_scored_upright(tmp_path: Path, scores: Scores) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels[::-1].copy()).save(tmp_path / "upright.png")
    classifier = LinearClassifier(5)
    (tmp_path / "net").mkdir()
    config = {"class_path": "toy_rewards.LinearClassifier", "init_args": {"num_classes": 5}}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    save_file(classifier.state_dict(), tmp_path / "net" / "model.safetensors")
    files = [str(tmp_path / "turned.png"), str(tmp_path / "upright.png")]
    options = ["--reward", "classifier", "--options", f"classifier={tmp_path / 'net'}"]
    turned, upright = scores(*files, *options, "--label", "3")
    upside_up = torch.zeros(1, 3, 4, 4)
    upside_up[:, :, 2:] = 1
    assert turned[0] == upright[0] == pytest.approx(float(ClassifierReward(classifier)(upside_up, [3])), abs=1e-5)


def test_a_prompt_for_each_image_and_options_from_a_file(
    images: list[str], scores: Scores, tiny_clip: str, clip_weights: Path, tmp_path: Path
) -> None:
    options = {"model_name": tiny_clip, "pretrained": str(clip_weights), "scale": 100}
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(options))
    prompts = ["--prompt", "a", "--prompt", "b", "--prompt", "c"]
    given = ["--options", str(tmp_path / "clip.yaml"), "scale=10", "--paired"]
    got = scores(*images, "--reward", "clip", *prompts, *given)
    reward = CLIPReward(tiny_clip, pretrained=clip_weights, scale=10)
    for (score, path), prompt in zip(got, "abc", strict=True):
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
        assert score == pytest.approx(float(reward(pixels[None], [prompt])), abs=1e-5)


def test_a_table_of_images_prompts_and_rewards(
    images: list[str], tiny_clip: str, clip_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model_name": tiny_clip, "pretrained": str(clip_weights)}
    (tmp_path / "rewards.yaml").write_text(
        yaml.safe_dump({"clip": {**options, "scale": 100}, "toy_rewards.Brightness": None})
    )
    words = [*images, "--prompt", "a cat", "--prompt", "a red dog", "--reward", str(tmp_path / "rewards.yaml")]
    given = [f"model_name={tiny_clip}", f"pretrained={clip_weights}"]
    main(["score", *words, "--reward", "clip", "--options", *given, "name=cosine", "--tsv"])
    head, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head == ["clip", "brightness", "cosine", "image", "prompt"]
    assert [row[3:] for row in rows] == [[path, prompt] for path in images for prompt in ("a cat", "a red dog")]
    reward = CLIPReward(tiny_clip, pretrained=clip_weights)
    for scaled, bright, cosine, path, prompt in rows:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
        assert float(cosine) == pytest.approx(float(reward(pixels[None], [prompt])), abs=1e-5)
        assert float(scaled) == pytest.approx(100 * float(cosine), abs=1e-3)
        assert float(bright) == pytest.approx(float(pixels.mean()), abs=1e-5)
    # Without --tsv the same in columns, and options before the first reward are for all.
    main(["score", *words[:5], "--options", *given, "--reward", "clip"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert len({line.index(path) for line, path in zip(lines, ["image", *images], strict=True)}) == 1


def test_a_warning_is_one_line(
    images: list[str], tiny_clip: str, clip_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--options", f"model_name={tiny_clip}", f"pretrained={clip_weights}"]
    main(["score", images[0], "--reward", "clip", "--prompt", "word " * 20, *options])
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["python -m rewards: warning: reward clip: cut 1 of 1 prompts to 12 tokens"]


def test_mistakes_are_one_line(images: list[str], fails: Fails, tmp_path: Path) -> None:
    score = ("score", images[0], "--reward")
    known = (
        "reward: expected one of aesthetic, classifier, clip, hpsv2, hpsv3, imagereward, pickscore, or the dotted path "
        "of a class, got 'clap'"
    )
    assert fails(*score, "clap", "--prompt", "a") == known
    assert fails(*score, "toy_rewards.Brightness") == "the following arguments are required: --prompt/--label"
    assert fails() == "the following arguments are required: {list,score,env}"
    missing = str(tmp_path / "none.png")
    brightness = ("--reward", "toy_rewards.Brightness", "--prompt", "a")
    assert fails("score", missing, *brightness) == f"images: expected files, got {missing}"
    two = "--paired: expected a prompt for each of the 3 images, got 2"
    assert fails("score", *images, *brightness, "--prompt", "b", "--paired") == two
    twice = "--reward: expected names that are unique, got 'brightness' twice (see the option name)"
    assert fails("score", images[0], *brightness, "--reward", "toy_rewards.Brightness") == twice
    # Every reward's arguments are looked at before any reward is opened.
    second = "reward clip: expected its own arguments, got an error (got an unexpected keyword argument 'size')"
    assert fails("score", images[0], *brightness, "--reward", "clip", "--options", "size=3") == second
    (tmp_path / "wrong.yaml").write_text("clip: ViT-B-32")
    inner = f"argument --reward: expected '{tmp_path / 'wrong.yaml'}' to map names to options, got a str for 'clip'"
    assert fails("score", images[0], "--prompt", "a", "--reward", str(tmp_path / "wrong.yaml")) == inner
    unread = f"argument --reward: expected key=value or a YAML file, got '{tmp_path / 'none.yaml'}'"
    assert fails("score", images[0], "--prompt", "a", "--reward", str(tmp_path / "none.yaml")).startswith(unread)
    (tmp_path / "text.png").write_text("no image")
    broken = f"images: expected an image, got '{tmp_path / 'text.png'}', which cannot be read"
    assert fails("score", str(tmp_path / "text.png"), *brightness).startswith(broken)
    device = "--device: expected a device of torch that is present, got 'abacus' ("
    assert fails("score", images[0], *brightness, "--device", "abacus").startswith(device)
    if not torch.cuda.is_available():
        assert fails("score", images[0], *brightness, "--device", "cuda").startswith(device.replace("abacus", "cuda"))
    option = "argument --options: expected key=value or a YAML file, got 'scale'"
    assert fails("score", images[0], *brightness, "--options", "scale").startswith(option)
    (tmp_path / "list.yaml").write_text("[1]")
    mapping = f"argument --options: expected '{tmp_path / 'list.yaml'}' to map keys to values, got a list"
    assert fails("score", images[0], *brightness, "--options", str(tmp_path / "list.yaml")) == mapping
    arguments = "reward toy_rewards.Brightness: expected its own arguments, got an error"
    assert fails("score", images[0], *brightness, "--options", "gain=1").startswith(arguments)
    assert fails(*score, "classifier", "--prompt", "a").startswith("reward classifier: expected its own arguments")
    unfit = "reward broken: expected to score images of 4x4, got an error (mat1 and mat2 shapes cannot be multiplied"
    assert fails(*score, "toy_rewards.Broken", "--prompt", "a").startswith(unfit)
