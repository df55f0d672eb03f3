"""How text towers are read by published text-to-image models: padding, its id, the activation, diffusers' folders."""

import json
from pathlib import Path

import pytest
import torch

from softgen.models import OpenCLIP, PretrainedTextEncoder
from softgen.models.pretrained_text import openai_clip_text
from softgen.pretrained import Pretrained
from tests.models.text_towers import LENGTH, save_clip_text

transformers = pytest.importorskip("transformers", reason="the extra softgen[rewards] is not installed")
open_clip = pytest.importorskip("open_clip", reason="the extra softgen[rewards] is not installed")

PROMPTS = ["a red dog", "a cat"]
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 20, "width": 12, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_text(tmp_path_factory.mktemp("text"))


def test_padding_is_seen_where_it_is_asked_for(folder: Path) -> None:
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        output = model(ids["input_ids"], output_hidden_states=True)
    condition = PretrainedTextEncoder(str(folder), layer=-2, attend_padding=True)(PROMPTS)
    torch.testing.assert_close(condition.states, output.hidden_states[-2], rtol=0, atol=1e-5)
    torch.testing.assert_close(condition.pooled, output.text_embeds, rtol=0, atol=1e-5)
    masked = PretrainedTextEncoder(str(folder), layer=-2)(PROMPTS)
    assert torch.equal(masked.mask, condition.mask)
    torch.testing.assert_close(masked.states[masked.mask], condition.states[masked.mask], rtol=0, atol=1e-5)
    assert (masked.states[1, -1] - condition.states[1, -1]).abs().max() > 1e-3


def test_the_padding_has_the_id_that_is_asked_for(folder: Path) -> None:
    plain = PretrainedTextEncoder(str(folder), attend_padding=True)
    padded = PretrainedTextEncoder(str(folder), attend_padding=True, pad_id=0)
    ids, mask = plain._open().tokenise(PROMPTS, length=LENGTH)
    assert ids[1].tolist()[-3:] == [ids.max().item()] * 3
    expected = plain.encode_ids(ids.masked_fill(~mask, 0), mask)
    got = padded(PROMPTS)
    assert torch.equal(got.states, expected.states)
    assert (got.states - plain(PROMPTS).states)[~mask].abs().max() > 1e-3
    assert torch.equal(got.pooled, plain(PROMPTS).pooled)


def test_quick_gelu_overrules_the_source(folder: Path, tmp_path: Path) -> None:
    quick = save_clip_text(tmp_path / "quick", hidden_act="quick_gelu")
    expected = PretrainedTextEncoder(str(quick), attend_padding=True, pad_id=0)(PROMPTS)
    forced = openai_clip_text(str(folder), layer=-1)(PROMPTS)
    torch.testing.assert_close(forced.states, expected.states, rtol=0, atol=1e-5)
    gelu = PretrainedTextEncoder(str(folder), attend_padding=True, pad_id=0)(PROMPTS)
    assert (gelu.states - forced.states).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["vit_large_patch14_clip_336.openai", "other"])
def test_quick_gelu_of_open_clip(name: str, tmp_path: Path) -> None:
    model = OpenCLIP(architecture=CLIP)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / name / "open_clip_config.json").read_text())
    assert "quick_gelu" not in config["model_cfg"]
    clip = Pretrained.from_pretrained(tmp_path / name)
    assert isinstance(clip, OpenCLIP)
    plain = torch.nn.functional.normalize(
        PretrainedTextEncoder(f"local-dir:{tmp_path / name}", library="open_clip")(PROMPTS).pooled, dim=-1
    )
    forced = openai_clip_text(f"local-dir:{tmp_path / name}", layer=-1)(PROMPTS).pooled
    agrees = torch.allclose(plain, clip.encode_prompts(PROMPTS), rtol=0, atol=1e-5)
    assert agrees == (name == "other")
    assert torch.allclose(plain, torch.nn.functional.normalize(forced, dim=-1), atol=1e-5) == (name != "other")


def test_a_folder_of_diffusers(folder: Path, tmp_path: Path) -> None:
    save_clip_text(tmp_path / "text_encoder", tokenizer_folder=tmp_path / "tokenizer")
    encoder = PretrainedTextEncoder(str(tmp_path), subfolder="text_encoder", layer=-2)
    expected = PretrainedTextEncoder(str(folder), layer=-2)(PROMPTS)
    assert torch.equal(encoder(PROMPTS).states, expected.states)
    again = PretrainedTextEncoder(**encoder.config)
    assert torch.equal(again(PROMPTS).pooled, expected.pooled)
    with pytest.raises(ValueError, match=r"^text_encoder.subfolder: expected none with open_clip, got 'text_encoder'$"):
        PretrainedTextEncoder("local-dir:x", library="open_clip", subfolder="text_encoder")
