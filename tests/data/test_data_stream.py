from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from softgen.data import Batch, ImageDataModule, OrdinalBatches, OrdinalStream, TensorSource, TrainVal
from softgen.data.batches import random_indices

Seen = list[tuple[list[int], list[int]]]


class CountingSource:
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def fetch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {"label": torch.as_tensor(indices)}


class CountingData(ImageDataModule):
    image_size = 2
    num_classes = 22

    def load_sources(self) -> TrainVal:
        return TrainVal(train=CountingSource(22), val=CountingSource(7))


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.train_seen: Seen = []
        self.val_seen: Seen = []

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self.train_seen.append((batch["ordinal"], batch["label"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.val_seen.append((batch["ordinal"], batch["label"].tolist()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    max_steps: int,
    *,
    save_in: Path | None = None,
    resume_from: Path | None = None,
    limit: float | int = 1.0,
    overfit: int = 0,
    num_workers: int = 0,
) -> tuple[Recorder, Trainer]:
    recorder = Recorder()
    callbacks = [] if save_in is None else [ModelCheckpoint(save_in, "{step}", every_n_train_steps=1, save_top_k=-1)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        limit_train_batches=limit,
        overfit_batches=overfit,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=save_in is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = CountingData(batch_size=5, num_workers=num_workers)
    trainer.fit(recorder, data, ckpt_path=resume_from, weights_only=True if resume_from else None)
    return recorder, trainer


def stream(seed: int = 0, n: int = 24, epoch_length: int = 24, shuffle: bool = True) -> OrdinalStream:
    return OrdinalStream(CountingSource(n), seed=seed, epoch_length=epoch_length, shuffle=shuffle)


def test_an_epoch_visits_every_sample_once() -> None:
    batch = stream().__getitems__(range(24))
    assert sorted(batch["index"]) == list(range(24))
    assert batch["index"] == batch["label"].tolist()
    assert batch["ordinal"] == list(range(24))


def test_epochs_and_seeds_differ_and_are_reproducible() -> None:
    first, second = range(24), range(24, 48)
    assert stream().__getitems__(first)["index"] != stream().__getitems__(second)["index"]
    assert stream().__getitems__(first)["index"] != stream(seed=1).__getitems__(first)["index"]
    assert stream().__getitems__(second)["index"] == stream().__getitems__(second)["index"]


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    jumping = stream()
    wanted = stream().__getitems__([30, 2, 50, 3])["index"]
    assert [jumping.__getitems__([ordinal])["index"][0] for ordinal in (30, 2, 50, 3)] == wanted


def test_an_epoch_shorter_than_the_source_leaves_out_different_samples_each_time() -> None:
    short = stream(n=24, epoch_length=20)
    visited = [frozenset(short.__getitems__(range(20 * e, 20 * e + 20))["index"]) for e in range(3)]
    assert [len(v) for v in visited] == [20, 20, 20]
    assert len(set(visited)) == 3


def test_without_shuffling_the_order_is_the_sources_own() -> None:
    assert stream(shuffle=False).__getitems__([3, 4, 5])["index"] == [3, 4, 5]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_visit_what_one_rank_visits_with_their_batches_joined(world_size: int) -> None:
    single = list(OrdinalBatches(batch_size=2 * world_size, epoch_length=24, position=lambda: (3, 0)))
    ranks = [
        list(OrdinalBatches(batch_size=2, epoch_length=24, rank=rank, world_size=world_size, position=lambda: (3, 0)))
        for rank in range(world_size)
    ]
    joined = [[ordinal for part in parts for ordinal in part] for parts in zip(*ranks, strict=True)]
    assert joined == single
    assert joined[0][0] == 3 * 24


@pytest.mark.parametrize("done", [0, 1, 5, 6])
def test_a_resume_gives_exactly_the_rest(done: int) -> None:
    whole = list(OrdinalBatches(batch_size=4, epoch_length=24, position=lambda: (1, 0)))
    rest = list(OrdinalBatches(batch_size=4, epoch_length=24, position=lambda: (1, done)))
    assert rest == whole[done:]


def test_position_is_asked_at_each_iteration() -> None:
    positions = iter([(0, 1), (1, 0)])
    batches = OrdinalBatches(batch_size=2, epoch_length=4, position=lambda: next(positions))
    assert list(batches) == [[2, 3]]
    assert list(batches) == [[4, 5], [6, 7]]


def test_drop_last() -> None:
    dropping = OrdinalBatches(batch_size=4, epoch_length=10)
    assert (len(dropping), list(dropping)) == (2, [[0, 1, 2, 3], [4, 5, 6, 7]])
    keeping = OrdinalBatches(batch_size=4, epoch_length=10, drop_last=False)
    assert (len(keeping), list(keeping)) == (3, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (10, [[[0, 1, 2, 3], [8]], [[4, 5, 6, 7], [9]]]),
        (9, [[[0, 1, 2, 3]], [[4, 5, 6, 7, 8]]]),
        (3, [[[0]], [[1, 2]]]),
    ],
)
def test_without_drop_last_ranks_have_as_many_batches_and_cover_every_ordinal_once(
    length: int, expected: list[list[list[int]]]
) -> None:
    batches = [
        OrdinalBatches(batch_size=4, epoch_length=length, rank=rank, world_size=2, drop_last=False) for rank in range(2)
    ]
    assert [list(some) for some in batches] == expected
    assert [len(some) for some in batches] == [len(some) for some in expected]


def test_loaders_without_a_trainer() -> None:
    data = CountingData(batch_size=5)
    train = list(data.train_dataloader())
    assert [batch["ordinal"][0] for batch in train] == [0, 5, 10, 15]
    assert [batch["index"] for batch in data.val_dataloader()] == [[0, 1, 2, 3, 4], [5, 6]]


def test_prediction_visits_every_held_out_sample_once_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in range(2):
        data = CountingData(batch_size=3, num_workers=1)
        monkeypatch.setattr(data, "_process", lambda rank=rank: (rank, 2))
        loader = data.predict_dataloader()
        assert loader.num_workers == 1
        seen += [index for batch in loader for index in batch["index"]]
    assert sorted(seen) == list(range(7))
    monkeypatch.setattr(data, "_process", lambda: (0, 8))
    with pytest.raises(ValueError, match=r"^data: expected a held-out sample for each of 8 processes, got 7$"):
        data.predict_dataloader()


def test_a_batch_larger_than_the_data_is_refused() -> None:
    message = r"data.batch_size: expected at most 22 \(the number of training images\) over 1 process\(es\), got 23"
    with pytest.raises(ValueError, match=message):
        CountingData(batch_size=23).train_dataloader()


@pytest.mark.parametrize(("key", "value", "least"), [("batch_size", 0, 1), ("num_workers", -1, 0)])
def test_arguments_are_checked(key: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"^data.{key}: expected at least {least}, got {value}$"):
        CountingData(**{key: value})


def test_every_epoch_of_a_fit_has_its_own_order_and_validation_always_the_same() -> None:
    recorder, _ = fit(12)
    assert [ordinals[0] for ordinals, _ in recorder.train_seen] == list(range(0, 60, 5))
    epochs = [[label for _, labels in recorder.train_seen[4 * e : 4 * e + 4] for label in labels] for e in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert recorder.val_seen == 3 * [([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([5, 6], [5, 6])]


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_a_finished_run_that_is_extended_sees_what_one_long_run_sees(
    stop: int, limit: float | int, tmp_path: Path
) -> None:
    whole, _ = fit(10, limit=limit)
    first, trainer = fit(stop, limit=limit)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second, _ = fit(10, limit=limit, resume_from=tmp_path / "last.ckpt")
    assert first.train_seen + second.train_seen == whole.train_seen


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_an_interrupted_run_sees_the_rest(stop: int, tmp_path: Path) -> None:
    whole, _ = fit(8, save_in=tmp_path)
    rest, _ = fit(8, resume_from=tmp_path / f"step={stop}.ckpt")
    assert rest.train_seen == whole.train_seen[stop:]


def test_batches_to_overfit_are_the_same_in_every_epoch() -> None:
    recorder, _ = fit(6, overfit=2)
    assert recorder.train_seen[:2] == recorder.train_seen[2:4] == recorder.train_seen[4:]
    assert recorder.train_seen[0] != recorder.train_seen[1]


def test_loader_processes_resume_alike(tmp_path: Path) -> None:
    whole, _ = fit(6, save_in=tmp_path)
    rest, _ = fit(6, resume_from=tmp_path / "step=3.ckpt", num_workers=1)
    assert rest.train_seen == whole.train_seen[3:]


def test_tensor_source_works_in_a_stream() -> None:
    source = TensorSource(torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2), torch.arange(3))
    batch = OrdinalStream(source, seed=0, epoch_length=3).__getitems__([2, 0])
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["label"].tolist() == batch["index"]


def test_samples_that_stand_for_all_are_drawn_the_same_way_every_time() -> None:
    assert sorted(random_indices(50)) == list(range(50))
    few = random_indices(50, limit=10)
    assert few == random_indices(50)[:10]
    assert max(few) > 30
