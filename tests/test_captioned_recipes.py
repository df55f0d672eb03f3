"""The recipes on captioned images parse, instantiate, and start from each other's folders."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from softgen.fit import StageCLI, main
from softgen.models import MaskedTransformer, OneStepGenerator, OpenCLIP, WordTextEncoder
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import Stage
from tteo.__main__ import main as tteo

pytest.importorskip("open_clip", reason="the extra softgen[clip] is not installed")

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES = ("1_tokenizer", "2_teacher", "clip", "3_dimo", "4_reward")
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 16, "width": 8, "heads": 1, "layers": 1},
}


def stand_ins(root: Path, name: str) -> None:
    """Untrained models, of the sizes that the recipes give, where earlier stages leave theirs."""
    codes, channels = 1024, [8, 8, 8, 8] if name == "shapes" else [8, 8, 8]
    tokenizer = ConvVQTokenizer(image_size=32, num_codes=codes, channels=channels)
    encoder = WordTextEncoder(vocabulary=["a", "red", "circle"], num_words=8, width=8, depth=1, heads=1)
    sizes = {"width": 8, "depth": 1, "heads": 1}
    teacher = MaskedTransformer(num_codes=codes, num_sites=tokenizer.num_sites, **sizes, text_encoder=encoder)
    tokenizer.save_pretrained(root / "1_tokenizer" / "model")
    teacher.save_pretrained(root / "2_teacher" / "model", tokenizer=tokenizer)
    teacher.save_pretrained(root / "3_dimo" / "auxiliary")
    for stage in ("3_dimo", "4_reward"):
        OneStepGenerator(teacher).save_pretrained(root / stage / "model", tokenizer=tokenizer)
    OpenCLIP(architecture=TINY_CLIP).save_pretrained(root / "clip" / "model")


class NotRunning(StageCLI):
    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("name", ["shapes", "openmoji"])
@pytest.mark.parametrize("stage", STAGES)
def test_recipe_instantiates(name: str, stage: str, tmp_path: Path) -> None:
    text = (CONFIGS / name / f"{stage}.yaml").read_text()
    assert re.search(rf"^run_dir: runs/{name}/{stage}$", text, flags=re.MULTILINE)
    stand_ins(tmp_path, name)
    moved = text.replace(f"runs/{name}", str(tmp_path))
    assert "runs/" not in moved
    config = tmp_path / "config.yaml"
    config.write_text(moved)
    words = [f"--config={config}", "--trainer.accelerator=cpu", "--threads=1"]
    if name == "shapes":
        words.append("--data.init_args.train_samples=100")
    cli = main(words, cli_class=NotRunning)
    assert isinstance(cli.model, Stage)
    assert sum(parameter.numel() for parameter in cli.model.product.parameters()) > 0


@pytest.mark.parametrize("name", ["shapes", "openmoji"])
def test_tteo_recipe_runs(name: str, tmp_path: Path) -> None:
    stand_ins(tmp_path, name)
    content = yaml.safe_load((CONFIGS / name / "5_tteo.yaml").read_text().replace(f"runs/{name}", str(tmp_path)))
    content["settings"]["steps"] = 1
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    tteo([f"--config={config}", "--device=cpu"])
    assert len(list((tmp_path / "5_tteo" / "images").iterdir())) == 4 * len(content["prompt"])
