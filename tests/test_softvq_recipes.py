"""The recipes of SoftVQ-VAE and its generator: each runs two steps, one after the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from softgen.fit import main
from softgen.flow import FlowSampler
from softgen.generation import balanced_labels, flow_latents, generate
from softgen.loading import load_continuous_tokenizer
from softgen.metrics import SmallClassifier
from softgen.models import SiT
from softgen.sample import main as sample
from softgen.training import TokenizerTraining
from tests.fashion_files import write_fashion_files

FOLDER = Path(__file__).parent.parent / "configs" / "softvq"


def test_there_are_recipes() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == ["1_tokenizer.yaml", "2_flow.yaml"]


@pytest.mark.filterwarnings("ignore:tokenizer. .* of its codes are used", "ignore:model.tokenizer. its normalised")
def test_both_stages_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_fashion_files(tmp_path / "data")
    common = ["--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    common += [f"--data.init_args.root={data}", "--trainer.logger=false"]
    first, second = tmp_path / "1_tokenizer", tmp_path / "2_flow"
    main([f"--config={FOLDER / '1_tokenizer.yaml'}", f"--run_dir={first}", *common])
    tokenizer = load_continuous_tokenizer(first / "model")
    assert tokenizer.latent_std != 1.0, "measured at the end"
    words = [f"--model.init_args.tokenizer={first / 'model'}", "--trainer.val_check_interval=1"]
    main([f"--config={FOLDER / '2_flow.yaml'}", f"--run_dir={second}", *common, *words])
    made = generate(
        flow_latents(SiT.from_pretrained(second / "model"), FlowSampler(steps=2), tokenizer),
        load_continuous_tokenizer(second / "model"),
        balanced_labels(3, num_classes=10),
        seed=0,
    )
    assert made.images.shape == (3, 3, 28, 28)
    assert (second / "samples" / "step_000002.png").is_file()
    sample([f"--model={second / 'model'}", f"--out={tmp_path / 'out'}", "--n=2", "--steps=2", "--device=cpu"])
    assert "2 images in" in capsys.readouterr().out


def test_paths_follow_each_other() -> None:
    stages: dict[str, Any] = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
    for stem, content in stages.items():
        assert content["run_dir"] == f"runs/softvq/{stem}"
        assert content["threads"] == 1
    made = stages["1_tokenizer"]["model"]["init_args"]["tokenizer"]["init_args"]
    flow = stages["2_flow"]["model"]["init_args"]
    assert flow["tokenizer"] == "runs/softvq/1_tokenizer/model"
    assert flow["model"]["init_args"]["num_latents"] == made["num_latents"]
    assert flow["model"]["init_args"]["latent_dim"] == made["latent_dim"]


@pytest.mark.filterwarnings("ignore:tokenizer. .* of its codes are used")
def test_every_loss_can_be_named_on_the_command_line(tmp_path: Path) -> None:
    data = write_fashion_files(tmp_path / "data")
    SmallClassifier(name="judge", image_size=28, num_classes=10, width=2).save(tmp_path / "judge")
    judge = str(tmp_path / "judge")
    losses = {
        "perceptual": {"network": judge, "weight": 0.5, "warmup_steps": 3},
        "adversarial": {"features": judge, "weight": "auto", "channels": 4, "augment": ["colour"], "start_step": 1},
        "align": {"features": judge, "how": "avg_1d", "hidden": 8},
    }
    cli = main(
        [
            f"--config={FOLDER / '1_tokenizer.yaml'}",
            f"--run_dir={tmp_path / 'run'}",
            f"--data.init_args.root={data}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            *(f"--model.init_args.{name}={json.dumps(value)}" for name, value in losses.items()),
        ]
    )
    assert isinstance(cli.model, TokenizerTraining)
    assert set(cli.model.latest_losses) == {
        "mse",
        "l1",
        "perceptual",
        "adversarial",
        "discriminator",
        "kl",
        "alignment",
    }
