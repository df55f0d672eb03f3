"""Training of the small classifier: a plain loop on one device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from softgen.data.base import ImageDataModule, SampleSource
from softgen.data.batches import source_batches
from softgen.data.token_cache import check_shows_images
from softgen.metrics.accuracy import class_accuracy
from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.features import extract_features


@dataclass(frozen=True)
class ClassifierResult:
    """A trained classifier, in eval mode, and its accuracy on the held-out images, in [0, 1]."""

    classifier: SmallClassifier
    accuracy: float


def train_classifier(
    data: ImageDataModule,
    *,
    name: str,
    epochs: int,
    seed: int = 0,
    lr: float = 2e-3,
    batch_size: int = 64,
    width: int = 32,
    progress: bool = True,
) -> ClassifierResult:
    """Train a `SmallClassifier` with Adam and a one-cycle learning rate, then measure it on held-out images.

    Weights, order and result depend on `seed` alone; the global random state is left as it was.

    Args:
        data: Labelled images.
        name: Name of the extractor, part of each metric's name.
        epochs: Passes over the training images, at least 1.
        seed: Seed of the weights and the order.
        lr: Highest learning rate.
        batch_size: Images a step.
        width: Channels of the first convolution.
        progress: Show a progress bar.

    Raises:
        ValueError: An argument is out of range, or the data has no images or no labels.
    """
    check_shows_images(data)
    if data.num_classes < 2:
        raise ValueError(f"data.num_classes: expected at least 2, got {data.num_classes}")
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    data.prepare_data()
    train, val = data.train_source(), data.val_source()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = SmallClassifier(name=name, image_size=data.image_size, num_classes=data.num_classes, width=width)
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)])
        _fit(classifier, train, order=order, lr=lr, batch_size=batch_size, progress=progress)
    classifier.eval()
    return ClassifierResult(classifier=classifier, accuracy=classifier_accuracy(classifier, val))


def _fit(
    classifier: SmallClassifier,
    source: SampleSource,
    *,
    order: Tensor,
    lr: float,
    batch_size: int,
    progress: bool,
) -> None:
    batches = torch.split(order, batch_size)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=len(batches))
    classifier.train()
    for indices in tqdm(batches, desc=f"training {classifier.name}", disable=not progress, leave=False):
        batch = source.fetch(indices.tolist())
        loss = F.cross_entropy(classifier.logits(batch["image"]), batch["label"])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def classifier_accuracy(classifier: SmallClassifier, source: SampleSource) -> float:
    """Fraction of a labelled source's images that the classifier gets right, in [0, 1]."""
    labels: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        for batch in source_batches(source):
            labels.append(batch["label"])
            yield batch["image"]

    logits = extract_features(images(), extractor=classifier).logits
    assert logits is not None
    return class_accuracy(logits, torch.cat(labels))
