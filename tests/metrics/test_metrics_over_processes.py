"""Metrics whose images all came to one process: the others take part with nothing."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_extractor import PixelExtractor, as_images

from softgen.metrics import ClassAccuracy, EntropyScore, FrechetDistance

FEATURES = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


def _values(*, has_images: bool) -> dict[str, float]:
    """Rank 0 alone gives real images, so that no other has any."""
    extractor = PixelExtractor(feature_dim=3)
    distance, accuracy, score = FrechetDistance(extractor), ClassAccuracy(extractor), EntropyScore(extractor)
    if has_images:
        images = as_images(FEATURES, LOGITS)
        distance.update(images[:6], real=True)
        distance.update(images[6:], real=False)
        accuracy.update(images, LABELS)
        score.update(images)
    return {"fd": float(distance.compute()), "accuracy": float(accuracy.compute()), "score": float(score.compute())}


def _worker(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_values(has_images=rank == 0), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_process_without_images_meets_the_others(tmp_path: Path) -> None:
    multiprocessing.start_processes(_worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    expected = _values(has_images=True)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(expected)


def test_the_extractor_is_frozen() -> None:
    extractor = PixelExtractor(feature_dim=3)
    extractor.scale = torch.nn.Parameter(torch.ones(()))
    FrechetDistance(extractor)
    assert not extractor.scale.requires_grad
