import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softgen.loading import check_compatible, load_generator, load_model, load_tokenizer
from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.pretrained import Pretrained, check_keys, fingerprint
from softgen.testing import ToyMaskedModel, ToyTokenizer
from softgen.tokenizers import ConvVQTokenizer

K, N = 3, 4


def model(seed: int = 0) -> MaskedTransformer:
    torch.manual_seed(seed)
    return MaskedTransformer(num_codes=K, num_sites=N, num_classes=2, width=8, depth=1, heads=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "model"
    model().save_pretrained(folder, tokenizer=ToyTokenizer(num_codes=K))
    return folder


def one_line(call: Callable[[], object], key: str) -> str:
    with pytest.raises(ValueError, match=f"^{key}") as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_folder_holds_config_weights_and_the_tokenizer(saved: Path) -> None:
    names = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    inner = ["tokenizer/config.json", "tokenizer/model.safetensors"]
    assert names == ["config.json", "model.safetensors", *inner]
    assert torch.equal(load_tokenizer(saved).codebook, ToyTokenizer(num_codes=K).codebook)
    assert torch.equal(load_tokenizer(saved / "tokenizer").codebook, ToyTokenizer(num_codes=K).codebook)
    assert fingerprint(load_model(saved)) == fingerprint(model())


def test_saving_again_replaces_the_folder_and_leaves_nothing_behind(saved: Path) -> None:
    model(seed=1).save_pretrained(saved)
    assert fingerprint(load_model(str(saved))) == fingerprint(model(seed=1))
    assert not (saved / "tokenizer").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_folder(saved: Path) -> None:
    broken = model(seed=1)
    broken.config["width"] = object()  # not JSON
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save_pretrained(saved)
    assert fingerprint(load_model(saved)) == fingerprint(model())
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("config", [None, '{"architectures": ["CLIPModel"]}', "no JSON"])
def test_something_else_is_not_overwritten(tmp_path: Path, config: str | None) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.png").write_text("x")
    if config is not None:
        (folder / "config.json").write_text(config)
    message = one_line(lambda: model().save_pretrained(folder), "save_pretrained")
    assert message == f"save_pretrained: expected {folder} to be new or a saved module, got something else"
    assert (folder / "cat.png").exists()


def test_a_generator_comes_back_with_the_tokenizer_of_its_folder(tmp_path: Path) -> None:
    student, tokenizer = OneStepGenerator(model()), ToyTokenizer(num_codes=K)
    student.save_pretrained(tmp_path / "student", tokenizer=tokenizer)
    assert fingerprint(load_generator(tmp_path / "student")) == fingerprint(student)
    assert isinstance(load_tokenizer(tmp_path / "student"), ToyTokenizer)


def test_a_missing_folder(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere"
    message = one_line(lambda: load_model(str(folder), key="model.teacher"), "model.teacher")
    assert message == f"model.teacher: expected a folder or a hub id 'owner/name', got '{folder}'"


def test_a_hub_id_that_cannot_be_reached() -> None:
    message = one_line(lambda: load_model("nobody/nothing", key="model.teacher"), "model.teacher")
    start = "model.teacher: expected a folder or a reachable hub id, got 'nobody/nothing' ("
    assert message.startswith(start)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    message = one_line(lambda: load_model(tmp_path, key="teacher"), "teacher")
    assert message == f"teacher: expected a folder with config.json, got {tmp_path} without one"


def test_truncated_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = one_line(lambda: load_model(saved, key="model.teacher"), "model.teacher")
    assert message.startswith(f"model.teacher: expected a whole safetensors file, got {path} (")
    path.write_bytes(b"")
    one_line(lambda: load_model(saved, key="model.teacher"), "model.teacher: expected a whole safetensors file")
    path.unlink()
    message = one_line(lambda: load_model(saved, key="model.teacher"), "model.teacher")
    assert message == f"model.teacher: expected weights in {path}, got no such file"


def test_damaged_configs(saved: Path) -> None:
    path = saved / "config.json"
    for content in (path.read_bytes()[:20], b"\xff\xfe\x00", b""):
        path.write_bytes(content)
        message = one_line(lambda: load_model(saved, key="teacher"), "teacher")
        assert message.startswith(f"teacher: expected valid JSON in {path}, got ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"class_path": "json.JSONDecoder"}, "expected the class_path of a softgen module, got 'json.JSONDecoder'"),
        ({"class_path": "no.such.Thing"}, "expected an importable class_path, got 'no.such.Thing'"),
        ({"class_path": ".relative.Thing"}, "expected an importable class_path, got '.relative.Thing'"),
        ({"class_path": "Thing"}, "expected an importable class_path, got 'Thing'"),
        ({"init_args": [1]}, "expected init_args to be a mapping, got a list"),
        ({"init_args": {"hidden_size": 3}}, "expected the arguments of MaskedTransformer, got "),
    ],
)
def test_foreign_configs(saved: Path, changes: dict[str, object], expected: str) -> None:
    rewrite(saved, **changes)
    message = one_line(lambda: load_model(saved, key="teacher"), "teacher")
    assert message.startswith(f"teacher ({saved / 'config.json'}): {expected}")


def test_a_config_of_another_project(saved: Path) -> None:
    (saved / "config.json").write_text('{"architectures": ["BertModel"]}')
    message = one_line(lambda: load_model(saved, key="teacher"), "teacher")
    expected = f"teacher: expected {saved / 'config.json'} to name a class_path, got a config of another project"
    assert message == expected


def test_a_module_of_another_class(saved: Path) -> None:
    message = one_line(lambda: load_generator(saved, key="student"), "student")
    assert message == f"student: expected a OneStepGenerator in {saved}, got a MaskedTransformer"
    message = one_line(lambda: load_model(saved / "tokenizer"), "model")
    assert message == f"model: expected a MaskedDiffusionModel in {saved / 'tokenizer'}, got a ToyTokenizer"
    message = one_line(lambda: ToyMaskedModel.from_pretrained(saved), "path")
    assert message == f"path: expected a ToyMaskedModel in {saved}, got a MaskedTransformer"


def test_weights_of_another_model(saved: Path) -> None:
    path = saved / "model.safetensors"
    weights = load_file(path)
    weights["extra"] = torch.zeros(1)
    weights["head.bias"] = torch.zeros(K + 1)
    del weights["position"]
    save_file(weights, path)
    message = one_line(lambda: load_model(saved, key="teacher"), "teacher")
    assert message == (
        f"teacher ({path}): expected the tensors of this model, got 1 missing, first 'position'; "
        f"1 unexpected, first 'extra'; 'head.bias' of shape (4,) instead of (3,)"
    )
    check_keys({"a": torch.zeros(2)}, {"a": torch.ones(2)}, key="same")


def test_codes_that_do_not_fit_the_model() -> None:
    check_compatible(model(), ToyTokenizer(num_codes=K))
    message = one_line(lambda: check_compatible(model(), ToyTokenizer(num_codes=K + 1)), "tokenizer")
    assert message == "tokenizer.num_codes: expected 3 as the model has, got 4"
    message = one_line(lambda: check_compatible(model(), ToyTokenizer(num_codes=K, grid=3), key="t"), "t")
    assert message == "t.num_sites: expected 4 as the model has, got 9"


def test_the_fingerprint_sees_every_value_and_nothing_else() -> None:
    one, other = model(), model()
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    assert fingerprint(one) != fingerprint(other)


def test_the_fingerprint_sees_settings_that_no_weight_shows() -> None:
    small, large = (ConvVQTokenizer(image_size=size, num_codes=4, channels=[2, 2]) for size in (8, 16))
    large.load_state_dict(small.state_dict())
    assert fingerprint(small) != fingerprint(large)
    assert fingerprint(nn.ModuleList([small])) == fingerprint(nn.ModuleList([large]))  # the weights alone


class Derived(Pretrained):
    """Holds what no checkpoint does: a buffer outside the state dict, and a plain tensor."""

    ramp: Tensor

    def __init__(self, *, size: int = 3, plain: bool = False) -> None:
        super().__init__()
        self.config = {"size": size, "plain": plain}
        self.weight = nn.Parameter(torch.randn(size))
        self.held = nn.Parameter(torch.randn(size), requires_grad=False)
        self.register_buffer("ramp", torch.arange(size), persistent=False)
        self.steps = torch.arange(size) if plain else None


class Restoring(Derived):
    def restore_buffers(self) -> None:
        self.ramp = torch.arange(len(self.weight))


@pytest.mark.parametrize("cls", [Derived, Restoring])
@pytest.mark.parametrize("plain", [False, True])
def test_what_no_checkpoint_holds_is_there_after_opening(cls: type[Derived], plain: bool, tmp_path: Path) -> None:
    module = cls(plain=plain)
    module.save_pretrained(tmp_path / "model")
    opened = cls.from_pretrained(tmp_path / "model")
    assert torch.equal(opened.ramp, torch.arange(3))
    assert torch.equal(opened.weight, module.weight)
    assert (opened.weight.requires_grad, opened.held.requires_grad) == (True, False)
    assert opened.steps is None or torch.equal(opened.steps, torch.arange(3))


def test_opening_draws_no_random_numbers(tmp_path: Path) -> None:
    Restoring().save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    Restoring.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
