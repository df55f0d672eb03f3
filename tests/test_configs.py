"""Every shipped recipe parses, instantiates, and is data of the right kind.

Those that start from published checkpoints are in test_imagenet_recipes.py.
"""

import re
from pathlib import Path

import pytest
import torch

from softgen.fit import StageCLI, main
from softgen.metrics.classifier import SmallClassifier
from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.recipes import STAGES, find_recipe
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import Stage

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path for name in ("digits", "fashion_mnist") for path in (FOLDER / name).glob("*.yaml"))


def _stand_ins(root: Path, name: str) -> None:
    """Untrained models, of the sizes that the recipes give, where earlier stages leave theirs."""
    size, codes, channels = (8, 64, [8, 8]) if name == "digits" else (28, 256, [8, 8, 8])
    tokenizer = ConvVQTokenizer(image_size=size, num_codes=codes, channels=channels)
    teacher = MaskedTransformer(
        num_codes=codes, num_sites=tokenizer.num_sites, num_classes=10, width=8, depth=1, heads=1
    )
    tokenizer.save_pretrained(root / "1_tokenizer" / "model")
    teacher.save_pretrained(root / "2_teacher" / "model", tokenizer=tokenizer)
    teacher.save_pretrained(root / "3_dimo" / "auxiliary")
    OneStepGenerator(teacher).save_pretrained(root / "3_dimo" / "model", tokenizer=tokenizer)
    for judge in ("extractor", "judge"):
        SmallClassifier(name=judge, image_size=size, num_classes=10, width=2).save_pretrained(root / judge)


def test_there_are_recipes() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "digits",
        "fashion_mnist",
        "imagenet256",
        "openmoji",
        "sftok",
        "shapes",
        "softvq",
        "text_to_image",
        "tteo",
    }
    for name in ("digits", "fashion_mnist"):
        assert all(find_recipe(name).config(stage).is_file() for stage in STAGES)


def test_every_recipe_ships() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    settings = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(FOLDER.parent).as_posix() for path in FOLDER.rglob("*.yaml")}
    assert {f"softgen.{folder.replace('/', '.')}": folder for folder in folders} == {
        name: folder for name, folder in settings["package-dir"].items() if folder != "configs"
    }
    assert settings["package-dir"].keys() <= set(settings["packages"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_instantiates(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    stem = f"runs/{path.parent.name}/{path.stem}"
    assert re.search(rf"^run_dir: {stem}$", text, flags=re.MULTILINE), "a recipe writes to the folder of its name"
    _stand_ins(tmp_path, path.parent.name)
    config = find_recipe(path.parent.name).write_config(path.stem, tmp_path)
    assert "runs/" not in config.read_text(), "every path of a recipe is under the folder of its data set"
    words = [f"--config={config}", "--trainer.accelerator=cpu", "--threads=1"]

    class NotRunning(StageCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    cli = main(words, cli_class=NotRunning)
    assert isinstance(cli.model, Stage)
    assert sum(parameter.numel() for parameter in cli.model.product.parameters()) > 0
    assert cli.trainer.max_steps > 0
    assert torch.get_num_threads() == 1
