"""Published checkpoints: what is read, what is refused, and that nothing else is executed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softgen import load_generator, load_model, load_tokenizer
from softgen.checkpoints import build, converting, published_families, read_checkpoint
from softgen.convert import main as convert
from softgen.models import ImageBert, MaskBit, MaskGIT, UViTBert
from softgen.pretrained import Pretrained
from softgen.random import SampleRandom
from softgen.tokenizers import MaskBitTokenizer, MaskGITVQGAN, TamingVQGAN, TiTok, VQGANPlusTokenizer

SMALL = {"img_size": 32, "hidden_dim": 8, "codebook_size": 5, "depth": 2, "heads": 2, "mlp_dim": 12, "nclass": 3}
VQGAN: dict[str, Any] = {"image_size": 32, "n_embed": 5, "embed_dim": 4, "ch": 32, "ch_mult": [1, 1, 1, 1, 2]}
VQGAN |= {"num_res_blocks": 1, "attn_resolutions": [2], "resolution": 32, "z_channels": 6}


class Callback:
    """Stands for an object of another project that a trainer pickled."""

    executed = False

    def __init__(self) -> None:
        Callback.executed = True
        self.best = 0.5

    def __setstate__(self, state: object) -> None:
        Callback.executed = True


def small() -> MaskGIT:
    return MaskGIT(**SMALL)  # type: ignore[arg-type]


def published_names(tokenizer: TamingVQGAN) -> dict[str, Tensor]:
    return {name.replace("quantizer.", "quantize."): value for name, value in tokenizer.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("entry", [None, "model_state_dict", "state_dict"])
def test_every_layout_of_a_file_is_read(prefix: str, entry: str | None, tmp_path: Path) -> None:
    state = small().state_dict()
    content: Any = {prefix + name: value for name, value in state.items()}
    torch.save(content if entry is None else {entry: content, "iter": 7}, tmp_path / "model.pth")
    assert_same(read_checkpoint(tmp_path / "model.pth", key="model"), state)


def test_a_folder_holds_one_of_the_names(tmp_path: Path) -> None:
    state = small().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert_same(read_checkpoint(tmp_path, key="model"), state)
    with pytest.raises(ValueError, match=r"^model: expected other.bin in .*, got none of them$"):
        read_checkpoint(tmp_path, key="model", names=["other.bin"])


def test_a_checkpoint_in_parts_is_read(tmp_path: Path) -> None:
    state = small().state_dict()
    names = sorted(state)
    files = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_same(read_checkpoint(tmp_path, key="model"), state)
    assert_same(read_checkpoint(index, key="model"), state)
    (tmp_path / files[names[0]]).unlink()
    with pytest.raises(ValueError, match=rf"^model: expected {files[names[0]]} beside .*, got none$"):
        read_checkpoint(tmp_path, key="model")
    for content in ("{", "[]", '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"^model: expected an index with a weight_map, got .*$") as caught:
            read_checkpoint(tmp_path, key="model")
        assert "\n" not in str(caught.value)


def test_objects_are_refused_and_never_executed(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save({"state_dict": state, "callbacks": {"best": Callback()}}, tmp_path / "last.ckpt")
    Callback.executed = False
    with pytest.raises(
        ValueError, match=r"^model: expected a whole checkpoint of tensors alone, got .*softgen.convert"
    ):
        read_checkpoint(tmp_path / "last.ckpt", key="model")
    with converting():
        assert_same(read_checkpoint(tmp_path / "last.ckpt", key="model"), state)
    assert not Callback.executed
    with pytest.raises(ValueError, match="tensors alone"):
        read_checkpoint(tmp_path / "last.ckpt", key="model")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "text.bin"])
def test_broken_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "cut.safetensors":
        save_file(small().state_dict(), path)
    else:
        torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:200] if "cut" in name else b"not a checkpoint")
    with pytest.raises(ValueError, match=r"^model: expected a whole") as caught:
        read_checkpoint(path, key="model")
    assert "\n" not in str(caught.value)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^model: expected a file of .safetensors, .bin, .pth, .pt, .ckpt, got"):
        read_checkpoint(tmp_path / "weights.npz", key="model")
    with pytest.raises(ValueError, match=r"^model: expected a folder or a hub id"):
        read_checkpoint(tmp_path / "missing.pth", key="model")
    with pytest.raises(ValueError, match=r"^model: expected a folder or a reachable hub id, got 'someone/something'"):
        read_checkpoint("someone/something", key="model")


def test_a_module_takes_the_tensors_without_copying_them() -> None:
    state = small().state_dict()
    model = build(MaskGIT, SMALL, state, key="model")
    assert model.pos_emb.data_ptr() == state["pos_emb"].data_ptr()
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    half = build(MaskGIT, SMALL, state, key="model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


class Drawn(Pretrained):
    """Weights of every way to draw them, and a buffer that is computed and in no checkpoint."""

    places: Tensor

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.table = nn.Embedding(width, 2)
        nn.init.trunc_normal_(self.table.weight, std=0.02)
        self.row = nn.Parameter(torch.randn(1, 3) * 3**-0.5)
        self.column = nn.Parameter(torch.rand(3, 1, generator=torch.Generator()))
        self.register_buffer("places", 2.0 * (torch.arange(4) & 1) - 1.0, persistent=False)


class Log(TorchDispatchMode):
    """The operations that reach a device, and how many numbers they make there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, Tensor) and not out.is_meta:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_weights_are_neither_drawn_nor_allocated_and_buffers_are_computed() -> None:
    state = Drawn(width=1000).state_dict()
    before = torch.get_rng_state()
    with Log() as log:
        module = build(Drawn, {"width": 1000}, state, key="model")
    assert not {name for name in log.names if name.startswith(("normal", "uniform", "rand", "erfinv"))}
    assert log.largest <= 64
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(module.state_dict(), state)
    assert module.layer.weight.data_ptr() == state["layer.weight"].data_ptr()
    assert module.places.tolist() == [-1, 1, -1, 1]
    with pytest.raises(ValueError, match=r"'layer.weight' of shape \(2, 1000\) instead of \(2, 1099511627776\)"):
        build(Drawn, {"width": 2**40}, state, key="model")


