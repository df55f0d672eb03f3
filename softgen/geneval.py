"""Images for the official GenEval evaluator, and its results (Ghosh et al. 2023, arXiv 2310.11513).

The evaluator needs a detector that does not belong into this environment, so it runs elsewhere: `write_geneval` lays
the images out as it reads them, and `read_geneval_results` reads what it writes.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from softgen.data.scenes import TASKS
from softgen.images import save_image

MARK = "softgen.json"
"""The file that says of what a folder is, and whether it is complete. The evaluator looks at numbered folders only."""

_FORMAT = "softgen-geneval-1"
_SCRATCH = re.compile(r"\.(\d{5,}|softgen\.json)\.\w+")
_RESULT_FILE = re.compile(r"(?:^|[/\\])(\d+)[/\\]samples[/\\](\d+)\.png$")


@dataclass(frozen=True)
class GenEvalScores:
    """What the evaluator found.

    Attributes:
        tasks: Share of correct images of each task, in [0, 1].
        overall: Mean over the tasks, with equal weights.
        num_images: Images that were judged.
    """

    tasks: dict[str, float]
    overall: float
    num_images: int

    @property
    def table(self) -> dict[str, float]:
        """The tasks and `overall`, with the keys of `softgen.metrics.ShapesGenEval`."""
        return {**self.tasks, "overall": self.overall}


def read_geneval_metadata(path: str | Path) -> list[dict[str, Any]]:
    """The rows of GenEval's `evaluation_metadata.jsonl`, each with `tag`, `include`, `prompt` and what else it has.

    Raises:
        ValueError: The file cannot be read, is empty, or a row lacks one of the three; the line is named.
    """
    rows = []
    for line, row in _json_lines(Path(path)):
        for key, kind in (("tag", str), ("prompt", str), ("include", list)):
            if not isinstance(row.get(key), kind):
                raise ValueError(f"'{path}', line {line}: expected '{key}' ({kind.__name__}), got {row.get(key)!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"'{path}': expected at least one row, got none")
    return rows


def write_geneval(
    folder: str | Path,
    metadata: Sequence[Mapping[str, Any]],
    images_of: Callable[[int, str], Tensor],
    *,
    source: str,
    samples: int = 4,
) -> None:
    """Write the images of every prompt as `00000/metadata.jsonl`, `00000/samples/0000.png` and so on.

    A prompt's folder appears whole or not at all. A call that was interrupted is continued by the same call: what is
    there stays, `images_of` is asked for the rest. Once all is there, `softgen.json` says `"complete": true`, and
    another call does nothing. A folder with anything else in it (hidden files aside) is refused, and so is one of
    another `source`, of other prompts or of another number of samples. One process writes at a time.

    Args:
        folder: Where to write; made if it is missing.
        metadata: Rows of `read_geneval_metadata`, prompt i in row i.
        images_of: Gives the images (samples, 3, H, W) in [0, 1] of prompt number i and its text.
        source: What makes the images: the model and the seed, say. It is kept in `softgen.json`, so that images of two
            models never mix.
        samples: Images a prompt; GenEval takes 4.

    Raises:
        ValueError: The folder holds something else, there are no prompts, or the images have another shape.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not metadata:
        raise ValueError("metadata: expected at least one prompt, got none")
    target = Path(folder)
    mark = {"format": _FORMAT, "source": source, "metadata": _digest(metadata), "samples": samples}
    _open_folder(target, mark, num_prompts=len(metadata))
    for index, row in enumerate(metadata):
        place = target / f"{index:05}"
        if place.is_dir():
            continue
        images = images_of(index, row["prompt"])
        if images.ndim != 4 or images.shape[:2] != (samples, 3):
            raise ValueError(f"images_of: expected images ({samples}, 3, H, W), got {tuple(images.shape)}")
        _write_prompt(place, row, images)
    _write_mark(target, mark, complete=True)


