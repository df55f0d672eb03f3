"""The recipes that come with the toolkit: configs/<data set>/, one file a stage, numbered in the order they run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STAGES = ("1_tokenizer", "2_teacher", "3_dimo", "4_gan", "5_reward")


@dataclass(frozen=True)
class Recipe:
    """A data set's stages.

    Attributes:
        name: Of the data set, `digits` or `fashion_mnist`.
        folder: Holds one YAML a stage.
        samples: Images that the figures are measured on.
        num_classes: Of the data.
    """

    name: str
    folder: Path
    samples: int
    num_classes: int

    def config(self, stage: str) -> Path:
        """The YAML of a stage."""
        return self.folder / f"{stage}.yaml"

    def write_config(self, stage: str, root: Path) -> Path:
        """Write root/configs/<stage>.yaml: the stage with every `runs/<data set>/` in it moved to `root`."""
        content = _moved(yaml.safe_load(self.config(stage).read_text()), old=f"runs/{self.name}/", new=f"{root}/")
        path = root / "configs" / f"{stage}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path


def _moved(value: Any, *, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, old=old, new=new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, old=old, new=new) for inner in value]
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def find_recipe(name: str) -> Recipe:
    """The recipe of a data set, in a checkout or in the installed package.

    Raises:
        ValueError: If there is none of that name.
    """
    samples = {"digits": 1797, "fashion_mnist": 10_000}
    if name not in samples:
        raise ValueError(f"data: expected one of {', '.join(samples)}, got {name!r}")
    package = Path(__file__).parent
    folder = next(base / name for base in (package.parent / "configs", package / "configs") if base.is_dir())
    return Recipe(name=name, folder=folder, samples=samples[name], num_classes=10)