def test_names_and_shapes_are_checked_both_ways() -> None:
    state = small().state_dict()
    without = {name: value for name, value in state.items() if name != "pos_emb"}
    with pytest.raises(ValueError, match=r"^model: .* 1 missing, first 'pos_emb'"):
        build(MaskGIT, SMALL, without, key="model")
    with pytest.raises(ValueError, match=r"1 unexpected, first 'loss.weight'"):
        build(MaskGIT, SMALL, {**state, "loss.weight": torch.zeros(1)}, key="model")
    build(MaskGIT, SMALL, {**state, "loss.weight": torch.zeros(1)}, key="model", dropped=["loss."])
    with pytest.raises(ValueError, match=r"'pos_emb' of shape \(2,\) instead of \(1, 5, 8\)"):
        build(MaskGIT, SMALL, {**state, "pos_emb": torch.zeros(2)}, key="model")


def test_the_family_of_a_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "maskgit.safetensors")
    with pytest.raises(ValueError, match=r"^tokenizer: .*missing.*unexpected.*\(a checkpoint of MaskGIT\)$"):
        TamingVQGAN.from_checkpoint(tmp_path / "maskgit.safetensors")
    save_file(published_names(TamingVQGAN(**VQGAN)), tmp_path / "vqgan.safetensors")
    with pytest.raises(ValueError, match=r"^model: .*\(a checkpoint of the Taming VQGAN\)$"):
        MaskGIT.from_checkpoint(tmp_path / "vqgan.safetensors")


def test_convert_writes_a_folder_that_every_stage_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = small(), TamingVQGAN(**VQGAN)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "MaskGIT_ImageNet_256.pth")
    lightning = {"state_dict": {**published_names(tokenizer), "loss.logvar": torch.zeros(1)}, "callbacks": Callback()}
    torch.save(lightning, tmp_path / "last.ckpt")
    convert(
        [
            "--family=maskgit",
            f"--source={tmp_path / 'MaskGIT_ImageNet_256.pth'}",
            '--options={"heads": 2, "nclass": 3}',
            f"--tokenizer={tmp_path / 'last.ckpt'}",
            '--tokenizer_options={"image_size": 32}',
            f"--out={tmp_path / 'out'}",
        ]
    )
    assert "MaskGIT" in capsys.readouterr().out
    opened = load_model(tmp_path / "out")
    assert opened.config == model.config
    assert_same(opened.state_dict(), model.state_dict())
    assert_same(load_tokenizer(tmp_path / "out").state_dict(), tokenizer.state_dict())


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("maskgit", (MaskGIT, TamingVQGAN)),
        ("maskbit", (MaskBit, MaskBitTokenizer)),
        ("imagebert", (ImageBert, TiTok)),
        ("uvitbert", (UViTBert, TiTok)),
        ("taming_vqgan", (TamingVQGAN, None)),
        ("maskgit_vqgan", (MaskGITVQGAN, None)),
        ("titok", (TiTok, None)),
        ("vqgan_plus", (VQGANPlusTokenizer, None)),
    ],
)
def test_families_have_names(name: str, classes: tuple[type, type | None]) -> None:
    assert published_families(name) == classes


