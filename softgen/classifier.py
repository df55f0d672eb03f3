"""Train a small classifier: a reward's judge, or the features of a metric: `python -m softgen.classifier`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softgen.cli import run_command
from softgen.data.base import ImageDataModule
from softgen.metrics.classifier_training import train_classifier
from softgen.pretrained import check_target
from softgen.sample import check_writable

PROGRAM = "softgen.classifier"
DataName = Literal["digits", "fashion_mnist"]


@dataclass(frozen=True)
class ClassifierRecipe:
    """How the classifier of a data set that comes with the toolkit is made: its name, epochs and width."""

    name: str
    epochs: int
    width: int


RECIPES: Mapping[str, ClassifierRecipe] = {
    "digits": ClassifierRecipe(name="digitsnet", epochs=10, width=32),
    "fashion_mnist": ClassifierRecipe(name="fashionnet", epochs=3, width=16),
}


def named_data(name: DataName, *, data_root: str) -> ImageDataModule:
    """The images of a data set that comes with the toolkit, with the part held out that its classifier is tried on."""
    from softgen.data import Digits, FashionMNIST

    return Digits() if name == "digits" else FashionMNIST(root=data_root)


def classifier(
    *,
    data_name: DataName = "digits",
    data_root: str = "data/fashion_mnist",
    data: ImageDataModule | None = None,
    epochs: int = 0,
    width: int = 0,
    out: str = "",
    seed: int = 1,
    progress: bool = True,
) -> None:
    """Train a classifier on real images, print its accuracy on held-out ones, and write its folder.

    A judge for `rewards.ClassifierReward` must be another one than the classifier that the result is measured with:
    keep this one's seed away from 0, which that one has.

    Args:
        data_name: Data set that comes with the toolkit, where `data` is not given.
        data_root: Folder of Fashion-MNIST's files.
        data: Labelled images of your own, as a data module (class_path and init_args); its folder then goes to
            `softgen.evaluate --extractor`, and its name is part of each metric's name.
        epochs: Passes over the training images; 0 takes those of the data set, or 10.
        width: Channels of the first convolution; 0 takes those of the data set, or 32.
        out: Folder to write to; by default runs/<data_name>/judge. Needed with `data`.
        seed: Of the weights and the order of the images.
        progress: Show a progress bar.

    Raises:
        ValueError: Naming the option, what was expected and what was got.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a number from 0 to 2^32 - 1, got {seed}")
    for name, value in (("epochs", epochs), ("width", width)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if data is not None and not out:
        raise ValueError("out: expected a folder to go with data, got none")
    folder = Path(out or f"runs/{data_name}/judge")
    recipe = RECIPES[data_name] if data is None else ClassifierRecipe(name=folder.name, epochs=10, width=32)
    check_writable(folder.parent)
    check_target(folder)
    result = train_classifier(
        named_data(data_name, data_root=data_root) if data is None else data,
        name=f"{recipe.name}_seed_{seed}",
        epochs=epochs or recipe.epochs,
        width=width or recipe.width,
        seed=seed,
        progress=progress,
    )
    result.classifier.save(folder)
    print(f"{result.accuracy:.1%} of held-out images classified rightly: {folder}")


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(classifier, program=PROGRAM, args=args)


if __name__ == "__main__":
    main()
