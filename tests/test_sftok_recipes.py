"""The recipes of SFTok: each runs two steps on small sizes, from what the one before left; and mistakes on the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from distill import SoftDiMO
from softgen.fit import main as fit
from softgen.generation import balanced_labels, generate, one_step_tokens
from softgen.loading import load_generator, load_tokenizer
from softgen.metrics import SmallClassifier
from softgen.sample import main as sample
from softgen.tokenizers import ConvVQTokenizer, SFTok
from softgen.training import SFTokTraining
from tests.fashion_files import write_fashion_files

FOLDER = Path(__file__).parent.parent / "configs" / "sftok"
STAGES = ("0_proxies", "1_warm_up", "2_alignment", "3_fine_tuning", "4_teacher", "5_dimo")
TOKENIZER, MODEL = "--model.init_args.tokenizer.init_args.", "--model.init_args.model.init_args."
VIT = "{width: 8, depth: 1, heads: 1, patch_size: 4}"
SMALL = {
    "0_proxies": [f"{TOKENIZER}num_codes=6", f"{TOKENIZER}channels=[8, 8]"],
    "1_warm_up": [
        f"{TOKENIZER}codebook_size=5",
        f"{TOKENIZER}num_latent_tokens=3",
        f"{TOKENIZER}encoder={VIT}",
        f"{TOKENIZER}decoder={VIT}",
        f"{TOKENIZER}proxy_codebook_size=6",
        f"{TOKENIZER}steps=3",
    ],
    "3_fine_tuning": [
        "--model.init_args.adversarial.channels=4",
        "--model.init_args.adversarial.start_step=1",
        "--model.init_args.adversarial.critic_only_steps=0",
    ],
    "4_teacher": [
        f"{MODEL}num_codes=5",
        f"{MODEL}num_sites=3",
        f"{MODEL}width=8",
        f"{MODEL}depth=1",
        f"{MODEL}heads=1",
    ],
}


def _words(stage: str, root: Path) -> list[str]:
    """Two steps of a recipe, on small sizes."""
    words = [f"--config={root / f'{stage}.yaml'}", *SMALL.get(stage, []), "--trainer.accelerator=cpu"]
    words += ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    return [*words, "--trainer.logger=false"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The recipes with every path below one folder, data, and a judge."""
    data = write_fashion_files(tmp_path / "data")
    SmallClassifier(name="judge", image_size=28, num_classes=10, width=2).save(tmp_path / "judge")
    for stage in STAGES:
        text = (FOLDER / f"{stage}.yaml").read_text()
        text = text.replace("runs/sftok/", f"{tmp_path}/").replace("data/fashion_mnist", str(data))
        (tmp_path / f"{stage}.yaml").write_text(text)
    return tmp_path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _chain(root: Path, last: str) -> Any:
    """Run the recipes up to one; the stage of that one."""
    for stage in STAGES[: STAGES.index(last) + 1]:
        cli = fit(_words(stage, root))
    return cli.model


def _error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a user's mistake."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2
    assert len(lines) == 1
    return lines[0].split("error: ", 1)[1]


def test_there_are_recipes_and_their_paths_follow_each_other() -> None:
    assert tuple(sorted(path.stem for path in FOLDER.iterdir())) == STAGES
    contents: dict[str, Any] = {stage: yaml.safe_load((FOLDER / f"{stage}.yaml").read_text()) for stage in STAGES}
    given = {stage: content["model"]["init_args"] for stage, content in contents.items()}
    for stage, content in contents.items():
        assert content["run_dir"] == f"runs/sftok/{stage}"
        assert content["threads"] == 1
    assert [given[stage]["phase"] for stage in STAGES[1:4]] == ["warm_up", "alignment", "fine_tuning"]
    assert {given[stage]["teacher"] for stage in STAGES[1:4]} == {"runs/sftok/0_proxies/model"}
    for stage, before in zip(STAGES[2:5], STAGES[1:4], strict=True):
        assert given[stage]["tokenizer"] == f"runs/sftok/{before}/model"
    assert given["5_dimo"]["teacher"] == "runs/sftok/4_teacher/model"
    tokenizer = SFTok(**given["1_warm_up"]["tokenizer"]["init_args"])
    proxies = ConvVQTokenizer(**given["0_proxies"]["tokenizer"]["init_args"])
    assert (proxies.num_codes, proxies.num_sites) == (tokenizer.decoder.num_codes, tokenizer.decoder.num_proxies)
    model = given["4_teacher"]["model"]["init_args"]
    assert (model["num_codes"], model["num_sites"]) == (tokenizer.num_codes, tokenizer.num_sites)


