"""What every data module shares: named samples, an order that survives interruptions, shards by rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from softgen.random import derive_seed

Batch = dict[str, Any]
"""A batch: `ordinal` (list of B ints, each sample's number in the run's global order), `index` (list of B
ints) and, as the data has them, `image` (B, 3, H, W) float32 in [0, 1], `label` (B,) int64, `prompt` (list of B
strings), `token` (B, N) int64."""


class SampleSource(Protocol):
    """A finite set of samples that can be fetched many at a time."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The samples at `indices`: each field a tensor with one row a sample, or a list with one string each."""
        ...


@runtime_checkable
class CaptionSource(Protocol):
    """A sample source whose prompts can be had without its images."""

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The prompts of the samples at `indices`."""
        ...


@dataclass(frozen=True)
class TrainVal:
    """The training and the held-out samples of a data module."""

    train: SampleSource
    val: SampleSource


class OrdinalStream(Dataset[Batch]):
    """Maps ordinals to samples: epoch e visits the source in a permutation seeded by (seed, e).

    Args:
        source: The samples.
        seed: The run's seed.
        epoch_length: Ordinals in one epoch (the source's length, less what does not fill a global batch).
        shuffle: False visits the source in its own order, as validation does.
    """

    def __init__(self, source: SampleSource, *, seed: int, epoch_length: int, shuffle: bool = True) -> None:
        self.source = source
        self.seed = seed
        self.epoch_length = epoch_length
        self.shuffle = shuffle
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.epoch_length

    def __getitems__(self, ordinals: Sequence[int]) -> Batch:
        indices = [self._index(ordinal) for ordinal in ordinals]
        return {"ordinal": list(ordinals), "index": indices, **self.source.fetch(indices)}

    def _index(self, ordinal: int) -> int:
        if not self.shuffle:
            return ordinal
        epoch, position = divmod(ordinal, self.epoch_length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            self._order = torch.randperm(len(self.source), generator=generator).tolist()
            self._epoch = epoch
        return self._order[position]


def first_epoch() -> tuple[int, int]:
    """The position of a loader that always gives the first epoch: epoch 0, batch 0."""
    return 0, 0


class OrdinalBatches(Sampler[list[int]]):
    """Yields this rank's ordinals of each global batch of one epoch.

    A global batch is `world_size * batch_size` consecutive ordinals, of which rank r takes its r-th slice. Every rank
    gives as many batches, none of them empty, so that collectives meet.

    Args:
        batch_size: Samples a batch on each rank.
        epoch_length: Ordinals in one epoch.
        rank: This process.
        world_size: Number of processes.
        position: Asked whenever an iteration begins: the epoch to give, and how many of its batches are
            already done. By the trainer's count of batches, not of epochs: a run that stops within an epoch
            counts it as whole.
        drop_last: Drop a last global batch that is not full. Without it what is left is shared evenly, as a batch of
            its own or, where not every rank would get some, with the batch before.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        epoch_length: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], tuple[int, int]] = first_epoch,
        drop_last: bool = True,
    ) -> None:
        self.batch_size = batch_size
        self.epoch_length = epoch_length
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.drop_last = drop_last

    def __len__(self) -> int:
        full, rest = divmod(self.epoch_length, self.batch_size * self.world_size)
        return full + (0 if self.drop_last or rest < self.world_size else 1)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first_batch = self.position()
        offset, global_batch = epoch * self.epoch_length, self.batch_size * self.world_size
        for batch in range(first_batch, len(self)):
            low = batch * global_batch
            is_rest = batch == len(self) - 1 and not self.drop_last
            size = (self.epoch_length if is_rest else low + global_batch) - low
            first, end = (low + rank * size // self.world_size for rank in (self.rank, self.rank + 1))
            yield list(range(offset + first, offset + end))


class StreamLoader(DataLoader[Batch]):
    """A loader of `OrdinalStream` batches, which resumes where the trainer's own progress says."""

    def __init__(self, stream: OrdinalStream, batches: OrdinalBatches, *, num_workers: int = 0) -> None:
        super().__init__(stream, batch_sampler=batches, collate_fn=_as_is, num_workers=num_workers)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the trainer counts the batches. It is here so that Lightning knows that it can resume."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to restore, see `state_dict`."""


def _as_is(batch: Any) -> Any:
    return batch


class ImageDataModule(LightningDataModule):
    """Base of the data modules: subclasses say what the samples are, this class feeds them to the trainer.

    Args:
        batch_size: Samples a batch on each process.
        num_workers: Loader processes; 0 loads in the training process, best for data held in memory.
        seed: Seed of the order of samples. The command line links it to `--seed`, if the subclass takes `seed` too and
            passes it on.

    A subclass sets `image_size` and `num_classes`, and its samples have fields of the names that `Batch` lists.

    Attributes:
        image_size: Height and width of the images in pixels.
        num_classes: Number of classes, or 0 where there are no labels.
        has_images: Whether batches hold images or tokens, not labels or prompts alone.
        has_prompts: Whether batches hold prompts.
    """

    image_size: int
    num_classes: int
    has_images: bool = True
    has_prompts: bool = False

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size: expected at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers: expected at least 0, got {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

        self._sources: TrainVal | None = None

    def load_sources(self) -> TrainVal:
        """The training and the held-out samples; called once, by whatever needs them first. What a subclass writes."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Load the samples, for any stage."""
        self._loaded()

    def train_source(self) -> SampleSource:
        """The training samples."""
        return self._loaded().train

    def val_source(self) -> SampleSource:
        """The held-out samples."""
        return self._loaded().val

    def captions(self, limit: int = 20_000) -> list[str]:
        """The prompts of the first training samples, from which a text encoder learns its words."""
        source = self.train_source()
        indices = range(min(limit, len(source)))
        if isinstance(source, CaptionSource):
            return source.captions(indices)
        parts = (source.fetch(indices[first : first + 256])["prompt"] for first in range(0, len(indices), 256))
        return [prompt for part in parts for prompt in part]

    def _loaded(self) -> TrainVal:
        if self._sources is None:
            self._sources = self.load_sources()
        return self._sources

    def train_dataloader(self) -> StreamLoader:
        """Shuffled training batches; after a resume, those that the interrupted epoch had still to give."""
        source = self.train_source()
        rank, world_size = self._process()
        global_batch = self.batch_size * world_size
        batches_per_epoch = len(source) // global_batch
        if batches_per_epoch == 0:
            raise ValueError(
                f"data.batch_size: expected at most {len(source)} (the number of training images) over "
                f"{world_size} process(es), got {global_batch}"
            )
        epoch_length = batches_per_epoch * global_batch
        batches = OrdinalBatches(
            batch_size=self.batch_size,
            epoch_length=epoch_length,
            rank=rank,
            world_size=world_size,
            position=lambda: self._batches_done(batches_per_epoch),
        )
        stream = OrdinalStream(source, seed=self.seed, epoch_length=epoch_length)
        return StreamLoader(stream, batches, num_workers=self.num_workers)

    def val_dataloader(self) -> StreamLoader:
        """The held-out samples in their own order, each once."""
        source = self.val_source()
        rank, world_size = self._process()
        _check_held_out(source, world_size)
        batches = OrdinalBatches(
            batch_size=self.batch_size,
            epoch_length=len(source),
            rank=rank,
            world_size=world_size,
            drop_last=False,
        )
        stream = OrdinalStream(source, seed=self.seed, epoch_length=len(source), shuffle=False)
        return StreamLoader(stream, batches, num_workers=self.num_workers)

    def test_dataloader(self) -> StreamLoader:
        """As for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The held-out samples in their own order, each once.

        In prediction Lightning rebuilds the batch sampler around a plain sampler, so that is what it gets.
        """
        source = self.val_source()
        rank, world_size = self._process()
        _check_held_out(source, world_size)
        stream = OrdinalStream(source, seed=self.seed, epoch_length=len(source), shuffle=False)
        sampler = UnrepeatedDistributedSampler(stream, num_replicas=world_size, rank=rank, shuffle=False)
        return DataLoader(
            stream, batch_size=self.batch_size, sampler=sampler, collate_fn=_as_is, num_workers=self.num_workers
        )

    def _process(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _batches_done(self, batches_per_epoch: int) -> tuple[int, int]:
        """Whole epochs and further batches that the run has done, by the trainer's restored progress."""
        if self.trainer is None or not self.trainer.training:
            return 0, 0
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return first_epoch()
        limit = self.trainer.limit_train_batches
        if isinstance(limit, float):
            limit = int(limit * batches_per_epoch)
        per_epoch = max(1, min(batches_per_epoch, limit))
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return divmod(int(total.processed), per_epoch)


def _check_held_out(source: SampleSource, world_size: int) -> None:
    if len(source) < world_size:
        raise ValueError(f"data: expected a held-out sample for each of {world_size} processes, got {len(source)}")
