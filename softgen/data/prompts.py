"""Prompts without images, for distillation that needs no data."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from softgen.data.base import ImageDataModule, TrainVal

PROMPT_SUFFIXES = (".txt", ".jsonl", ".parquet")

_KEYS = {"data.paths": " (data.key)"}
"""By which setting the key is chosen, by the option that names the file."""


class PromptSource:
    """Prompts held in memory.

    Args:
        prompts: n strings.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def fetch(self, indices: Sequence[int]) -> dict[str, list[str]]:
        """`prompt`, B strings."""
        return {"prompt": [self.prompts[index] for index in indices]}


class Prompts(ImageDataModule):
    """Nothing but prompts, from one file or from many.

    Files are `.txt` (one prompt a line), `.jsonl` (an object a line) or `.parquet` (needs `pip install pyarrow`), in
    UTF-8. Prompts are stripped, blank ones are skipped, and repeated ones stay. Every process holds all of them in
    memory and takes its own share of each global batch.

    Args:
        paths: A file, a folder of such files (taken in the order of their names), or a list of either.
        key: Key of the prompt in `.jsonl`, its column in `.parquet`.
        image_size: Height and width of the images that the prompts stand for, in pixels; 0 where nobody asks.
        val_samples: How many prompts at the end are held out, at least 1.
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 is best here.
        seed: Seed of the order of samples.

    Raises:
        ValueError: An argument is out of range, or there is no such file; at setup: a file that is no text, a missing
            key or column, or too few prompts.
        ImportError: At setup, a `.parquet` file without pyarrow.
    """

    has_images = False
    has_prompts = True
    num_classes = 0

    def __init__(
        self,
        paths: str | Path | list[str | Path],
        *,
        key: str = "prompt",
        image_size: int = 0,
        val_samples: int = 100,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if val_samples < 1:
            raise ValueError(f"data.val_samples: expected at least 1, got {val_samples}")
        if image_size < 0:
            raise ValueError(f"data.image_size: expected at least 0, got {image_size}")
        given = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.files = [file for path in given for file in _files(Path(path))]
        if not self.files:
            raise ValueError("data.paths: expected at least one file, got an empty list")
        self.key = key
        self.image_size = image_size
        self.val_samples = val_samples

    def load_sources(self) -> TrainVal:
        """All prompts but the last `val_samples`, and those."""
        prompts = [prompt for file in self.files for prompt in read_prompts(file, key=self.key)]
        if not prompts:
            raise ValueError(f"data.paths: expected at least one prompt, got none in '{self.files[0]}'{self._others()}")
        if len(prompts) <= self.val_samples:
            raise ValueError(
                f"data.val_samples: expected less than the number of prompts ({len(prompts)}), got {self.val_samples}"
            )
        cut = len(prompts) - self.val_samples
        return TrainVal(train=PromptSource(prompts[:cut]), val=PromptSource(prompts[cut:]))

    def _others(self) -> str:
        return f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""


def _files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder."""
    kinds = ", ".join(PROMPT_SUFFIXES)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if _is_prompts(file) and not file.name.startswith("."))
        if not found:
            raise ValueError(f"data.paths: expected a folder with files of prompts ({kinds}), got '{path}'")
        return found
    if not path.is_file():
        raise ValueError(f"data.paths: expected a file or folder, got '{path}', which does not exist")
    if not _is_prompts(path):
        raise ValueError(f"data.paths: expected one of {kinds}, got '{path}'")
    return [path]


def _is_prompts(path: Path) -> bool:
    return path.suffix.lower() in PROMPT_SUFFIXES and path.is_file()


def read_prompts(path: Path, *, key: str = "prompt", option: str = "data.paths") -> list[str]:
    """The prompts of one file, stripped, without blank ones.

    Args:
        path: A `.txt`, `.jsonl` or `.parquet` file.
        key: Key of the prompt in `.jsonl`, its column in `.parquet`.
        option: What named the file, for error messages.

    Raises:
        ValueError: The file is none of these or cannot be read, or a key is missing or holds something else than text.
        ImportError: A `.parquet` file without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in PROMPT_SUFFIXES:
        raise ValueError(f"{option}: expected one of {', '.join(PROMPT_SUFFIXES)}, got '{path}'")
    if suffix == ".parquet":
        found = _read_parquet(path, column=key, option=option)
    elif suffix == ".jsonl":
        found = list(_read_jsonl(path, key=key, option=option))
    else:
        found = [text for _, text in _lines(path, option=option)]
    return [prompt for prompt in map(str.strip, found) if prompt]


def _lines(path: Path, *, option: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}: expected text in UTF-8, got '{path}' ({error})") from error


def _read_jsonl(path: Path, *, key: str, option: str) -> Iterator[str]:
    for number, line in _lines(path, option=option):
        where = f"{option}: '{path}', line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        if key not in row:
            raise ValueError(f"{where}: expected the key '{key}'{_KEYS.get(option, '')}, got {_names(row)}")
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: expected text under '{key}', got {type(row[key]).__name__}")
        yield row[key]


def _read_parquet(path: Path, *, column: str, option: str) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        message = f"{option}: expected pyarrow for '{path}', got no such package: pip install pyarrow"
        raise ImportError(message) from error
    try:
        schema = parquet.read_schema(path)
        if column not in schema.names:
            raise ValueError(
                f"{option}: '{path}': expected the column '{column}'{_KEYS.get(option, '')}, got {_names(schema.names)}"
            )
        kind = schema.field(column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f"{option}: '{path}': expected text in the column '{column}', got {kind}")
        values = parquet.read_table(path, columns=[column])[column].to_pylist()
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{option}: expected a Parquet file, got '{path}' ({reason})") from error
    return [value for value in values if value is not None]


def _names(keys: Sequence[str] | dict[str, object]) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "none"
