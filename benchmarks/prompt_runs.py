"""What the benchmarks with prompts share: how a stage of a recipe is run, and retrieval by a CLIP."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from softgen.files import write_json
from softgen.models import OpenCLIP
from softgen.pretrained import Pretrained


def train(folder: Path, config: Path, *options: str) -> None:
    """Run a stage of a recipe, unless its model is there.

    Args:
        folder: Of the run.
        config: Of the stage.
        options: Further arguments of `softgen.fit`.

    Raises:
        RuntimeError: If training fails.
    """
    if (folder / "model" / "config.json").is_file():
        return
    run_timed(folder, [sys.executable, "-m", "softgen.fit", f"--config={config}", f"--run_dir={folder}", *options])


def train_clips(pool: Executor, root: Path, config: Path) -> list[Future[None]]:
    """Start the trainings of `clip`, the reward's, and of `judge`, which differs by its seed and is no reward."""
    return [pool.submit(train, root / name, config, f"--seed={seed}") for name, seed in (("clip", 100), ("judge", 101))]


def run_timed(folder: Path, words: Sequence[str]) -> None:
    """Run a command in a process of its own; keep its output and the minutes of CPU that it took.

    Args:
        folder: Where `log.txt` and `time.json` go.
        words: The command.

    Raises:
        RuntimeError: If it fails, with the name of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{folder.name} failed: see {log.name}")
    write_json(folder / "time.json", {"minutes": (used.ru_utime + used.ru_stime) / 60})


@contextmanager
def elapsed(path: Path) -> Iterator[None]:
    """Add the minutes that pass within to those that a file holds, of earlier starts of the same benchmark."""
    start, earlier = time.monotonic(), elapsed_minutes(path)
    try:
        yield
    finally:
        write_json(path, {"minutes": earlier + (time.monotonic() - start) / 60})


def elapsed_minutes(path: Path) -> float:
    """What `elapsed` wrote; 0 where nothing is."""
    minutes: float = json.loads(path.read_text())["minutes"] if path.is_file() else 0.0
    return minutes


def clip_name(folder: Path) -> str:
    """What `rewards.CLIPReward` calls the CLIP that a run left."""
    return f"local-dir:{folder}/model"


def objectives_with_clip(config: Path, clip: Path, auxiliary: Path) -> list[dict[str, Any]]:
    """The objectives of a recipe's reward stage, Di[M]O and then the reward, on models of other runs.

    Args:
        config: Of the stage.
        clip: Folder of the run of the reward's CLIP.
        auxiliary: Folder of the auxiliary model.
    """
    content = yaml.safe_load(config.read_text())
    dimo, reward = content["model"]["init_args"]["objectives"]
    dimo["init_args"]["auxiliary"] = str(auxiliary)
    reward["init_args"]["rewards"][0]["init_args"]["model_name"] = clip_name(clip)
    return [dimo, reward]


def open_clip(folder: Path) -> OpenCLIP:
    """The CLIP that a run left."""
    clip = Pretrained.from_pretrained(folder / "model")
    assert isinstance(clip, OpenCLIP)
    return clip


@torch.no_grad()
def retrieval(clip: OpenCLIP, images: Tensor, prompts: Sequence[str], *, among: int = 100) -> dict[str, float]:
    """How often a CLIP finds the prompt of a picture, and the picture of a prompt, among some pairs.

    Args:
        clip: Compares them.
        images: (n, 3, H, W) in [0, 1].
        prompts: Of the images; a pair of equal prompts counts as found.
        among: Pairs that are compared with each other; n is a multiple of it.

    Returns:
        `image_to_text` and `text_to_image`, in [0, 1].
    """
    assert len(images) == len(prompts)
    assert len(prompts) % among == 0
    shown = torch.cat([clip.encode_images(part) for part in torch.split(images, 250)])
    texts = clip.encode_prompts(prompts)
    hits: dict[str, list[float]] = {"image_to_text": [], "text_to_image": []}
    for first in range(0, len(prompts), among):
        some, named = slice(first, first + among), prompts[first : first + among]
        ids = torch.tensor([named.index(prompt) for prompt in named])
        similarity = shown[some] @ texts[some].T
        for key, nearest in (("image_to_text", similarity.argmax(1)), ("text_to_image", similarity.argmax(0))):
            hits[key].append(float((ids[nearest] == ids).float().mean()))
    return {key: statistics.mean(values) for key, values in hits.items()}
