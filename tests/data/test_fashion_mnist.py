import gzip
import re
import struct
from pathlib import Path

import pytest
import torch

from softgen.data import FashionMNIST

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAIN, TEST = 5, 3


def idx(shape: tuple[int, ...], content: bytes, *, kind: int = 0x08) -> bytes:
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + content


def image_bytes(n: int) -> bytes:
    return b"".join(bytes([10 * i] * 784) for i in range(n))


def write_files(folder: Path, *, zipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", TRAIN), ("t10k", TEST)):
        files = {
            f"{prefix}-images-idx3-ubyte": idx((n, 28, 28), image_bytes(n)),
            f"{prefix}-labels-idx1-ubyte": idx((n,), bytes(9 - i for i in range(n))),
        }
        for name, content in files.items():
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_reads_both_layouts(zipped: bool, below: str, tmp_path: Path) -> None:
    write_files(tmp_path / below, zipped=zipped)
    data = FashionMNIST(tmp_path)
    data.prepare_data()
    data.setup("fit")
    assert (len(data.train_source()), len(data.val_source())) == (TRAIN, TEST)
    batch = data.train_source().fetch([4, 0])
    assert batch["image"].shape == (2, 3, 28, 28)
    torch.testing.assert_close(batch["image"][0], torch.full((3, 28, 28), 40 / 255))
    assert batch["label"].tolist() == [5, 9]


def test_limit_takes_the_first_training_images(tmp_path: Path) -> None:
    write_files(tmp_path)
    data = FashionMNIST(tmp_path, limit=2)
    assert data.train_source().fetch(range(len(data.train_source())))["label"].tolist() == [9, 8]
    assert len(data.val_source()) == TEST


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data.limit: expected at least 1, got 0$"):
        FashionMNIST(limit=0)


def test_no_files_and_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried a mirror, got no route to host")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    with pytest.raises(
        ValueError, match=r"^data.root: expected the four files of Fashion-MNIST in '.*', or a download"
    ):
        FashionMNIST(tmp_path).prepare_data()


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    data = FashionMNIST(tmp_path, download=False)
    data.prepare_data()
    message = (
        "data.root: expected a folder with train-images-idx3-ubyte[.gz] and its three companions, "
        f"in itself or in FashionMNIST/raw, got '{tmp_path}'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            idx((5, 28, 28), image_bytes(5))[:-1],
            "expected 3920 bytes of data for shape",
        ),
        ("train-images-idx3-ubyte", idx((5, 28, 28), image_bytes(5), kind=0x0D), "got magic 0x00000d03"),
        ("train-images-idx3-ubyte", b"GIF89a", "got magic 0x47494638"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0", "expected an idx header of 16 bytes, got 5 bytes"),
        ("train-images-idx3-ubyte", idx((5, 8, 8), bytes(320)), "expected images of 28x28 pixels, got 8x8"),
        ("train-labels-idx1-ubyte", idx((4,), bytes(4)), "expected 5 labels, one an image, got 4"),
        (
            "train-labels-idx1-ubyte",
            idx((5,), bytes([0, 1, 2, 3, 10])),
            "expected labels from 0 to 9, got 10",
        ),
        ("t10k-labels-idx1-ubyte", idx((3, 1, 1), bytes(3)), "got magic 0x00000803"),
    ],
)
def test_foreign_files_are_refused_by_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_files(tmp_path, zipped=False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: .*{re.escape(message)}") as error:
        FashionMNIST(tmp_path).setup("fit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [slice(0, 40), slice(3, None)])
def test_a_broken_gzip_is_refused_by_name(cut: slice, tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected a whole gzip file, got one that does"):
        FashionMNIST(tmp_path).setup("fit")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_real_files() -> None:
    data = FashionMNIST(DEBIAN, download=False)
    train, val = data.train_source(), data.val_source()
    assert (len(train), len(val)) == (60_000, 10_000)
    assert train.fetch(range(5))["label"].tolist() == [9, 0, 0, 3, 0]
    labels = val.fetch(range(len(val)))["label"]
    assert torch.bincount(labels).tolist() == [1000] * 10
