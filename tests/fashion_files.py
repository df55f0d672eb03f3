"""Files of the format of Fashion-MNIST, with a few random images."""

from pathlib import Path

import torch


def write_fashion_files(folder: Path, *, train: int = 130, held_out: int = 40) -> Path:
    """Write them to a new folder, which is returned."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for part, count in (("train", train), ("t10k", held_out)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count).remainder(10).to(torch.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())
    return folder
