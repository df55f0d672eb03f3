"""What a user can get wrong with Meissonic and MaskGen gives one line through the command line."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from softgen.cli import user_errors
from softgen.convert import main as convert
from softgen.fit import main as fit
from softgen.models import MaskGen
from softgen.models.pretrained_text import openai_clip_text
from softgen.sample import main as sample
from softgen.tokenizers import DiffusersVQ, TATiTok
from tests.models.text_towers import save_clip_text
from tests.test_convert_text import MASKGEN, TATITOK, VQ, published

FAMILY = ["--options.decoder_num_heads=2", "--options.condition_num_classes=2"]


def line_of(command: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        command(arguments)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_a_missing_text_encoder_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(published(MaskGen(**MASKGEN)), tmp_path / "model.safetensors")
    source = ["--family=maskgen", f"--source={tmp_path / 'model.safetensors'}", f"--out={tmp_path / 'out'}"]
    folder = f"{tmp_path}/no/folder"
    line = line_of(convert, [*source, *FAMILY, f"--options.text_encoder={folder}"], capsys)
    expected = f"text_encoder.source: expected a text model in '{folder}', got an error (there is no folder {folder})"
    assert line == f"softgen.convert: error: {expected}"


def test_a_text_encoder_folder_that_went_missing_ends_training_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_clip_text(tmp_path / "text")
    model = MaskGen(**MASKGEN, text_encoder=openai_clip_text(str(folder), layer=-2))
    model.save_pretrained(tmp_path / "teacher")
    folder.rename(tmp_path / "moved")
    (tmp_path / "some.txt").write_text("a dog\na cat\na ring\n")
    words = ["--model=distill.SoftDiMO", f"--model.init_args.teacher={tmp_path / 'teacher'}"]
    words += ["--data=softgen.data.Prompts", f"--data.init_args.paths={tmp_path / 'some.txt'}"]
    words += ["--data.init_args.batch_size=1", "--data.init_args.val_samples=1"]
    words += [f"--run_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]
    capsys.readouterr()  # bars of the tower's library
    line = line_of(fit, words, capsys)
    assert line.startswith(f"softgen.fit: error: text_encoder.source: expected a text model in '{folder}', got an err")
    assert not (tmp_path / "run" / "model").exists()


def test_a_prompt_beyond_the_text_length_is_cut_and_counted_in_one_line(tmp_path: Path) -> None:
    encoder = openai_clip_text(str(save_clip_text(tmp_path)), layer=-2)
    with pytest.warns(UserWarning, match=r"^text encoder: 1 of 2 prompts are cut to 7 tokens$") as caught:
        encoder(["a red dog and a cat and a ring", "a dog"])
    (warning,) = caught
    with user_errors("softgen.fit"):
        shown = warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno)
    assert shown == "softgen.fit: warning: text encoder: 1 of 2 prompts are cut to 7 tokens\n"


def test_an_image_size_that_is_no_multiple_of_the_stride(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(published(DiffusersVQ(**VQ)), tmp_path / "vq.safetensors")
    source = ["--family=diffusers_vq", f"--source={tmp_path / 'vq.safetensors'}", f"--out={tmp_path / 'out'}"]
    line = line_of(convert, [*source, "--options.image_size=33"], capsys)
    assert "tokenizer.image_size: expected a multiple of " in line
    assert line.endswith(", got 33")


def test_guidance_without_a_negative_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MaskGen(**{**MASKGEN, "text_encoder": None})
    model.save_pretrained(tmp_path / "model", tokenizer=TATiTok(**TATITOK))
    arguments = [f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--n=1", "--guidance=4", "--device=cpu"]
    line = line_of(sample, [*arguments, '--prompts=["a dog"]'], capsys)
    assert line == "softgen.sample: error: guidance: expected 1, since this model has no null condition, got 4.0"
