from pathlib import Path

import pytest
import torch
from torchvision.io import read_image

from softgen.images import grid, save_grid, save_image, to_uint8


def test_levels_are_rounded_and_clamped() -> None:
    images = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 2.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_every_level_survives() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255), levels)


def test_the_grid_goes_row_by_row_on_white() -> None:
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 4, 4) / 10
    tiled = grid(images, columns=2, min_side=4, padding=1)
    assert tiled.shape == (3, 12, 12)
    assert tiled[0, 1:5, 1:5].eq(0.0).all()
    assert tiled[0, 1:5, 7:11].eq(0.1).all()
    assert tiled[0, 7:11, 1:5].eq(0.2).all()
    assert tiled[0, 6:, 6:].eq(1).all()
    assert tiled[:, 0].eq(1).all()


@pytest.mark.parametrize(("side", "shown"), [(8, 32), (28, 56), (32, 32), (40, 40)])
def test_small_images_are_enlarged_by_whole_factors(side: int, shown: int) -> None:
    images = torch.rand(1, 3, side, side)
    tiled = grid(images, columns=1, padding=0)
    assert tiled.shape == (3, shown, shown)
    assert torch.equal(tiled[:, :: shown // side, :: shown // side], images[0])


def test_files_hold_the_pixels(tmp_path: Path) -> None:
    image = torch.randint(256, (3, 5, 7)) / 255
    save_image(image, tmp_path / "deep" / "one.png")
    assert torch.equal(read_image(str(tmp_path / "deep" / "one.png")), to_uint8(image))
    images = torch.randint(256, (5, 3, 8, 8)) / 255
    save_grid(images, tmp_path / "grid.png", columns=3)
    assert torch.equal(read_image(str(tmp_path / "grid.png")), to_uint8(grid(images, columns=3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "grid.png"]
