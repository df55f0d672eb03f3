"""Published text-to-image checkpoints in their layouts, on tiny random weights, to folders that every stage opens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softgen import load_generator, load_model, load_tokenizer
from softgen.convert import main as convert
from softgen.models import MaskGen, Meissonic, PretrainedTextEncoder
from softgen.models.meissonic import PUBLISHED_NEGATIVE_PROMPT
from softgen.random import SampleRandom
from softgen.tokenizers import DiffusersVQ, TATiTok
from tests.models.text_towers import LENGTH, save_clip_text

pytest.importorskip("transformers", reason="the extra softgen[rewards] is not installed")

PROMPTS = ["a red circle", "a dog"]
VIT = {"width": 16, "depth": 1, "heads": 2, "patch_size": 8}
MEISSONIC: dict[str, Any] = {"grid": [2, 2], "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8}
MEISSONIC |= {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": [4, 2, 2]}
MEISSONIC |= {"vocab_size": 12, "codebook_size": 8}
VQ: dict[str, Any] = {"image_size": 32, "block_out_channels": [8] * 5, "layers_per_block": 1, "latent_channels": 4}
VQ |= {"num_vq_embeddings": 8, "norm_num_groups": 4}
MASKGEN: dict[str, Any] = {"codebook_size": 8, "num_latent_tokens": 5, "decoder_embed_dim": 16, "decoder_depth": 2}
MASKGEN |= {"decoder_num_heads": 2, "text_embed_dim": 16, "micro_condition_embed_dim": 8, "condition_num_classes": 2}
TATITOK: dict[str, Any] = {"image_size": 32, "codebook_size": 8, "token_size": 4, "num_latent_tokens": 5}
TATITOK |= {"encoder": VIT, "decoder": VIT, "text_context_length": LENGTH, "text_embed_dim": 16}


def published(module: nn.Module) -> dict[str, Tensor]:
    """Weights under the names of the files."""
    torch.manual_seed(5)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    renamed = {"quantizer.": "quantize.", "embedder.": "embed."}
    state = {}
    for name, value in module.state_dict().items():
        for ours, theirs in renamed.items():
            if name.startswith(ours):
                name = name.replace(ours, theirs, 1)
        state[name] = value.clone()
    return state


def diffusers_folder(root: Path, *, pickled: bool = False, prefix: str = "") -> Path:
    """transformer/, vqvae/, text_encoder/, tokenizer/, scheduler/."""
    parts = {
        "transformer": (published(Meissonic(**MEISSONIC)), {"axes_dims_rope": [4, 2, 2]}),
        "vqvae": (published(DiffusersVQ(**VQ)), {"norm_num_groups": 4}),
    }
    for name, (state, config) in parts.items():
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        state = {prefix + key: value for key, value in state.items()}
        if pickled:
            torch.save(state, folder / "diffusion_pytorch_model.bin")
        else:
            save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text('{"mask_token_id": 11}')
    save_clip_text(root / "text_encoder", tokenizer_folder=root / "tokenizer")
    return root


def check_samples(folder: Path) -> None:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    x = model.embed(torch.full((2, model.num_sites), model.mask_id))
    condition = model.encode(PROMPTS)
    assert model(x, condition).isfinite().all()
    tokens = model(x, condition.drop()).argmax(dim=-1)
    assert tokenizer.under(PROMPTS).decode(tokens).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(("pickled", "prefix"), [(False, ""), (True, ""), (False, "_orig_mod.")])
def test_meissonic_of_diffusers(pickled: bool, prefix: str, tmp_path: Path) -> None:
    root = diffusers_folder(tmp_path / "hub", pickled=pickled, prefix=prefix)
    words = [f"--source={root}", f"--tokenizer={root}", "--options.grid=[2, 2]", "--tokenizer_options.image_size=32"]
    convert(["--family=meissonic", *words, f"--out={tmp_path / 'out'}"])
    model = load_model(tmp_path / "out")
    assert {**MEISSONIC, "negative_prompt": PUBLISHED_NEGATIVE_PROMPT}.items() <= model.config.items()
    assert model.config["micro_conditions"] == [32, 32, 0, 0, 6]
    assert isinstance(model.text_encoder, PretrainedTextEncoder)
    expected = published(Meissonic(**MEISSONIC))
    assert torch.equal(model.get_parameter("embedder.conv.weight"), expected["embed.conv.weight"])
    check_samples(tmp_path / "out")


def test_a_published_meissonic_student(tmp_path: Path) -> None:
    root = diffusers_folder(tmp_path / "hub")
    student = tmp_path / "meissonic"
    (root / "transformer").rename(student)
    text = save_clip_text(tmp_path / "text")
    words = [f"--source={student}", "--options.grid=[2, 2]", f"--options.text_encoder={text}", "--student=true"]
    convert(["--family=meissonic", *words, f"--out={tmp_path / 'out'}"])
    generator = load_generator(tmp_path / "out")
    assert (generator.r_init, generator.noise) == (0.5, 0.3)
    noise = SampleRandom(0, range(2), device=torch.device("cpu"))
    assert generator.sample(generator.model.encode(PROMPTS), noise).shape == (2, 4)


def test_a_lone_file_has_no_text_encoder_and_no_guidance(tmp_path: Path) -> None:
    save_file(published(Meissonic(**MEISSONIC)), tmp_path / "model.safetensors")
    options = {"grid": [2, 2], "axes_dims_rope": [4, 2, 2]}
    model = Meissonic.from_checkpoint(tmp_path / "model.safetensors", **options)  # type: ignore[arg-type]
    assert model.text_encoder is None
    assert not model.has_null_condition
    with pytest.raises(ValueError, match=r"^conditions: expected a model with a text encoder, got one that takes"):
        model.encode(PROMPTS)


@pytest.mark.parametrize(
    "names", [("embeddings.weight",), ("lm_head.weight",), ("embeddings.weight", "lm_head.weight")]
)
def test_maskgen_and_its_tokenizer(names: tuple[str, ...], tmp_path: Path) -> None:
    text = save_clip_text(tmp_path / "text")
    model, tokenizer = published(MaskGen(**MASKGEN)), published(TATiTok(**TATITOK))
    table = model.pop("embeddings.weight")
    model |= {name: table.clone() for name in names}
    tokenizer["quantize.embed_prob"] = torch.zeros(8)
    torch.save(model, tmp_path / "maskgen_vq_l.bin")
    torch.save(tokenizer, tmp_path / "tatitok_bl128_vq.bin")
    options = {"decoder_num_heads": 2, "condition_num_classes": 2, "text_encoder": str(text)}
    tokenizer_options = {"encoder_heads": 2, "decoder_heads": 2, "text_encoder": str(text)}
    convert(
        [
            "--family=maskgen",
            f"--source={tmp_path / 'maskgen_vq_l.bin'}",
            f"--options={json.dumps(options)}",
            f"--tokenizer={tmp_path / 'tatitok_bl128_vq.bin'}",
            f"--tokenizer_options={json.dumps(tokenizer_options)}",
            f"--out={tmp_path / 'out'}",
        ]
    )
    opened = load_model(tmp_path / "out")
    assert MASKGEN.items() <= opened.config.items()
    assert torch.equal(opened.get_parameter("embeddings.weight"), table)
    assert TATITOK.items() <= load_tokenizer(tmp_path / "out").config.items()
    check_samples(tmp_path / "out")


def test_lone_tokenizers(tmp_path: Path) -> None:
    save_file(published(DiffusersVQ(**VQ)), tmp_path / "diffusion_pytorch_model.safetensors")
    words = ["--family=diffusers_vq", f"--source={tmp_path}", '--options={"image_size": 32, "norm_num_groups": 4}']
    convert([*words, f"--out={tmp_path / 'vq'}"])
    assert load_tokenizer(tmp_path / "vq").config == DiffusersVQ(**VQ).config
    torch.save(published(TATiTok(**TATITOK)), tmp_path / "tatitok.bin")
    options = '{"encoder_heads": 2, "decoder_heads": 2}'
    words = ["--family=tatitok", f"--source={tmp_path / 'tatitok.bin'}", f"--options={options}"]
    convert([*words, f"--out={tmp_path / 'tatitok'}"])
    assert load_tokenizer(tmp_path / "tatitok").config == TATiTok(**TATITOK).config


def test_the_published_text_encoder_is_named_and_opened_when_it_is_needed(tmp_path: Path) -> None:
    wide = {**MASKGEN, "text_embed_dim": 768}
    save_file(published(MaskGen(**wide)), tmp_path / "maskgen.safetensors")
    model = MaskGen.from_checkpoint(tmp_path / "maskgen.safetensors", decoder_num_heads=2, condition_num_classes=2)
    tatitok = {**TATITOK, "text_context_length": 77, "text_embed_dim": 768}
    save_file(published(TATiTok(**tatitok)), tmp_path / "tatitok.safetensors")
    tokenizer = TATiTok.from_checkpoint(tmp_path / "tatitok.safetensors", encoder_heads=2, decoder_heads=2)
    for text, layer in ((model.text, -2), (tokenizer.text, -1)):
        assert text is not None
        expected = {"source": "openai/clip-vit-large-patch14-336", "layer": layer, "pad_id": 0, "attend_padding": True}
        assert expected.items() <= text.config.items()
        with pytest.raises(ValueError, match=r"^text_encoder.source: expected a text model in 'openai/clip-vit"):
            text(PROMPTS)


@pytest.mark.parametrize(
    ("family", "state", "message"),
    [
        ("meissonic", lambda: MaskGen(**MASKGEN), "(a checkpoint of MaskGen)"),
        ("maskgen", lambda: Meissonic(**MEISSONIC), "(a checkpoint of Meissonic)"),
        ("maskgen", lambda: TATiTok(**TATITOK), "(a checkpoint of TA-TiTok)"),
        ("tatitok", lambda: DiffusersVQ(**VQ), "(a checkpoint of a VQModel of diffusers)"),
        ("diffusers_vq", lambda: TATiTok(**TATITOK), "(a checkpoint of TA-TiTok)"),
    ],
)
def test_a_file_of_another_family_is_named(
    family: str, state: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(published(state()), tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        convert([f"--family={family}", f"--source={tmp_path / 'model.safetensors'}", f"--out={tmp_path / 'out'}"])
    line = capsys.readouterr().err.strip()
    assert "missing, first '" in line
    assert "unexpected, first '" in line
    assert line.endswith(message)
    assert "\n" not in line


def test_published_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        parts = {
            "Meissonic": Meissonic(),
            "its tokenizer": DiffusersVQ(),
            "MaskGen-L": MaskGen(),
            "MaskGen-XL": MaskGen(decoder_embed_dim=1280, decoder_depth=20),
            "TA-TiTok": TATiTok(),
        }
    counts = {name: sum(value.numel() for value in part.parameters()) / 1e6 for name, part in parts.items()}
    expected = {"Meissonic": 1006.95, "its tokenizer": 146.24, "MaskGen-L": 604.3, "MaskGen-XL": 1176.6}
    assert counts == pytest.approx({**expected, "TA-TiTok": 391.0}, abs=0.06)
    # A tied table is in published files twice.
    assert [len(part.state_dict()) for part in parts.values()][2:] == [450, 562, 462]
