import pytest
import torch

from softgen.data import Digits, source_batches


def everything(source: object) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(source_batches(source))  # type: ignore[arg-type]
    return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])


def test_the_split_is_stratified_and_the_same_for_every_seed() -> None:
    data, other = Digits(seed=0), Digits(seed=1)
    train_images, train_labels = everything(data.train_source())
    val_images, val_labels = everything(data.val_source())
    assert len(train_labels) + len(val_labels) == 1797
    total = torch.bincount(torch.cat([train_labels, val_labels]))
    assert torch.bincount(val_labels).tolist() == [round(0.2 * n) for n in total.tolist()]
    assert torch.equal(val_images, everything(other.val_source())[0])
    assert torch.equal(train_images, everything(other.train_source())[0])


def test_images_are_8x8_between_0_and_1() -> None:
    images, labels = everything(Digits().train_source())
    assert images.shape[1:] == (3, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images * 16, (images * 16).round())
    assert (Digits.image_size, Digits.num_classes, labels.max().item()) == (8, 10, 9)


def test_train_on_all_keeps_the_validation_images() -> None:
    data = Digits(train_on_all=True)
    data.setup("fit")
    assert len(data.train_source()) == 1797
    assert torch.equal(everything(data.val_source())[0], everything(Digits().val_source())[0])


def test_the_loader_gives_whole_batches() -> None:
    batch = next(iter(Digits(batch_size=32).train_dataloader()))
    assert batch["image"].shape == (32, 3, 8, 8)
    assert batch["label"].shape == (32,)
    assert batch["ordinal"] == list(range(32))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_the_fraction_is_checked(fraction: float) -> None:
    message = rf"^data.val_fraction: expected a number between 0 and 1 \(exclusive\), got {fraction}$"
    with pytest.raises(ValueError, match=message):
        Digits(val_fraction=fraction)


def test_a_fraction_that_leaves_nothing_is_refused() -> None:
    message = "data.val_fraction: expected a fraction that leaves images on both sides, got 0.0001 of 1797 images"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Digits(val_fraction=0.0001).setup("fit")
