"""Frozen text towers, opened from tiny random checkpoints that the tests save."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from softgen.models import MaskedTransformer, OpenCLIP, PretrainedTextEncoder
from softgen.pretrained import Pretrained

open_clip = pytest.importorskip("open_clip", reason="the extra softgen[rewards] is not installed")
transformers = pytest.importorskip("transformers", reason="the extra softgen[rewards] is not installed")

PROMPTS = ["a red dog", "a cat"]
WORDS = ("a", "red", "dog", "cat")
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 20, "width": 12, "heads": 2, "layers": 3},
}


def save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate(("<unk>", "<start>", "<end>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<end>", model_max_length=7
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    rows = save_tokenizer(folder)
    text = {**TEXT, "vocab_size": rows, "eos_token_id": 2, "max_position_embeddings": 7}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**TEXT, "image_size": 28, "patch_size": 14}, projection_dim=10
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    rows = save_tokenizer(folder)
    config = transformers.T5Config(vocab_size=rows, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    OpenCLIP(architecture=CLIP).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [-1, -2])
def test_clip_of_transformers(clip_folder: Path, layer: int) -> None:
    encoder = PretrainedTextEncoder(str(clip_folder), layer=layer)
    assert (encoder.length, encoder.width, encoder.pooled_width) == (7, 16, 10)
    condition = encoder(PROMPTS)
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=7, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = whole.text_model(**ids, output_hidden_states=True)
        pooled = whole.text_projection(output.pooler_output)
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    torch.testing.assert_close(condition.states, states, rtol=0, atol=1e-5)
    torch.testing.assert_close(condition.pooled, pooled, rtol=0, atol=1e-5)
    assert condition.mask.sum(dim=1).tolist() == [5, 4]


def test_t5_is_pooled_by_its_mean_state(t5_folder: Path) -> None:
    encoder = PretrainedTextEncoder(str(t5_folder), length=6)
    condition = encoder(PROMPTS)
    assert condition.states.shape == (2, 6, 16)
    torch.testing.assert_close(condition.pooled[1], condition.states[1, :4].mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2])
def test_open_clip(open_clip_folder: Path, layer: int) -> None:
    encoder = PretrainedTextEncoder(f"local-dir:{open_clip_folder}", library="open_clip", layer=layer)
    assert (encoder.length, encoder.width, encoder.pooled_width) == (20, 12, 8)
    condition = encoder(PROMPTS)
    clip = Pretrained.from_pretrained(open_clip_folder)
    assert isinstance(clip, OpenCLIP)
    pooled = torch.nn.functional.normalize(condition.pooled, dim=-1)
    torch.testing.assert_close(pooled, clip.encode_prompts(PROMPTS).detach(), rtol=0, atol=1e-5)
    kept: list[torch.Tensor] = []
    block = clip.model.transformer.resblocks[layer]
    handle = block.register_forward_hook(lambda *given: kept.append(given[2]))
    clip.encode_prompts(PROMPTS)
    handle.remove()
    expected = clip.model.ln_final(kept[0]) if layer == -1 else kept[0]
    torch.testing.assert_close(condition.states, expected.detach(), rtol=0, atol=1e-5)


def test_a_model_keeps_the_source_and_not_the_weights(clip_folder: Path, tmp_path: Path) -> None:
    model = MaskedTransformer(
        num_codes=5, num_sites=4, width=8, depth=1, heads=2, text_encoder=PretrainedTextEncoder(str(clip_folder))
    )
    assert not any(name.startswith("text.") for name in model.state_dict())
    model.save_pretrained(tmp_path / "model")
    opened = Pretrained.from_pretrained(tmp_path / "model")
    assert isinstance(opened, MaskedTransformer)
    embeddings = model.embed(torch.zeros(2, 4, dtype=torch.long))
    expected = model.eval()(embeddings, model.encode(PROMPTS))
    assert torch.equal(opened(embeddings, opened.encode(PROMPTS)), expected)
    unopened = copy.deepcopy(opened)
    assert isinstance(unopened.text, PretrainedTextEncoder)
    assert isinstance(opened.text, PretrainedTextEncoder)
    assert unopened.text._open() is opened.text._open()
    twin = copy.deepcopy(model)
    assert isinstance(model.text, PretrainedTextEncoder)
    assert isinstance(twin.text, PretrainedTextEncoder)
    assert twin.text._open() is model.text._open()


def test_the_tower_moves_along_whenever_it_is_opened(clip_folder: Path) -> None:
    settings = PretrainedTextEncoder(str(clip_folder)).config
    late, early = PretrainedTextEncoder(**settings), PretrainedTextEncoder(str(clip_folder))
    for encoder in (late, early):
        encoder.to(torch.float64)
        assert encoder(PROMPTS).states.dtype == torch.float64


def test_long_prompts_are_cut_and_counted(clip_folder: Path, open_clip_folder: Path) -> None:
    long = " ".join(["a red dog"] * 9)
    for encoder in (
        PretrainedTextEncoder(str(clip_folder)),
        PretrainedTextEncoder(f"local-dir:{open_clip_folder}", library="open_clip"),
    ):
        with pytest.warns(UserWarning, match=rf"1 of 2 prompts are cut to {encoder.length} tokens"):
            encoder([long, "a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "missing/folder/here"}, "text_encoder.source: expected a text model in 'missing/folder/here', got"),
        ({"source": "x", "library": "timm"}, "text_encoder.library: expected transformers or open_clip, got 'timm'"),
        ({"source": "x", "layer": 0}, "text_encoder.layer: expected a number below 0"),
        ({"source": "ViT-B-32", "library": "open_clip"}, "expected local-dir:FOLDER or hf-hub:OWNER/NAME"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainedTextEncoder(**options)


def test_settings_that_the_model_cannot_serve(clip_folder: Path, open_clip_folder: Path) -> None:
    source = f"local-dir:{open_clip_folder}"
    with pytest.raises(ValueError, match=r"^text_encoder.layer: expected -\d to -1 of this model, got -9$"):
        PretrainedTextEncoder(str(clip_folder), layer=-9)
    with pytest.raises(ValueError, match=r"^text_encoder.layer: expected -\d to -1 of this model, got -9$"):
        PretrainedTextEncoder(source, library="open_clip", layer=-9)
    with pytest.raises(ValueError, match=r"^text_encoder.length: expected 20 of this model of open_clip, got 9$"):
        PretrainedTextEncoder(source, library="open_clip", length=9)
    with pytest.raises(ValueError, match=r"^text_encoder.length: expected at most 7 of this model, got 8$"):
        PretrainedTextEncoder(str(clip_folder), length=8)
    deepest = PretrainedTextEncoder(str(clip_folder), layer=-PretrainedTextEncoder(str(clip_folder))._open().depth)
    assert deepest(PROMPTS).states.shape == (2, 7, 16)
