"""The ImageNet recipes run as they stand, from files in the published layout to optimised images, on tiny models."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from distill import GAN, SoftDiMO
from softgen import load_generator, load_model, load_tokenizer
from softgen.bits import code_bits
from softgen.convert import main as convert
from softgen.fit import StageCLI, main
from softgen.images import save_image
from softgen.models import ImageBert, MaskBit, MaskGIT, OneStepGenerator
from softgen.pretrained import fingerprint
from softgen.tokenizers import MaskBitTokenizer, TamingVQGAN, TiTok
from tteo.__main__ import main as tteo

RECIPES = Path(__file__).parent.parent / "configs" / "imagenet256"
STAGES = ("1_dimo", "2_gan", "3_tteo")
CLASSES, SIDE, STEPS, BATCH = 4, 32, 2, 4
# The depth is the published one, so that the recipes' taps hold.
NETWORK: dict[str, Any] = {"img_size": SIDE, "hidden_dim": 16, "depth": 24, "heads": 2, "mlp_dim": 24}
NETWORK |= {"nclass": CLASSES}
VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8}
PIXELS = {"channel_mult": [1, 1, 1, 2], "hidden_channels": 32, "num_res_blocks": 1, "z_channels": 6, "num_channels": 3}
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


class Callback:
    """Stands for what a trainer pickles into its checkpoint besides tensors."""


@dataclass(frozen=True)
class Published:
    """Files as they are published, by name, and the options of `softgen.convert` that their small sizes need."""

    files: Mapping[str, Any]
    options: Mapping[str, Any]
    tokenizer_options: Mapping[str, Any]


def _randomised(module: nn.Module) -> dict[str, Tensor]:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return {name.replace("quantizer.", "quantize."): value for name, value in module.state_dict().items()}


def maskgit() -> Published:
    """A training checkpoint, and that of a Lightning run with its loss."""
    model = _randomised(MaskGIT(**NETWORK, codebook_size=8))
    tokenizer = _randomised(
        TamingVQGAN(
            image_size=SIDE, n_embed=8, embed_dim=4, ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, z_channels=4
        )
    )
    moments = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    training = {"iter": 7, "global_epoch": 1, "model_state_dict": model, "optimizer_state_dict": moments}
    lightning = {"state_dict": {**tokenizer, "loss.logvar": torch.zeros(1)}, "callbacks": {"best": Callback()}}
    return Published(
        files={"MaskGIT_ImageNet_256.pth": training, "last.ckpt": lightning},
        options={"heads": 2, "nclass": CLASSES},
        tokenizer_options={"image_size": SIDE},
    )


def maskbit() -> Published:
    """State dicts with the buffers that the published modules have, and the projection under its older name."""
    model = _randomised(MaskBit(**NETWORK, bits=6))
    model = {name.replace("input_proj", "token_emb"): value for name, value in model.items()}
    tokenizer = _randomised(
        MaskBitTokenizer(image_size=SIDE, bits=6, hidden_channels=32, channel_mult=[1, 1, 1, 1, 1], num_res_blocks=1)
    )
    buffers = {"quantize.bits_to_indices": (2 ** torch.arange(6)).int(), "quantize.codebook": code_bits(6)}
    return Published(
        files={
            "maskbit_generator_14bit.bin": {**model, "bits_to_indices": (2 ** torch.arange(3)).int()},
            "maskbit_tokenizer_14bit.bin": {**tokenizer, **buffers},
        },
        options={"heads": 2},
        tokenizer_options={"image_size": SIDE},
    )


def titok_b64() -> Published:
    """State dicts; the generator's with BERT's positions, which are no weights."""
    sizes = {"codebook_size": 8, "image_seq_len": 5, "condition_num_classes": CLASSES, "hidden_size": 16}
    model = _randomised(ImageBert(**sizes, num_hidden_layers=24, num_attention_heads=2, intermediate_size=24))
    tokenizer = TiTok(
        image_size=SIDE,
        codebook_size=8,
        token_size=4,
        num_latent_tokens=5,
        encoder=VIT,
        decoder=VIT,
        proxy_codebook_size=7,
        pixel_decoder=PIXELS,
    )
    return Published(
        files={
            "generator_titok_b64.bin": {**model, "model.embeddings.position_ids": torch.arange(6).unsqueeze(0)},
            "tokenizer_titok_b64.bin": _randomised(tokenizer),
        },
        options={"num_attention_heads": 2},
        tokenizer_options={"encoder_heads": 2, "decoder_heads": 2},
    )


FAMILIES = {"maskgit": maskgit, "maskbit": maskbit, "titok_b64": titok_b64}


def _code(path: Path) -> str:
    """The code in a recipe's opening comment."""
    opening = path.read_text().split("\nrun_dir", 1)[0].split("\ngenerator", 1)[0]
    lines = [line.removeprefix("#   ") for line in opening.splitlines() if line.startswith("#   ")]
    assert lines, f"{path} says how to make what it starts from, or how to run it"
    return "\n".join(lines).replace("\\\n", " ")


def _convert(path: Path, published: Published) -> None:
    """Run the command of the comment, with options for the small sizes."""
    for name, content in published.files.items():
        torch.save(content, name)
    words = shlex.split(_code(path))
    assert words[:3] == ["python", "-m", "softgen.convert"]
    small = {"options": published.options, "tokenizer_options": published.tokenizer_options}
    convert([*words[3:], *(f"--{name}={json.dumps(value)}" for name, value in small.items())])


