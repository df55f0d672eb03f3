"""The linear probe: against scikit-learn's solution, and on latents whose answer is known."""

from typing import Any

import pytest
import torch

from softgen.metrics import linear_probe


def clusters(n: int, *, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, 3, 4) of three classes that differ in one number of the second token."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    latents = spread * torch.randn(n, 3, 4, generator=generator)
    latents[:, 1, 2] += labels.float() - 1
    return latents, labels


def test_separable_classes_are_told_apart() -> None:
    probe = linear_probe(*clusters(300, spread=0.05, seed=0), *clusters(200, spread=0.05, seed=1))
    assert probe.accuracy == 1
    assert probe.train_accuracy == 1


def test_it_is_the_solution_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    train, labels = clusters(400, spread=0.8, seed=0)
    test, held_out = clusters(300, spread=0.8, seed=1)
    flat = train.flatten(1).double()
    mean, std = flat.mean(dim=0), flat.std(dim=0)
    # Its objective is C sum(loss) + |w|^2 / 2.
    reference = LogisticRegression(C=1 / (2 * 1e-2 * 400), max_iter=1000, tol=1e-8)
    reference.fit(((flat - mean) / std).numpy(), labels.numpy())
    expected = reference.score(((test.flatten(1).double() - mean) / std).numpy(), held_out.numpy())
    probe = linear_probe(train, labels, test, held_out, penalty=1e-2)
    assert probe.accuracy == pytest.approx(expected, abs=1e-9)
    assert 0.5 < probe.accuracy < 0.95


def test_pooling_sees_means_alone() -> None:
    train, labels = clusters(600, spread=0.05, seed=0)
    test, held_out = clusters(300, spread=0.05, seed=1)
    for latents, classes in ((train, labels), (test, held_out)):
        latents[:, 0, 2] -= classes.float() - 1
    assert linear_probe(train, labels, test, held_out).accuracy == 1
    assert linear_probe(train, labels, test, held_out, pooling="mean").accuracy < 0.5
    means = linear_probe(train.mean(dim=1), labels, test.mean(dim=1), held_out)
    assert means == linear_probe(train, labels, test, held_out, pooling="mean")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "max"}, "pooling: expected one of flatten, mean, got 'max'"),
        ({"penalty": -1.0}, "penalty: expected a number of at least 0, got -1.0"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"labels": torch.zeros(3)}, "labels: expected 30, one an image, got shape (3,)"),
        ({"held_out": torch.zeros(6, 5)}, "held_out: expected 12 features as the latents have, got 5"),
        ({"latents": torch.zeros(30)}, "latents: expected shape (n, L, D) or (n, D), got (30,)"),
        (
            {"held_out": torch.full((6, 12), torch.nan)},
            "held_out: expected finite values, got NaN or infinity in 6 of 6 samples",
        ),
    ],
)
def test_input_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    latents, labels = clusters(30, spread=1.0, seed=0)
    held_out, held_out_labels = clusters(6, spread=1.0, seed=1)
    options: dict[str, Any] = {"latents": latents, "labels": labels, "held_out": held_out}
    with pytest.raises(ValueError, match="expected") as caught:
        linear_probe(**{**options, "held_out_labels": held_out_labels, **changes})
    assert str(caught.value) == message
