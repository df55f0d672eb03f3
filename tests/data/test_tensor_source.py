import pytest
import torch

from softgen.data import TensorSource, source_batches


def test_grey_bytes_are_kept_compact_and_expanded_on_fetch() -> None:
    source = TensorSource(torch.tensor([[[0, 255]], [[51, 102]]], dtype=torch.uint8), torch.tensor([3, 4]))
    assert source.images.dtype == torch.uint8
    assert source.images.shape == (2, 1, 1, 2)
    batch = source.fetch([1, 0, 1])
    assert batch["image"].shape == (3, 3, 1, 2)
    assert batch["image"].dtype == torch.float32
    for channel in range(3):
        torch.testing.assert_close(batch["image"][0, channel], torch.tensor([[0.2, 0.4]]))
    assert batch["label"].tolist() == [4, 3, 4]
    assert batch["label"].dtype == torch.int64


def test_colour_and_floats_are_kept() -> None:
    images = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    batch = TensorSource(images).fetch([2])
    torch.testing.assert_close(batch["image"], images[2:3].float())
    assert set(batch) == {"image"}


def test_a_fetched_batch_may_be_changed_in_place() -> None:
    source = TensorSource(torch.zeros(2, 2, 2), torch.zeros(2))
    source.fetch([0])["image"].add_(1)
    assert source.fetch([0])["image"].sum() == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "labels", "message"),
    [
        (
            (2, 2, 4, 4),
            torch.uint8,
            2,
            r"images: expected \(n, H, W\) or \(n, 1 or 3, H, W\), got \(2, 2, 4, 4\)",
        ),
        ((2, 4), torch.uint8, 2, r"images: expected \(n, H, W\) or \(n, 1 or 3, H, W\), got \(2, 4\)"),
        ((2, 4, 4), torch.int64, 2, "images: expected uint8 or floating point, got torch.int64"),
        ((2, 4, 4), torch.uint8, 3, r"labels: expected 2, one an image, got shape \(3,\)"),
    ],
)
def test_other_tensors_are_refused(shape: tuple[int, ...], dtype: torch.dtype, labels: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TensorSource(torch.zeros(shape, dtype=dtype), torch.zeros(labels))


def test_source_batches_cover_everything_in_order() -> None:
    source = TensorSource(torch.zeros(5, 1, 1), torch.arange(5))
    assert [batch["label"].tolist() for batch in source_batches(source, batch_size=2)] == [
        [0, 1],
        [2, 3],
        [4],
    ]
