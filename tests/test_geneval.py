import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from softgen.geneval import (
    MARK,
    GenEvalScores,
    read_geneval_metadata,
    read_geneval_results,
    write_geneval,
)

ROWS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "tie", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a tie right of a dog",
    },
]


def refused(message: str) -> "pytest.RaisesExc[ValueError]":
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def images_of(index: int, prompt: str) -> Tensor:
    """Two images, of the levels 10 * index + 1 and + 2."""
    assert prompt == ROWS[index]["prompt"]
    levels = torch.tensor([10 * index + 1, 10 * index + 2]) / 255
    return levels[:, None, None, None].expand(2, 3, 8, 8)


def write(folder: Path, **changes: Any) -> None:
    arguments = {"metadata": ROWS, "images_of": images_of, "source": "a student, seed 0", "samples": 2, **changes}
    write_geneval(folder, **arguments)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def results(folder: Path, correct: dict[int, int]) -> list[dict[str, Any]]:
    """What the evaluator writes: of prompt i the first `correct[i]` images are right. In no particular order."""
    rows = []
    for index in (2, 0, 1):
        row = ROWS[index]
        for sample in (1, 0):
            rows.append(
                {
                    "filename": f"{folder}/{index:05}/samples/{sample:04}.png",
                    "tag": row["tag"],
                    "prompt": row["prompt"],
                    "correct": sample < correct[index],
                    "reason": "",
                    "metadata": json.dumps(row),
                    "details": "{}",
                }
            )
    return rows