def _encode(path: Path) -> None:
    """Run the Python of the comment on a few images."""
    code = _code(path)
    (folder,) = re.findall(r'ImageFolder\("([^"]+)", image_size=256', code)
    for index in range(5 * CLASSES):
        file = Path(folder, f"n{index % CLASSES:08d}", f"{index}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, SIDE, SIDE), file)
    small = code.replace("image_size=256", f"image_size={SIDE}").replace("val_fraction=0.01", "val_fraction=0.2")
    exec(small, {})


def _fit(path: Path) -> StageCLI:
    """Two steps of a recipe in which nothing is changed but sizes."""
    content = yaml.safe_load(path.read_text())
    content["data"]["init_args"]["batch_size"] = BATCH
    if "num_workers" in content["data"]["init_args"]:
        content["data"]["init_args"]["num_workers"] = 0
    if "num_classes" in content["data"]["init_args"]:
        content["data"]["init_args"]["num_classes"] = CLASSES
    for objective in content["model"]["init_args"]["objectives"]:
        objective["init_args"].pop("critic_only_steps", None)
    content["trainer"].update(max_steps=STEPS, val_check_interval=STEPS, limit_val_batches=1, log_every_n_steps=1)
    small = Path(path.name)
    small.write_text(yaml.safe_dump(content, sort_keys=False))
    return main([f"--config={small}", "--trainer.accelerator=cpu", "--threads=1"])


def _weights(generator: OneStepGenerator) -> str:
    """A hash of the weights alone."""
    return fingerprint(nn.ModuleList([generator.model]))


def _check_stage(cli: StageCLI, run_dir: Path, *, begun: str) -> None:
    stage = cli.model
    assert isinstance(stage, SoftDiMO)
    assert cli.trainer.global_step == STEPS
    assert cli.trainer.precision == "bf16-mixed"
    assert {parameter.dtype for parameter in stage.teacher.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(loss) for loss in stage.latest_losses.values())
    assert "train/dimo" in cli.trainer.logged_metrics
    left = load_generator(run_dir / "model")
    assert _weights(left) != begun
    assert load_tokenizer(run_dir / "model").num_sites == left.model.num_sites
    teacher = load_model(run_dir.parent / "teacher")
    for kept, original in zip(left.model.embedding_parameters(), teacher.embedding_parameters(), strict=True):
        assert torch.equal(kept, original)
    assert list((run_dir / "samples").glob("*.png"))


@pytest.mark.filterwarnings("ignore:Class accuracy is not watched")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stages_run_one_after_the_other(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.chdir(tmp_path)
    dimo, gan, optimise = (RECIPES / family / f"{stage}.yaml" for stage in STAGES)
    runs = Path("runs/imagenet256") / family

    _convert(dimo, FAMILIES[family]())
    first = _fit(dimo)
    _check_stage(first, runs / "1_dimo", begun=_weights(OneStepGenerator(load_model(runs / "teacher"))))

    _encode(gan)
    begun = _weights(load_generator(runs / "1_dimo" / "model"))
    second = _fit(gan)
    _check_stage(second, runs / "2_gan", begun=begun)
    assert isinstance(second.model, SoftDiMO)
    assert second.model.latest_losses.keys() == {"dimo", "dimo_critic", "gan", "gan_critic"}
    objective = second.model.objectives[1]
    assert isinstance(objective, GAN)
    assert (objective.loss, objective.mask_ratio, len(objective.taps or ())) == ("hinge", (0.0, 0.95), 6)

    Path("tiny-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.save(open_clip.create_model("tiny-clip").state_dict(), "clip.pt")
    assert shlex.split(_code(optimise))[:4] == ["python", "-m", "tteo", "--config"]
    content = yaml.safe_load(optimise.read_text())
    content["reward"]["init_args"].update(model_name="tiny-clip", pretrained="clip.pt")
    content["settings"].update(steps=2, candidates=2)
    Path("tteo.yaml").write_text(yaml.safe_dump(content))
    tteo(["--config=tteo.yaml", "--device=cpu"])
    scores = json.loads((runs / "3_tteo" / "scores.json").read_text())
    assert len(scores["after"]) == 2 * len(content["label"])
    assert len(scores["soft"]) == 2
    assert scores["soft"][0] != scores["soft"][1]
    assert all(after >= before for before, after in zip(scores["before"], scores["after"], strict=True))
    assert (content["settings"]["optimizer"], content["settings"]["lr"]) == ("sgd", 0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_are_numbered_and_write_to_their_own_folders(family: str) -> None:
    assert sorted(path.name for path in RECIPES.iterdir()) == sorted(FAMILIES)
    assert sorted(path.stem for path in (RECIPES / family).iterdir()) == list(STAGES)
    for stage in STAGES:
        content = yaml.safe_load((RECIPES / family / f"{stage}.yaml").read_text())
        written = content["out"] if stage == "3_tteo" else content["run_dir"]
        assert written == f"runs/imagenet256/{family}/{stage}"
        text = (RECIPES / family / f"{stage}.yaml").read_text()
        assert set(re.findall(r"runs/imagenet256/(\w+)", text)) == {family}
