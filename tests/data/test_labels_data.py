import pytest
import torch

from softgen.data import Labels


def test_training_labels_are_uniform_and_depend_on_the_seed() -> None:
    data = Labels(10, seed=3)
    source = data.train_source()
    assert len(source) == 65536
    labels = source.fetch(range(65536))["label"]
    assert labels.dtype == torch.int64
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert (counts - 6553.6).abs().max() < 5 * (65536 * 0.09) ** 0.5
    assert torch.equal(labels, Labels(10, seed=3).train_source().fetch(range(65536))["label"])
    assert not torch.equal(labels, Labels(10, seed=4).train_source().fetch(range(65536))["label"])


def test_validation_takes_every_class_in_turn() -> None:
    source = Labels(3, val_samples=5).val_source()
    assert source.fetch(range(len(source)))["label"].tolist() == [0, 1, 2, 0, 1]


def test_batches_hold_labels_only() -> None:
    batch = next(iter(Labels(4, samples_per_epoch=8, batch_size=4).train_dataloader()))
    assert set(batch) == {"ordinal", "index", "label"}
    assert batch["label"].shape == (4,)


@pytest.mark.parametrize("key", ["num_classes", "samples_per_epoch", "val_samples"])
def test_counts_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=f"^data.{key}: expected at least 1, got 0$"):
        Labels(**{"num_classes": 2, key: 0})


def test_image_size_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^data.image_size: expected at least 0, got -1$"):
        Labels(2, image_size=-1)
