"""The text-to-image recipes run, from files in the published layout to optimised images, on tiny models."""

import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from distill import Reward, SoftDiMO
from softgen import load_generator
from softgen.convert import main as convert
from softgen.fit import StageCLI, main
from softgen.models import MaskGen
from softgen.models.meissonic import PUBLISHED_NEGATIVE_PROMPT
from softgen.pretrained import fingerprint
from softgen.tokenizers import TATiTok
from tests.models.text_towers import save_clip_text
from tests.test_convert_text import MASKGEN, TATITOK, diffusers_folder, published
from tteo.__main__ import main as tteo

RECIPES = Path(__file__).parent.parent / "configs" / "text_to_image"
STAGES = ("1_dimo", "2_reward", "3_tteo")
FAMILIES = ("maskgen", "meissonic")
TOY = {"class_path": "tests.rewards.toy_rewards.Brightness"}
STEPS, BATCH = 2, 2


def _code(path: Path) -> list[str]:
    """The command in a recipe's opening comment."""
    opening = path.read_text().split("\nrun_dir", 1)[0].split("\ngenerator", 1)[0]
    lines = [line.removeprefix("#   ") for line in opening.splitlines() if line.startswith("#   ")]
    return shlex.split("\n".join(lines).replace("\\\n", " "))


def _convert(family: str, words: list[str]) -> None:
    """Run the command of the comment, with options for the small sizes."""
    assert words[:3] == ["python", "-m", "softgen.convert"]
    if family == "meissonic":
        diffusers_folder(Path("MeissonFlow/Meissonic"))
        small: dict[str, Any] = {"options": {"grid": [2, 2]}, "tokenizer_options": {"image_size": 32}}
    else:
        text = str(save_clip_text(Path("text")).resolve())
        torch.save(published(MaskGen(**MASKGEN)), "maskgen_vq_l.bin")
        torch.save(published(TATiTok(**TATITOK)), "tatitok_bl128_vq.bin")
        options = {"decoder_num_heads": 2, "condition_num_classes": 2, "text_encoder": text}
        heads = {"encoder_heads": 2, "decoder_heads": 2, "text_encoder": text}
        small = {"options": options, "tokenizer_options": heads}
    convert([*words[3:], *(f"--{name}={json.dumps(value)}" for name, value in small.items())])


def _check_rewards(content: Any) -> None:
    """Every reward that is named takes the arguments that it is given."""
    if isinstance(content, dict):
        if str(content.get("class_path", "")).startswith("rewards."):
            module, _, name = content["class_path"].rpartition(".")
            inspect.signature(getattr(importlib.import_module(module), name)).bind(**content["init_args"])
        content = list(content.values())
    if isinstance(content, list):
        for inner in content:
            _check_rewards(inner)


def _fit(path: Path) -> StageCLI:
    """Two steps of a recipe in which sizes are changed, and the rewards."""
    content = yaml.safe_load(path.read_text())
    _check_rewards(content)
    content["data"]["init_args"].update(batch_size=BATCH, val_samples=2)
    for objective in content["model"]["init_args"]["objectives"]:
        if objective["class_path"] == "distill.Reward":
            objective["init_args"].update(rewards=[TOY], weights=[1.0], held_out=[])
    content["trainer"].update(max_steps=STEPS, val_check_interval=STEPS, limit_val_batches=1, log_every_n_steps=1)
    if "accumulate_grad_batches" in content["trainer"]:
        content["trainer"].update(accumulate_grad_batches=1)
    small = Path(path.name)
    small.write_text(yaml.safe_dump(content, sort_keys=False))
    return main([f"--config={small}", "--trainer.accelerator=cpu", "--threads=1"])


@pytest.mark.filterwarnings("ignore:text encoder")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stages_run_one_after_the_other(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dimo, reward, optimise = (RECIPES / family / f"{stage}.yaml" for stage in STAGES)
    runs = Path("runs/text_to_image") / family
    Path("prompts").mkdir()
    Path("prompts/some.txt").write_text("\n".join(["a red circle", "a dog", "a cat and a ring"] * 4))

    _convert(family, _code(dimo))
    first = _fit(dimo)
    begun = fingerprint(nn.ModuleList([load_generator(runs / "1_dimo" / "model").model]))  # of the weights alone
    second = _fit(reward)
    for cli in (first, second):
        stage = cli.model
        assert isinstance(stage, SoftDiMO)
        assert cli.trainer.precision == "bf16-mixed"
        assert {parameter.dtype for parameter in stage.teacher.parameters()} == {torch.bfloat16}
        assert all(torch.isfinite(loss) for loss in stage.latest_losses.values())
    assert isinstance(second.model, SoftDiMO)
    assert isinstance(second.model.objectives, nn.ModuleList)
    assert isinstance(second.model.objectives[1], Reward)
    left = load_generator(runs / "2_reward" / "model")
    assert fingerprint(nn.ModuleList([left.model])) != begun
    negative = PUBLISHED_NEGATIVE_PROMPT if family == "meissonic" else ""
    assert left.model.config["negative_prompt"] == negative
    assert (left.r_init, left.noise) == ((0.5, 0.3) if family == "meissonic" else (0.6, 0.1))

    assert _code(optimise)[:4] == ["python", "-m", "tteo", "--config"]
    content = yaml.safe_load(optimise.read_text())
    inner = content["reward"]["init_args"]
    _check_rewards(list(inner["rewards"].values()))
    assert inner["rewards"].keys() == inner["weights"].keys()
    content["reward"] = TOY
    content["settings"].update(steps=2)
    Path("tteo.yaml").write_text(yaml.safe_dump(content))
    tteo(["--config=tteo.yaml", "--device=cpu"])
    scores = json.loads((runs / "3_tteo" / "scores.json").read_text())
    assert len(scores["after"]) == len(content["prompt"])
    assert all(after >= before for before, after in zip(scores["before"], scores["after"], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_numbered_and_write_to_their_own_folders(family: str) -> None:
    assert sorted(path.name for path in RECIPES.iterdir()) == sorted(FAMILIES)
    assert sorted(path.stem for path in (RECIPES / family).iterdir()) == list(STAGES)
    for stage in STAGES:
        text = (RECIPES / family / f"{stage}.yaml").read_text()
        content = yaml.safe_load(text)
        written = content["out"] if stage == "3_tteo" else content["run_dir"]
        assert written == f"runs/text_to_image/{family}/{stage}"
        assert set(re.findall(r"runs/text_to_image/(\w+)", text)) == {family}
