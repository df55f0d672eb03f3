import json
import re
import sys
from pathlib import Path

import pytest

from softgen.data import Prompts
from softgen.data.prompts import read_prompts


def text(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def jsonl(path: Path, *rows: object) -> Path:
    return text(path, *(row if isinstance(row, str) else json.dumps(row) for row in rows))


def refused(message: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa cat\r\n\n  ein Käfer, grün \n   \n猫\n{not json}".encode())
    assert read_prompts(path) == ["a cat", "ein Käfer, grün", "猫", "{not json}"]


def test_a_jsonl_file_has_an_object_a_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": " a cat "}, "", {"prompt": "a\ndog", "n": 3}, {"prompt": "  "})
    assert read_prompts(path) == ["a cat", "a\ndog"]
    other = jsonl(tmp_path / "b.jsonl", {"text": "a cat", "prompt": 1})
    assert read_prompts(other, key="text") == ["a cat"]


def test_a_parquet_file_has_a_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"prompt": ["a cat", None, "", " a dog"], "n": [1, 2, 3, 4]})
    parquet.write_table(table, path)
    assert read_prompts(path) == ["a cat", "a dog"]
    parquet.write_table(table.cast(pyarrow.schema([("prompt", pyarrow.large_string()), ("n", pyarrow.int8())])), path)
    assert read_prompts(path) == ["a cat", "a dog"]
    with refused(f"data.paths: '{path}': expected the column 'text' (data.key), got 'prompt', 'n'"):
        read_prompts(path, key="text")
    with refused(f"data.paths: '{path}': expected text in the column 'n', got int8"):
        read_prompts(path, key="n")
    path.write_bytes(b"PAR1 no parquet at all PAR1")
    with pytest.raises(ValueError, match=f"^data.paths: expected a Parquet file, got '{path}' \\(.+\\)$"):
        read_prompts(path)


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    message = f"data.paths: expected pyarrow for '{path}', got no such package: pip install pyarrow"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        read_prompts(path)


def test_the_last_prompts_are_held_out(tmp_path: Path) -> None:
    path = text(tmp_path / "a.txt", *(f"prompt {i}" for i in range(10)))
    data = Prompts(path, val_samples=3, batch_size=2, image_size=32)
    assert (data.has_images, data.has_prompts, data.num_classes, data.image_size) == (False, True, 0, 32)
    train, val = data.train_source(), data.val_source()
    assert train.fetch(range(7)) == {"prompt": [f"prompt {i}" for i in range(7)]}
    assert val.fetch([2, 0]) == {"prompt": ["prompt 9", "prompt 7"]}
    seen = list(data.train_dataloader())
    assert [set(batch) for batch in seen] == [{"ordinal", "index", "prompt"}] * 3
    prompts = [prompt for batch in seen for prompt in batch["prompt"]]
    assert len(set(prompts)) == 6
    assert set(prompts) < {f"prompt {i}" for i in range(7)}


def test_shards_are_taken_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    text(folder / "b.txt", "3", "4")
    jsonl(folder / "a.jsonl", {"prompt": "1"}, {"prompt": "2"})
    text(folder / ".hidden.txt", "x")
    text(folder / "notes.md", "x")
    last = text(tmp_path / "last.TXT", "5")
    for paths in (folder, str(folder)):
        assert Prompts(paths, val_samples=1).train_source().fetch(range(3))["prompt"] == ["1", "2", "3"]
    data = Prompts([last, str(folder)], val_samples=1)
    assert data.train_source().fetch(range(4))["prompt"] == ["5", "1", "2", "3"]


def test_paths_are_checked_at_once(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    with refused(f"data.paths: expected a file or folder, got '{missing}', which does not exist"):
        Prompts(missing)
    with refused(f"data.paths: expected a folder with files of prompts (.txt, .jsonl, .parquet), got '{tmp_path}'"):
        Prompts(tmp_path)
    other = text(tmp_path / "prompts.csv", "a")
    with refused(f"data.paths: expected one of .txt, .jsonl, .parquet, got '{other}'"):
        Prompts(other)
    with refused("data.paths: expected at least one file, got an empty list"):
        Prompts([])


def test_numbers_are_checked(tmp_path: Path) -> None:
    path = text(tmp_path / "a.txt", "a", "b")
    with refused("data.val_samples: expected at least 1, got 0"):
        Prompts(path, val_samples=0)
    with refused("data.image_size: expected at least 0, got -1"):
        Prompts(path, image_size=-1)
    with refused("data.val_samples: expected less than the number of prompts (2), got 2"):
        Prompts(path, val_samples=2).setup("fit")


def test_files_without_a_prompt_are_refused(tmp_path: Path) -> None:
    empty, blank = text(tmp_path / "a.txt"), text(tmp_path / "b.txt", "", "  ")
    with refused(f"data.paths: expected at least one prompt, got none in '{empty}'"):
        Prompts(empty).setup("fit")
    with refused(f"data.paths: expected at least one prompt, got none in '{empty}' and 1 more"):
        Prompts([empty, blank]).setup("fit")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a", "n": 1}, "expected the key 'prompt' (data.key), got 'text', 'n'"),
        ({}, "expected the key 'prompt' (data.key), got none"),
        ({"prompt": 3}, "expected text under 'prompt', got int"),
        ({"prompt": None}, "expected text under 'prompt', got NoneType"),
        (["a"], "expected a JSON object, got list"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, reason: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, "", row)
    with refused(f"data.paths: '{path}', line 3: {reason}"):
        Prompts(path).setup("fit")


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, "{")
    with pytest.raises(ValueError, match=f"^data.paths: '{path}', line 2: expected a JSON object \\(.+\\)$"):
        Prompts(path).setup("fit")
    path = tmp_path / "b.txt"
    path.write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(ValueError, match=f"^data.paths: expected text in UTF-8, got '{path}' \\(.+\\)$"):
        Prompts(path).setup("fit")
