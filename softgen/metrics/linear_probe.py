"""Linear probing: how well a linear classifier tells classes apart by latents (arXiv 2412.10958, Table 4)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.metrics.features import check_samples

Pooling = Literal["flatten", "mean"]


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe's accuracies, each in [0, 1].

    Attributes:
        accuracy: On the held-out latents.
        train_accuracy: On those that it was fitted to.
    """

    accuracy: float
    train_accuracy: float


def linear_probe(
    latents: Tensor,
    labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    *,
    pooling: Pooling = "flatten",
    penalty: float = 1e-4,
    iterations: int = 200,
) -> LinearProbe:
    """Fit a multinomial logistic regression on standardised latents, by L-BFGS in float64 on the CPU.

    Standardised as by the paper's batch normalisation without parameters. The problem is convex and starts at 0, so
    that nothing is random.

    Args:
        latents: (n, L, D), or features (n, D).
        labels: (n,) int64, each class present.
        held_out: (m, L, D) or (m, D).
        held_out_labels: (m,) int64.
        pooling: `flatten` gives the probe all L D numbers, `mean` the mean over the L tokens.
        penalty: Of the squared weights, at least 0; a small one keeps separable classes finite.
        iterations: At most so many of L-BFGS.

    Raises:
        ValueError: If shapes do not match, an argument is out of range, or a value is not finite.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling: expected one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if not penalty >= 0:
        raise ValueError(f"penalty: expected a number of at least 0, got {penalty}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    train, test = _features(latents, "latents", pooling), _features(held_out, "held_out", pooling)
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"held_out: expected {train.shape[1]} features as the latents have, got {test.shape[1]}")
    for name, values, rows in (("labels", labels, train), ("held_out_labels", held_out_labels, test)):
        if values.shape != (len(rows),):
            raise ValueError(f"{name}: expected {len(rows)}, one an image, got shape {tuple(values.shape)}")
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-8)
    train, test, targets = (train - mean) / std, (test - mean) / std, labels.detach().cpu()
    weight, bias = _fit(train, targets, penalty=penalty, iterations=iterations)
    return LinearProbe(
        accuracy=_accuracy(test @ weight + bias, held_out_labels.detach().cpu()),
        train_accuracy=_accuracy(train @ weight + bias, targets),
    )


def _features(latents: Tensor, name: str, pooling: Pooling) -> Tensor:
    if latents.ndim not in (2, 3):
        raise ValueError(f"{name}: expected shape (n, L, D) or (n, D), got {tuple(latents.shape)}")
    if latents.ndim == 3:
        latents = latents.flatten(1) if pooling == "flatten" else latents.mean(dim=1)
    return check_samples(latents, name=name)


def _fit(features: Tensor, labels: Tensor, *, penalty: float, iterations: int) -> tuple[Tensor, Tensor]:
    classes = int(labels.max()) + 1
    weight = features.new_zeros(features.shape[1], classes).requires_grad_()
    bias = features.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + penalty * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())
