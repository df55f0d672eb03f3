"""How the benchmarks of the tokenizers train a stage of a recipe, keep what it gave, and measure on Fashion-MNIST."""

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softgen.class_evaluation import named_protocol
from softgen.classifier import RECIPES, named_data
from softgen.metrics import FeatureStatistics, train_classifier
from softgen.metrics.features import extract_features
from softgen.metrics.protocol import Protocol

Job = tuple[Any, ...]
"""A function of a module, and what it is called with."""


def run_all(pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> None:
    """Call every function with its arguments, side by side; the first failure ends all that has not begun."""
    started = [pool.submit(*job) for job in jobs]
    try:
        for count, future in enumerate(as_completed(started), start=1):
            future.result()
            print(f"{count} of {len(jobs)} runs", flush=True)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def fit_stage(
    config: Path, folder: Path, words: Sequence[str], *, seed: int, steps: int, options: Mapping[str, Any] = {}
) -> float:
    """Train a stage of a recipe on one thread.

    Args:
        config: Of the stage.
        folder: Of the run; what is there is removed.
        words: Further arguments of `softgen.fit`.
        seed: Of weights, data order and noise.
        steps: Training steps.
        options: Settings that differ from those of such runs: no logger and no validation.

    Returns:
        The seconds that it took, which other work on the machine may lengthen.

    Raises:
        RuntimeError: If training fails, with the name of its log.
    """
    from softgen.fit import main as fit

    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = {
        "config": config,
        "run_dir": folder,
        "seed": seed,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": steps,
        "trainer.logger": "false",
        "trainer.limit_val_batches": 0,
        "checkpoint.every_n_steps": steps,
        **options,
    }
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        begin = time.perf_counter()
        try:
            fit([*(f"--{name}={value}" for name, value in given.items()), *words])
        except SystemExit as stop:
            raise RuntimeError(f"training failed: see {log.name}") from stop
        seconds = time.perf_counter() - begin
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return seconds


def result(folder: Path) -> dict[str, Any]:
    """What a finished run wrote."""
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def is_done(folder: Path, settings: Mapping[str, int]) -> bool:
    """Whether a run has been finished.

    Raises:
        ValueError: If it has, with other settings.
    """
    if not (folder / "result.json").is_file():
        return False
    kept = result(folder)["settings"]
    if kept != dict(settings):
        raise ValueError(f"out: expected runs of {dict(settings)} in {folder}, got runs of {kept}")
    return True


def judge(root: Path) -> Path:
    """The folder of a classifier that distances are not measured with."""
    return root / "judge"


def train_classifiers(root: Path, data_root: str) -> None:
    """Train the extractor of the distances and the judge; nothing if that is done."""
    torch.set_num_threads(1)
    protocol(root, data_root)
    if not (judge(root) / "config.json").is_file():
        recipe = RECIPES["fashion_mnist"]
        data = named_data("fashion_mnist", data_root=data_root)
        trained = train_classifier(
            data, name=f"{recipe.name}_seed_1", epochs=recipe.epochs, width=recipe.width, seed=1, progress=False
        )
        trained.classifier.save(judge(root))


@cache
def protocol(root: Path, data_root: str) -> Protocol:
    """How generated images are scored; its extractor is kept in the folder of the runs."""
    folder = str(root / "extractor")
    return named_protocol("fashion_mnist", data_root=data_root, folder=folder, progress=False)


def statistics_of(images: Tensor, scored_by: Protocol) -> FeatureStatistics:
    """What a Frechet distance compares of images (n, 3, H, W)."""
    return FeatureStatistics.from_features(extract_features(images, extractor=scored_by.extractor).features)
