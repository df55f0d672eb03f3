from pathlib import Path

import pytest
import torch

from softgen.classifier import main as train
from softgen.data import Digits, ImageDataModule, Labels, TensorSource, TrainVal
from softgen.images import save_image
from softgen.metrics import SmallClassifier, classifier_accuracy, train_classifier


class Halves(ImageDataModule):
    """Class 0 is bright on the left, class 1 on the right."""

    image_size = 4
    num_classes = 2

    def load_sources(self) -> TrainVal:
        images = torch.zeros(64, 4, 4)
        images[::2, :, :2] = 1
        images[1::2, :, 2:] = 1
        source = TensorSource(images, torch.arange(64) % 2)
        return TrainVal(train=source, val=source)


@pytest.mark.parametrize("image_size", [4, 7, 8, 15, 16, 28, 33])
def test_shapes(image_size: int) -> None:
    classifier = SmallClassifier(name="net", image_size=image_size, num_classes=5, width=4)
    images = torch.rand(2, 3, image_size, image_size)
    seen = classifier.features_and_logits(images)
    assert seen.features.shape == (2, 64)
    assert seen.logits is not None
    assert seen.logits.shape == (2, 5)
    assert (seen.features >= 0).all()


def test_gradients_reach_the_images() -> None:
    classifier = SmallClassifier(name="net", image_size=8, num_classes=5, width=4).eval()
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(classifier.logits(images).square().sum(), images)
    assert gradient.abs().sum() > 0


def test_digits_are_learnt_in_a_few_seconds() -> None:
    result = train_classifier(Digits(), name="digitsnet", epochs=10, progress=False)
    assert result.accuracy >= 0.98
    assert not result.classifier.training
    assert result.classifier.name == "digitsnet"


def test_training_depends_on_the_seed_alone_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = train_classifier(Halves(), name="net", epochs=1, width=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = train_classifier(Halves(), name="net", epochs=1, width=2, progress=False)
    other = train_classifier(Halves(), name="net", epochs=1, width=2, seed=1, progress=False)
    weights = [result.classifier.head.weight for result in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_accuracy_is_the_fraction_of_right_answers() -> None:
    result = train_classifier(Halves(), name="net", epochs=10, batch_size=8, width=4, progress=False)
    assert result.accuracy == 1
    source = Halves().train_source()
    assert isinstance(source, TensorSource)
    source.labels = torch.zeros(64, dtype=torch.int64)
    assert classifier_accuracy(result.classifier, source) == 0.5


def test_save_and_load(tmp_path: Path) -> None:
    classifier = SmallClassifier(name="net", image_size=8, num_classes=3, width=4)
    classifier(torch.rand(16, 3, 8, 8))
    classifier.eval().save(tmp_path / "net")
    loaded = SmallClassifier.load(tmp_path / "net")
    assert not loaded.training
    assert (loaded.name, loaded.image_size, loaded.num_classes) == ("net", 8, 3)
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(loaded.logits(images), classifier.logits(images))
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]


def test_loading_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"^classifier: expected the folder of a saved classifier, got '{tmp_path}/no'$"
    ):
        SmallClassifier.load(tmp_path / "no")
    with pytest.raises(ValueError, match=r"^classifier: expected a folder with config.json, got"):
        SmallClassifier.load(tmp_path)
    SmallClassifier(name="net", image_size=8, num_classes=3, width=4).save(tmp_path / "net")
    weights = tmp_path / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^classifier: expected a whole safetensors file, got") as error:
        SmallClassifier.load(tmp_path / "net")
    assert "\n" not in str(error.value)


def test_errors() -> None:
    classifier = SmallClassifier(name="net", image_size=8, num_classes=3, width=4)
    with pytest.raises(ValueError, match=r"^images: expected \(B, 3, 8, 8\), got \(2, 1, 8, 8\)$"):
        classifier.features(torch.rand(2, 1, 8, 8))
    for key, least in (("image_size", 4), ("num_classes", 2), ("width", 1)):
        arguments = {"image_size": 8, "num_classes": 3, "width": 4, key: 0}
        with pytest.raises(ValueError, match=f"^{key}: expected at least {least}, got 0$"):
            SmallClassifier(name="net", **arguments)
    with pytest.raises(ValueError, match=r"^epochs: expected at least 1, got 0$"):
        train_classifier(Halves(), name="net", epochs=0)
    with pytest.raises(ValueError, match=r"^data: expected images, got Labels$"):
        train_classifier(Labels(3), name="net", epochs=1)
    alike = Halves()
    alike.num_classes = 1
    with pytest.raises(ValueError, match=r"^data.num_classes: expected at least 2, got 1$"):
        train_classifier(alike, name="net", epochs=1)


def test_the_command_takes_images_of_your_own(tmp_path: Path) -> None:
    for label in range(2):
        for index in range(12):
            image = torch.full((3, 8, 8), 0.9 * label + 0.004 * index)
            save_image(image, tmp_path / "images" / str(label) / f"{index}.png")
    data = ["--data=softgen.data.ImageFolder", f"--data.init_args.root={tmp_path / 'images'}"]
    data += ["--data.init_args.image_size=8", "--data.init_args.val_fraction=0.25", "--data.init_args.batch_size=4"]
    out = tmp_path / "twonet"
    train([*data, "--epochs=2", "--width=4", f"--out={out}", "--progress=false"])
    opened = SmallClassifier.load(out)
    assert (opened.name, opened.num_classes, opened.image_size) == ("twonet_seed_1", 2, 8)
    with pytest.raises(SystemExit):
        train(data)


@pytest.mark.parametrize("option", ["epochs", "width"])
def test_the_command_refuses_negative_numbers(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train([f"--{option}=-1"])
    assert f"{option}: expected at least 0, got -1" in capsys.readouterr().err