@pytest.mark.filterwarnings("ignore:tokenizer. .* of its codes are used", "ignore:model.warmup_steps. 200 steps")
def test_every_stage_runs_from_what_the_one_before_left(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = _chain(root, "5_dimo")
    assert isinstance(stage, SoftDiMO)
    proxies, warm, aligned, tuned = (load_tokenizer(root / name / "model") for name in STAGES[:4])
    assert isinstance(proxies, ConvVQTokenizer)
    assert isinstance(warm, SFTok)
    assert isinstance(aligned, SFTok)
    assert isinstance(tuned, SFTok)
    assert not warm.untrained
    assert warm.config["pixel_decoder"] is aligned.config["pixel_decoder"] is None
    assert tuned.config["pixel_decoder"]["init_args"] == proxies.config
    kept, before = tuned.quantizer.state_dict(), aligned.quantizer.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items()), "fine-tuning leaves the codes"
    assert not torch.equal(aligned.codebook, warm.codebook)
    assert tuned.pixel_quantize.embedding.weight.shape == (6, proxies.code_dim)

    generator, decoder = load_generator(root / "5_dimo" / "model"), load_tokenizer(root / "5_dimo" / "model")
    assert isinstance(decoder, SFTok)
    made = generate(one_step_tokens(generator), decoder, balanced_labels(3, num_classes=10), seed=0)
    assert made.images.shape == (3, 3, 28, 28)
    sample([f"--model={root / '5_dimo' / 'model'}", f"--out={root / 'out'}", "--n=2", "--device=cpu"])
    assert "2 images in" in capsys.readouterr().out
    assert Image.open(root / "5_dimo" / "samples" / "step_000002.png").size[0] > 28


@pytest.mark.filterwarnings("ignore:tokenizer. .* of its codes are used", "ignore:model.warmup_steps. 200 steps")
def test_fine_tuning_starts_from_the_pixels_of_the_proxies(root: Path) -> None:
    _chain(root, "2_alignment")
    stage = fit([*_words("3_fine_tuning", root), "--model.init_args.optimizer.lr=0", "--ema.decay=0"]).model
    assert isinstance(stage, SFTokTraining)
    assert set(stage.latest_losses) == {"mse", "perceptual", "adversarial", "discriminator"}
    proxies, tuned = load_tokenizer(root / "0_proxies" / "model"), load_tokenizer(root / "3_fine_tuning" / "model")
    assert isinstance(tuned, SFTok)
    codes = torch.randint(6, (2, 49))
    sure = 100.0 * torch.nn.functional.one_hot(codes, 6)
    torch.testing.assert_close(tuned.pixels(sure).clamp(0, 1), proxies.decode(codes))


def test_a_stage_without_the_one_before(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(_words("0_proxies", root))
    for stage, before in (("2_alignment", "1_warm_up"), ("3_fine_tuning", "2_alignment")):
        expected = f"model.tokenizer: expected a folder or a hub id 'owner/name', got '{root / before / 'model'}'"
        assert _error(_words(stage, root), capsys) == expected
    fresh = "--model.init_args.tokenizer={class_path: softgen.tokenizers.SFTok, init_args: {image_size: 28, "
    fresh += f"encoder: {VIT}, decoder: {VIT}, proxy_codebook_size: 6}}}}"
    assert _error([*_words("2_alignment", root), fresh], capsys) == (
        "model.tokenizer: expected the product of warm_up for alignment, got an untrained SFTok "
        "(from_scratch: true takes it)"
    )
    assert _error([*_words("3_fine_tuning", root), fresh], capsys) == (
        "model.tokenizer: expected the product of alignment for fine_tuning, got an untrained SFTok"
    )
    assert not (root / "2_alignment").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("proxy_codebook_size=9", "model.teacher.num_codes: expected 9 as the tokenizer's proxies have, got 6"),
        (
            "decoder={width: 8, depth: 1, heads: 1, patch_size: 7}",
            "model.teacher.num_sites: expected 16 as the tokenizer's proxies have, got 49",
        ),
        ("steps=0", "tokenizer.steps: expected 1 to 49, the number of proxies, got 0"),
        ("steps=50", "tokenizer.steps: expected 1 to 49, the number of proxies, got 50"),
    ],
)
def test_proxies_and_steps_that_do_not_fit(
    root: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    proxies = ConvVQTokenizer(image_size=28, num_codes=6, channels=[8, 8, 8])
    proxies.save_pretrained(root / "0_proxies" / "model")
    assert _error([*_words("1_warm_up", root), f"{TOKENIZER}{option}"], capsys) == message
    assert not (root / "1_warm_up").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_codes=9", "model.tokenizer.num_codes: expected 9 as the model has, got 5"),
        ("num_sites=4", "model.tokenizer.num_sites: expected 4 as the model has, got 3"),
    ],
)
def test_a_teacher_of_other_codes(root: Path, capsys: pytest.CaptureFixture[str], option: str, message: str) -> None:
    vit = {"width": 8, "depth": 1, "heads": 1, "patch_size": 4}
    tokenizer = SFTok(
        image_size=28,
        codebook_size=5,
        token_size=4,
        num_latent_tokens=3,
        encoder=vit,
        decoder=vit,
        proxy_codebook_size=6,
        pixel_decoder=ConvVQTokenizer(image_size=28, num_codes=6, channels=[8, 8, 8]),
    )
    tokenizer.save_pretrained(root / "3_fine_tuning" / "model")
    assert _error([*_words("4_teacher", root), f"{MODEL}{option}"], capsys) == message