def test_convert_opens_the_tokenizer_for_the_models_images(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "model.pth")
    torch.save(published_names(TamingVQGAN(**VQGAN)), tmp_path / "last.ckpt")
    words = ["--family=maskgit", f"--source={tmp_path / 'model.pth'}", '--options={"heads": 2, "nclass": 3}']
    convert([*words, f"--tokenizer={tmp_path / 'last.ckpt'}", f"--out={tmp_path / 'out'}"])  # 32 pixels, and not 256
    assert load_tokenizer(tmp_path / "out").image_size == 32
    bits = MaskBit(bits=4, codebook_splits=4, img_size=32, hidden_dim=8, depth=1, heads=2, mlp_dim=8, nclass=3)
    codes = MaskBitTokenizer(
        image_size=32, bits=4, codebook_splits=4, hidden_channels=32, channel_mult=[1] * 5, num_res_blocks=1
    )
    save_file(bits.state_dict(), tmp_path / "bits.safetensors")
    save_file(codes.state_dict(), tmp_path / "codes.safetensors")
    words = ["--family=maskbit", f"--source={tmp_path / 'bits.safetensors'}"]
    options = ['--options={"codebook_splits": 4, "img_size": 32, "heads": 2, "nclass": 3}']
    convert([*words, *options, f"--tokenizer={tmp_path / 'codes.safetensors'}", f"--out={tmp_path / 'bits'}"])
    opened = load_tokenizer(tmp_path / "bits")
    assert (opened.image_size, opened.num_sites) == (32, bits.num_sites)


def test_a_tokenizer_of_other_codes_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(small().state_dict(), tmp_path / "model.pth")
    torch.save(published_names(TamingVQGAN(**{**VQGAN, "n_embed": 6})), tmp_path / "last.ckpt")
    words = ["--family=maskgit", f"--source={tmp_path / 'model.pth'}", '--options={"heads": 2, "nclass": 3}']
    with pytest.raises(SystemExit):
        convert([*words, f"--tokenizer={tmp_path / 'last.ckpt'}", f"--out={tmp_path / 'out'}"])
    assert "tokenizer.num_codes: expected 5 as the model has, got 6" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_before_torch_1_6_are_read(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save(state, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "model.pth", key="model"), state)


def test_convert_writes_a_lone_tokenizer(tmp_path: Path) -> None:
    tokenizer = VQGANPlusTokenizer(
        image_size=8, codebook_size=5, token_size=4, hidden_channels=32, channel_mult=[1, 1], num_res_blocks=1
    )
    state = {name.replace("quantizer.", "quantize."): value for name, value in tokenizer.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    words = ["--family=vqgan_plus", f"--source={tmp_path}", '--options={"image_size": 8}', f"--out={tmp_path / 'out'}"]
    convert(words)
    assert_same(load_tokenizer(tmp_path / "out").state_dict(), tokenizer.state_dict())


def test_convert_writes_a_student(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "pytorch_model.bin")
    words = ["--family=maskgit", f"--source={tmp_path}", '--options={"heads": 2, "nclass": 3}', "--student=true"]
    convert([*words, f"--out={tmp_path / 'out'}", "--r_init=0.5"])
    generator = load_generator(tmp_path / "out")
    assert (generator.r_init, generator.noise) == (0.5, 0.1)
    condition = generator.model.encode(torch.tensor([0, 1]))
    assert generator.sample(condition, SampleRandom(0, range(2), device=torch.device("cpu"))).shape == (2, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--family=gan", "--source=x"], "family: expected one of diffusers_vq, imagebert, "),
        (["--family=maskgit", "--source=x"], "source: expected a folder or a hub id"),
        (["--family=taming_vqgan", "--source=x", "--tokenizer=y"], "tokenizer: expected none with taming_vqgan"),
        (["--family=maskgit", "--source=x", "--r_init=0.5"], "r_init: expected student true to go with it, got 0.5"),
        (["--family=maskgit", "--source=x", "--noise=0"], "noise: expected student true to go with it, got 0.0"),
        (
            ["--family=maskgit", "--source=x", '--tokenizer_options={"image_size": 8}'],
            "tokenizer_options: expected a tokenizer to go with them, got image_size",
        ),
    ],
)
def test_convert_refuses_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        convert([*words, f"--out={tmp_path / 'out'}"])
    assert capsys.readouterr().err.startswith(f"softgen.convert: error: {message}")
    assert not (tmp_path / "out").exists()
