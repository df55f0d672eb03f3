"""The recipes of configs/tteo as they are shipped, and run for two steps on tiny checkpoints."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
pytest.importorskip("transformers")

import open_clip
from tiny_checkpoints import architecture, hpsv2, imagereward, pickscore

from softgen.cli import command_parser
from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.tokenizers import ConvVQTokenizer
from tteo.__main__ import main, tteo

FOLDER = Path(__file__).parents[2] / "configs" / "tteo"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EACH = pytest.mark.parametrize("name", NAMES)
PUBLISHED = {
    "reno": {
        "weights": {"hpsv2": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05},
        "settings": {
            "optimizer": "sgd",
            "lr": 5.0,
            "momentum": 0.9,
            "nesterov": True,
            "clip": 0.1,
            "noise_norm": 0.01,
            "steps": 49,
        },
    },
    "soft_dimo": {"settings": {"optimizer": "sgd", "lr": 0.2}},
}


def test_there_are_recipes() -> None:
    assert sorted(PUBLISHED) == NAMES


@EACH
def test_the_recipe_parses_and_has_the_published_numbers(name: str) -> None:
    words = [f"--config={FOLDER / name}.yaml", "--generator=somewhere", "--label=[1, 2]"]
    parsed = command_parser(tteo, program="tteo").parse_args(words)
    parts = parsed.reward.init_args
    assert set(parts.rewards) == set(parts.weights) == {"clip", "hpsv2", "imagereward", "pickscore"}
    assert dict(parts.weights) == PUBLISHED[name].get("weights", dict(parts.weights))
    settings = parsed.settings.as_dict()
    assert {key: settings[key] for key in PUBLISHED[name]["settings"]} == PUBLISHED[name]["settings"]
    assert name != "reno" or parts.rewards["clip"].init_args.scale == 100


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Arguments that open a tiny checkpoint of each reward."""
    for each in ("hpsv2", "imagereward", "pickscore"):
        (tmp_path / each).mkdir()
    torch.manual_seed(0)
    hpsv2(tmp_path / "hpsv2")
    imagereward(tmp_path / "imagereward")
    pickscore(tmp_path / "pickscore")
    torch.save(open_clip.create_model(architecture(tmp_path)).state_dict(), tmp_path / "clip.pt")
    return {
        "clip": {"model_name": architecture(tmp_path), "pretrained": str(tmp_path / "clip.pt")},
        "hpsv2": {"checkpoint": str(tmp_path / "hpsv2"), "model_name": architecture(tmp_path)},
        "imagereward": {
            "checkpoint": str(tmp_path / "imagereward"),
            "tokenizer": str(tmp_path / "imagereward"),
            "vision_heads": 2,
        },
        "pickscore": {"checkpoint": str(tmp_path / "pickscore")},
    }


@EACH
def test_the_recipe_runs(name: str, tiny: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    model = MaskedTransformer(num_codes=7, num_sites=16, num_classes=4, width=16, depth=1, heads=2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    OneStepGenerator(model).save_pretrained(tmp_path / "student", tokenizer=tokenizer)
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    for part, options in tiny.items():
        recipe["reward"]["init_args"]["rewards"][part]["init_args"].update(options)
    recipe["settings"]["steps"] = 2
    recipe["out"] = str(tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    student, label = f"--generator={tmp_path / 'student'}", "--label=[1, 3]"
    main([f"--config={tmp_path / 'recipe.yaml'}", student, label, "--device=cpu"])

    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len(scores["soft"]) == 2
    assert scores["soft"][0] != scores["soft"][1]
    assert len(scores["after"]) == 2