def test_metadata_are_read_as_they_are(tmp_path: Path) -> None:
    assert read_geneval_metadata(lines(tmp_path / "a.jsonl", ROWS[0], "", *ROWS[1:])) == ROWS


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tag": "counting", "include": []}, "expected 'prompt' (str), got None"),
        ({"prompt": "a", "include": []}, "expected 'tag' (str), got None"),
        ({"prompt": "a", "tag": "b", "include": "c"}, "expected 'include' (list), got 'c'"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_bad_metadata_are_named_by_their_line(tmp_path: Path, row: object, reason: str) -> None:
    path = lines(tmp_path / "a.jsonl", ROWS[0], row)
    with refused(f"'{path}', line 2: {reason}"):
        read_geneval_metadata(path)


def test_unreadable_metadata_are_one_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl")
    with refused(f"'{path}': expected at least one row, got none"):
        read_geneval_metadata(path)
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(ValueError, match=f"^expected a file of JSON lines, got '{missing}' \\(.+\\)$"):
        read_geneval_metadata(missing)
    with pytest.raises(ValueError, match=f"^'{path}', line 1: expected a JSON object \\(.+\\)$"):
        read_geneval_metadata(lines(path, "{"))


def test_the_layout_is_genevals(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "images"
    write(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    inside = ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    assert files == [*(f"{index:05}/{name}" for index in range(3) for name in inside), MARK]
    for index, row in enumerate(ROWS):
        assert json.loads((folder / f"{index:05}" / "metadata.jsonl").read_text()) == row
        for sample in range(2):
            with Image.open(folder / f"{index:05}" / "samples" / f"{sample:04}.png") as image:
                pixels = np.array(image)
            assert pixels.shape == (8, 8, 3)
            assert (pixels == 10 * index + 1 + sample).all()
    assert json.loads((folder / MARK).read_text())["complete"] is True


def test_an_interrupted_call_is_continued(tmp_path: Path) -> None:
    asked: list[int] = []

    def failing(index: int, prompt: str) -> Tensor:
        asked.append(index)
        if index == 1:
            raise RuntimeError("interrupted")
        return images_of(index, prompt)

    with pytest.raises(RuntimeError, match="interrupted"):
        write(tmp_path, images_of=failing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000", MARK]
    assert json.loads((tmp_path / MARK).read_text())["complete"] is False
    # What a process that was killed in the middle of a prompt leaves behind.
    (tmp_path / ".00001.abc" / "samples").mkdir(parents=True)
    (tmp_path / f".{MARK}.abc").write_text("{")

    def counting(index: int, prompt: str) -> Tensor:
        asked.append(index)
        return images_of(index, prompt)

    write(tmp_path, images_of=counting)
    write(tmp_path, images_of=counting)
    assert asked == [0, 1, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000", "00001", "00002", MARK]
    assert json.loads((tmp_path / MARK).read_text())["complete"] is True


def test_a_prompt_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: Tensor, path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("softgen.geneval.save_image", broken)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with refused(f"folder: expected an empty folder or one to continue, got '{tmp_path}' with 'notes.txt'"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    folder = tmp_path / "images"
    write(folder)
    (folder / "notes.txt").write_text("mine")
    with refused(f"folder: expected nothing but images of GenEval in '{folder}', got 'notes.txt'"):
        write(folder)
    (folder / "notes.txt").unlink()
    (folder / "00003").mkdir()
    with refused(f"folder: expected nothing but images of GenEval in '{folder}', got '00003'"):
        write(folder)
    (folder / "00003").rmdir()
    (folder / ".hidden").write_text("mine")
    write(folder)
    assert (folder / ".hidden").read_text() == "mine"
    (folder / MARK).write_text("{")
    with refused(f"folder: expected a folder to continue, got '{folder}', whose {MARK} is broken"):
        write(folder)


def test_images_of_two_sources_never_mix(tmp_path: Path) -> None:
    write(tmp_path)
    with refused(f"folder: expected '{tmp_path}' of source 'a teacher', got 'a student, seed 0': take another folder"):
        write(tmp_path, source="a teacher")
    with refused(f"folder: expected '{tmp_path}' of samples 3, got 2: take another folder"):
        write(tmp_path, samples=3)
    with pytest.raises(ValueError, match=r"of metadata '[0-9a-f]{32}', got '[0-9a-f]{32}': take another folder$"):
        write(tmp_path, metadata=ROWS[:2])


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with refused("samples: expected at least 1, got 0"):
        write(tmp_path, samples=0)
    with refused("metadata: expected at least one prompt, got none"):
        write(tmp_path, metadata=[])
    with refused("images_of: expected images (3, 3, H, W), got (2, 3, 8, 8)"):
        write(tmp_path, samples=3)


def test_results_are_shares_of_tasks_and_their_mean(tmp_path: Path) -> None:
    path = lines(tmp_path / "results.jsonl", *results(tmp_path, {0: 2, 1: 1, 2: 0}))
    scores = read_geneval_results(path, ROWS, samples=2)
    assert scores == GenEvalScores(
        tasks={"single_object": 1.0, "counting": 0.5, "position": 0.0}, overall=0.5, num_images=6
    )
    assert list(scores.table) == ["single_object", "counting", "position", "overall"]


def test_overall_weighs_tasks_alike_however_many_prompts_they_have(tmp_path: Path) -> None:
    metadata = [ROWS[0], ROWS[0], ROWS[0], ROWS[1]]
    rows = [
        {
            "filename": f"x\\{index:05}\\samples\\0000.png",
            "tag": row["tag"],
            "prompt": row["prompt"],
            "correct": index != 3,
            "metadata": json.dumps(row, sort_keys=True),
        }
        for index, row in enumerate(metadata)
    ]
    scores = read_geneval_results(lines(tmp_path / "r.jsonl", *rows), metadata, samples=1)
    assert scores.table == {"single_object": 1.0, "counting": 0.0, "overall": 0.5}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tag": "colors"}, "expected the tag 'position', got 'colors'"),
        ({"prompt": "a dog"}, "expected the prompt 'a photo of a tie right of a dog', got 'a dog'"),
        ({"correct": "yes"}, "expected 'correct' true or false, got 'yes'"),
        ({"metadata": "{"}, "expected 'metadata' in JSON, got '{'"),
        ({"metadata": "{}"}, f"expected the metadata {json.dumps(ROWS[2])}, got {{}}"),
        ({"filename": "00002.png"}, "expected a filename such as '.../00000/samples/0000.png', got '00002.png'"),
        ({"filename": "x/00003/samples/0000.png"}, "expected prompts 0 to 2, got number 3"),
        ({"filename": "x/00002/samples/0001.png"}, "expected each image once, got that of line 1 again"),
    ],
)
def test_results_of_other_prompts_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    rows = results(tmp_path, {0: 2, 1: 1, 2: 0})
    path = lines(tmp_path / "results.jsonl", rows[0], {**rows[1], **change}, *rows[2:])
    with refused(f"'{path}', line 2: {reason}"):
        read_geneval_results(path, ROWS, samples=2)


def test_missing_images_are_named(tmp_path: Path) -> None:
    rows = results(tmp_path, {0: 2, 1: 1, 2: 0})
    path = lines(tmp_path / "results.jsonl", *rows[:-1])
    with refused(f"'{path}': expected 2 images of prompt 00001 ('a photo of two clocks'), got 1"):
        read_geneval_results(path, ROWS, samples=2)
    with refused(f"'{path}': expected 4 images of prompt 00000 ('a photo of a bench'), got 2"):
        read_geneval_results(path, ROWS)
    with refused(f"'{path}': expected 4 images of prompt 00000 ('a photo of a bench'), got 0"):
        read_geneval_results(lines(path), ROWS)
