import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softgen.data import Digits, ImageDataModule, TensorSource, TokenCache, TrainVal, write_token_cache


class RowTokenizer(nn.Module):
    """Eight tokens an image: the sum of each row of pixels, times a weight."""

    num_sites = 8

    def __init__(self, *, num_codes: int = 200, scale: float = 16.0) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.scale = nn.Parameter(torch.tensor(scale))
        self.modes: set[bool] = set()

    def encode(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        return (images[:, 0].sum(dim=-1) * self.scale).round().long()


class Unlabelled(ImageDataModule):
    image_size = 8
    num_classes = 0

    def load_sources(self) -> TrainVal:
        return TrainVal(train=TensorSource(torch.ones(5, 8, 8)), val=TensorSource(torch.zeros(2, 8, 8)))


def test_a_cache_gives_what_the_tokenizer_gives(tmp_path: Path) -> None:
    data, tokenizer, folder = Digits(), RowTokenizer(), tmp_path / "deep" / "cache"
    write_token_cache(folder, tokenizer, data, batch_size=500, progress=False)
    cache = TokenCache(folder)
    cache.setup("fit")
    assert (cache.num_sites, cache.num_codes, cache.image_size, cache.num_classes) == (8, 200, 8, 10)
    pairs = [(cache.train_source(), data.train_source()), (cache.val_source(), data.val_source())]
    for cached, source in pairs:
        assert len(cached) == len(source)
        indices = [len(source) - 1, 0, 7]
        batch, images = cached.fetch(indices), source.fetch(indices)
        assert batch["token"].dtype == torch.int64
        assert torch.equal(batch["token"], tokenizer.encode(images["image"]))
        assert torch.equal(batch["label"], images["label"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json",
        "train_labels.npy",
        "train_tokens.npy",
        "val_labels.npy",
        "val_tokens.npy",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["cache"]


def test_tokens_are_mapped_and_small(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "cache", RowTokenizer(), Unlabelled(), progress=False)
    tokens = TokenCache(tmp_path / "cache").train_source().tokens  # type: ignore[attr-defined]
    assert isinstance(tokens, np.memmap)
    assert (tokens.dtype, tokens.shape) == (np.uint16, (5, 8))


@pytest.mark.parametrize(("num_codes", "dtype"), [(65_536, "uint16"), (65_537, "int32")])
def test_the_dtype_holds_the_largest_code(num_codes: int, dtype: str, tmp_path: Path) -> None:
    tokenizer = RowTokenizer(num_codes=num_codes, scale=(num_codes - 1) / 8)
    write_token_cache(tmp_path / "cache", tokenizer, Unlabelled(), progress=False)
    source = TokenCache(tmp_path / "cache").train_source()
    assert source.tokens.dtype == np.dtype(dtype)  # type: ignore[attr-defined]
    assert source.fetch([0])["token"].tolist() == [[num_codes - 1] * 8]


def test_data_without_labels(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "cache", RowTokenizer(), Unlabelled(), progress=False)
    cache = TokenCache(tmp_path / "cache", batch_size=5)
    assert cache.num_classes == 0
    batch = next(iter(cache.train_dataloader()))
    assert set(batch) == {"ordinal", "index", "token"}
    assert not (tmp_path / "cache" / "train_labels.npy").exists()


def test_a_pickled_source_maps_the_files_anew(tmp_path: Path) -> None:
    write_token_cache(tmp_path / "cache", RowTokenizer(), Digits(), progress=False)
    source = TokenCache(tmp_path / "cache").train_source()
    content = pickle.dumps(source)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content).fetch([3])["token"], source.fetch([3])["token"])


def test_the_tokenizer_is_used_in_eval_mode_and_restored(tmp_path: Path) -> None:
    tokenizer = RowTokenizer().train()
    write_token_cache(tmp_path / "cache", tokenizer, Unlabelled(), progress=False)
    assert tokenizer.modes == {False}
    assert tokenizer.training


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    prints = []
    for scale in (1.0, 1.0, 2.0):
        write_token_cache(tmp_path / "cache", RowTokenizer(scale=scale), Unlabelled(), progress=False)
        prints.append(TokenCache(tmp_path / "cache").tokenizer_fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_failure_leaves_the_old_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write_token_cache(folder, RowTokenizer(), Unlabelled(), progress=False)
    before = TokenCache(folder).train_source().fetch([0])["token"]
    with pytest.raises(ValueError, match=r"^tokenizer: expected tokens from 0 to 9, got 128 to 128$"):
        write_token_cache(folder, RowTokenizer(num_codes=10), Unlabelled(), progress=False)
    assert torch.equal(TokenCache(folder).train_source().fetch([0])["token"], before)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_tokens_of_another_shape_are_refused(tmp_path: Path) -> None:
    tokenizer = RowTokenizer()
    tokenizer.num_sites = 9
    with pytest.raises(ValueError, match=r"^tokenizer: expected tokens of shape \(5, 9\), got \(5, 8\)$"):
        write_token_cache(tmp_path / "cache", tokenizer, Unlabelled(), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=f"^data.root: expected a token cache, got '{tmp_path}'"):
        write_token_cache(tmp_path, RowTokenizer(), Unlabelled(), progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^data.root: expected a token cache, got '{tmp_path}/no'") as error:
        TokenCache(tmp_path / "no")
    assert "\n" not in str(error.value)
    (tmp_path / "meta.json").write_text(json.dumps({"num_sites": 3}))
    message = f"data.root: expected a token cache, got '{tmp_path}', whose meta.json is of another kind"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TokenCache(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=f"^data.root: expected a token cache, got '{tmp_path}'"):
        TokenCache(tmp_path)


def test_truncated_and_exchanged_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write_token_cache(folder, RowTokenizer(), Unlabelled(), progress=False)
    path = folder / "train_tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"^data.root: expected a whole token cache, got '{path}'"):
        TokenCache(folder).setup("fit")
    path.write_bytes((folder / "val_tokens.npy").read_bytes())
    with pytest.raises(ValueError, match=rf"^{path}: expected uint16 of shape \(5, 8\), got uint16 of shape \(2, 8\)$"):
        TokenCache(folder).setup("fit")
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match=f"^data.root: expected a whole token cache, got '{path}'"):
        TokenCache(folder).setup("fit")
