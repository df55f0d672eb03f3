"""What a user can get wrong with Meissonic and MaskGen gives one line through the command line."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from softgen.convert import main as convert
from softgen.models import MaskGen
from softgen.sample import main as sample
from softgen.tokenizers import DiffusersVQ, TATiTok
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
    line = line_of(convert, [*source, *FAMILY, f"--options.text_encoder={tmp_path}/no/folder"], capsys)
    assert f"text_encoder.source: expected a text model in '{tmp_path}/no/folder', got an error (" in line


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
