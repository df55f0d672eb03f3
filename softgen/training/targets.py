"""What a teacher is trained towards: hard codes, smoothed codes, or the neighbours of the latent (SNCE).

Shape legend: N tokens of a batch, K codes, d width of hidden states, D code dimension.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from softgen.relaxation import (
    Distance,
    Impl,
    NeighbourTable,
    linear_cross_entropy,
    neighbour_cross_entropy,
    neighbour_distribution,
)

Target = Literal["hard", "label_smoothing", "snce"]


def check_target(target: str, *, label_smoothing: float, two_tau_squared: float | Literal["auto"], key: str) -> None:
    """Refuse impossible settings.

    Raises:
        ValueError: Naming the key, what was expected and what was got.
    """
    if target not in get_args(Target):
        raise ValueError(f"{key}.target: expected one of {', '.join(get_args(Target))}, got {target!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{key}.label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if two_tau_squared != "auto" and not two_tau_squared > 0:
        raise ValueError(f"{key}.two_tau_squared: expected 'auto' or a number above 0, got {two_tau_squared}")


def hard_cross_entropy(logits: Tensor, tokens: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token, float32.

    Args:
        logits: (..., K).
        tokens: (...) int64 in [0, K).
        label_smoothing: Mass spread evenly over all codes, in [0, 1].

    Returns:
        (...).
    """
    loss = F.cross_entropy(
        logits.float().flatten(0, -2), tokens.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return loss.view(tokens.shape)


class CodeTarget(Protocol):
    """The targets of a batch's tokens. Losses are sums over tokens of weight times loss, float32 scalars."""

    def loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        """From logits (N, K) and weights (N,)."""

    def linear_loss(self, hidden: Tensor, head: nn.Linear, weights: Tensor, *, impl: Impl) -> Tensor:
        """The same from hidden states (N, d) before the output layer."""


@dataclass(frozen=True, eq=False)
class HardTarget:
    """The codes themselves, (N,), or with `label_smoothing` of their mass spread over all codes."""

    tokens: Tensor
    label_smoothing: float = 0.0

    def loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy."""
        return (hard_cross_entropy(logits, self.tokens, label_smoothing=self.label_smoothing) * weights).sum()

    def linear_loss(self, hidden: Tensor, head: nn.Linear, weights: Tensor, *, impl: Impl) -> Tensor:
        """Cross-entropy."""
        return linear_cross_entropy(
            hidden,
            head.weight,
            self.tokens,
            bias=head.bias,
            label_smoothing=self.label_smoothing,
            token_weights=weights,
            reduction="sum",
            impl=impl,
        )


@dataclass(frozen=True, eq=False)
class NeighbourTarget:
    """q(z) of latents (N, D) over a codebook (K, D); SNCE (eq. 8) less the entropy of q, so that 0 is a perfect fit."""

    latents: Tensor
    codebook: Tensor
    two_tau_squared: float
    distance: Distance

    def loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        """KL(q || p)."""
        q = neighbour_distribution(
            self.latents, self.codebook, two_tau_squared=self.two_tau_squared, distance=self.distance
        )
        losses = F.kl_div(logits.float().log_softmax(dim=-1), q, reduction="none").sum(dim=-1)
        return (losses * weights).sum()

    def linear_loss(self, hidden: Tensor, head: nn.Linear, weights: Tensor, *, impl: Impl) -> Tensor:
        """KL(q || p)."""
        return neighbour_cross_entropy(
            hidden,
            head.weight,
            self.latents,
            self.codebook,
            two_tau_squared=self.two_tau_squared,
            distance=self.distance,
            bias=head.bias,
            token_weights=weights,
            reduction="sum",
            subtract_entropy=True,
            impl=impl,
        )


@dataclass(frozen=True, eq=False)
class TableTarget:
    """q(v_r) of codes r, (N,), read from a table; the loss as for `NeighbourTarget`."""

    tokens: Tensor
    table: NeighbourTable

    def loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        """KL(q || p)."""
        codes, q = self.table.codes[self.tokens].long(), self.table.weights[self.tokens]
        log_p = logits.float().log_softmax(dim=-1).gather(1, codes)
        return (F.kl_div(log_p, q, reduction="none").sum(dim=-1) * weights).sum()

    def linear_loss(self, hidden: Tensor, head: nn.Linear, weights: Tensor, *, impl: Impl) -> Tensor:
        """KL(q || p)."""
        return self.table.cross_entropy(
            hidden,
            head.weight,
            self.tokens,
            bias=head.bias,
            token_weights=weights,
            reduction="sum",
            subtract_entropy=True,
            impl=impl,
        )