def _digest(metadata: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps([dict(row) for row in metadata], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _open_folder(folder: Path, mark: dict[str, object], *, num_prompts: int) -> None:
    """Start a folder, or check that the same call started it; what an interrupted call left half is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in folder.iterdir())
    if MARK not in present:
        strange = [name for name in present if not name.startswith(".")]
        if strange:
            raise ValueError(f"folder: expected an empty folder or one to continue, got '{folder}' with '{strange[0]}'")
        _write_mark(folder, mark, complete=False)
    found = _read_mark(folder)
    for key, value in mark.items():
        if found.get(key) != value:
            got = f"got {found.get(key)!r}: take another folder"
            raise ValueError(f"folder: expected '{folder}' of {key} {value!r}, {got}")
    ours = {MARK, *(f"{index:05}" for index in range(num_prompts))}
    for name in present:
        if _SCRATCH.fullmatch(name):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif name not in ours and not name.startswith("."):
            raise ValueError(f"folder: expected nothing but images of GenEval in '{folder}', got '{name}'")


def _read_mark(folder: Path) -> dict[str, object]:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: expected a folder to continue, got '{folder}', whose {MARK} is broken") from error
    return mark if isinstance(mark, dict) else {}


def _write_mark(folder: Path, mark: Mapping[str, object], *, complete: bool) -> None:
    scratch = folder / f".{MARK}.{uuid.uuid4().hex}"
    scratch.write_text(json.dumps({**mark, "complete": complete}, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, folder / MARK)


def _write_prompt(place: Path, row: Mapping[str, Any], images: Tensor) -> None:
    """One prompt's folder, under a scratch name until it is whole."""
    scratch = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    (scratch / "samples").mkdir(parents=True)
    try:
        (scratch / "metadata.jsonl").write_text(json.dumps(dict(row)), encoding="utf-8")
        for index, image in enumerate(images):
            save_image(image, scratch / "samples" / f"{index:04}.png")
        os.replace(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_geneval_results(path: str | Path, metadata: Sequence[Mapping[str, Any]], *, samples: int = 4) -> GenEvalScores:
    """Read the evaluator's result file, and check that it is of these prompts.

    Args:
        path: JSON lines, one an image, in any order, with `filename`, `tag`, `prompt`, `correct` and `metadata`.
        metadata: The rows that `write_geneval` was given.
        samples: Images of each prompt.

    Raises:
        ValueError: The file cannot be read, or does not match the prompts: the first mismatch is named.
    """
    total: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    seen: dict[tuple[int, int], int] = {}
    for line, row in _json_lines(Path(path)):
        where = f"'{path}', line {line}"
        index, sample = _image_of(row, where=where, num_prompts=len(metadata))
        if (index, sample) in seen:
            raise ValueError(f"{where}: expected each image once, got that of line {seen[index, sample]} again")
        seen[index, sample] = line
        _check_row(row, metadata[index], where=where)
        total[row["tag"]] += 1
        correct[row["tag"]] += row["correct"]
    images = Counter(index for index, _ in seen)
    for index, asked in enumerate(metadata):
        if images[index] != samples:
            raise ValueError(
                f"'{path}': expected {samples} images of prompt {index:05} ('{asked['prompt']}'), got {images[index]}"
            )
    known = [task for task in TASKS if task in total]
    tasks = {task: correct[task] / total[task] for task in (*known, *(task for task in total if task not in TASKS))}
    return GenEvalScores(tasks=tasks, overall=sum(tasks.values()) / len(tasks), num_images=len(seen))


def _image_of(row: Mapping[str, Any], *, where: str, num_prompts: int) -> tuple[int, int]:
    """The numbers of a row's prompt and sample, from its file name."""
    found = _RESULT_FILE.search(str(row.get("filename")))
    if found is None:
        got = repr(row.get("filename"))
        raise ValueError(f"{where}: expected a filename such as '.../00000/samples/0000.png', got {got}")
    index = int(found[1])
    if index >= num_prompts:
        raise ValueError(f"{where}: expected prompts 0 to {num_prompts - 1}, got number {index}")
    return index, int(found[2])


def _check_row(row: Mapping[str, Any], expected: Mapping[str, Any], *, where: str) -> None:
    for key in ("tag", "prompt"):
        if row.get(key) != expected[key]:
            raise ValueError(f"{where}: expected the {key} {expected[key]!r}, got {row.get(key)!r}")
    if not isinstance(row.get("correct"), bool):
        raise ValueError(f"{where}: expected 'correct' true or false, got {row.get('correct')!r}")
    try:
        asked = json.loads(row["metadata"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected 'metadata' in JSON, got {row.get('metadata')!r}") from error
    if asked != dict(expected):
        raise ValueError(f"{where}: expected the metadata {json.dumps(dict(expected))}, got {row['metadata']}")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines and the numbers of their lines; blank lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a file of JSON lines, got '{path}' ({error})") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"'{path}', line {number}: expected a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"'{path}', line {number}: expected a JSON object, got {type(row).__name__}")
        yield number, row
