"""The text-to-image recipes fit on the accelerators that they name, at full size."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
RECIPES = [f"{name}/{stage}" for name in ("meissonic", "maskgen") for stage in ("1_dimo", "2_reward")]


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_plan", ROOT / "benchmarks" / "memory_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("label", RECIPES)
def test_the_plan_that_is_shown_is_of_the_recipe_and_fits(label: str) -> None:
    text = (ROOT / "configs" / "text_to_image" / f"{label}.yaml").read_text()
    shown = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text())[label]
    bound = 80 if label.startswith("meissonic") else 24
    assert shown["settings"] == benchmark().settings(yaml.safe_load(text)), "run benchmarks/memory_plan.py again"
    assert 0.5 * bound < shown["gigabytes"] <= bound
    assert f"fits on an accelerator of {bound} GB" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", RECIPES)
def test_the_plan_is_made_again_and_fits(label: str) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "text_to_image" / f"{label}.yaml").read_text())
    name = label.split("/", 1)[0]
    planned = benchmark().row(name, recipe)
    assert planned["fits"]
    shown = json.loads((ROOT / "benchmarks" / "results" / "memory_plan.json").read_text())[label]
    assert planned["total"] == pytest.approx(shown["total"], rel=1e-3)
