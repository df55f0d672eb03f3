"""How far a soft embedding is from a real one.

The paper bounds the bias of the surrogate by L/2 ||Sigma||, with Sigma the covariance of the embedding under the
generator's distribution: the sharper the generator, the smaller the bias.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softgen.relaxation.expectation import expected_embedding, probabilities
from softgen.relaxation.precision import full_precision


@dataclass(frozen=True)
class Sharpness:
    """Means over sites of how concentrated the generator is.

    Attributes:
        max_probability: Probability of the likeliest code, scalar in (0, 1].
        entropy: In nats, scalar.
        covariance_trace: tr Sigma = E|e|^2 - |E e|^2 of the embedding, scalar; 0 where no embedding was given.
        margin: Median over sites of how far the largest logit is above the second, scalar. The gradient of the soft
            embedding at a site falls as exp(-margin).
    """

    max_probability: Tensor
    entropy: Tensor
    covariance_trace: Tensor
    margin: Tensor


@torch.no_grad()
def sharpness(logits: Tensor, embedding: Tensor | None = None) -> Sharpness:
    """Measure a batch of logits (..., K), with the embedding (K, d) that they are averaged over, if any."""
    probs = probabilities(logits)
    if embedding is None:
        trace = probs.new_zeros(())
    else:
        rows = embedding.to(probs.dtype)
        # Centring first: the trace is a small difference of large numbers for embeddings far from 0.
        rows = rows - rows.mean(dim=0)
        with full_precision(rows):
            second_moment = probs @ rows.square().sum(dim=-1)
            trace = (second_moment - expected_embedding(probs, rows).square().sum(dim=-1)).mean()
    return Sharpness(
        max_probability=probs.amax(dim=-1).mean(),
        entropy=torch.special.entr(probs).sum(dim=-1).mean(),
        covariance_trace=trace,
        margin=_margin(logits),
    )


def _margin(logits: Tensor) -> Tensor:
    first, second = logits.float().topk(2, dim=-1).values.unbind(dim=-1)
    return (first - second).median()


@torch.no_grad()
def decoding_gap(
    probs: Tensor,
    tokens: Tensor,
    *,
    decode_soft: Callable[[Tensor], Tensor],
    decode_hard: Callable[[Tensor], Tensor],
) -> Tensor:
    """Root-mean-square difference of pixels between the soft decoding and the decoding of sampled tokens.

    Args:
        probs: The generator's distributions, shape (B, N, K).
        tokens: Codes sampled from them, shape (B, N).
        decode_soft: Maps `probs` to images (B, 3, H, W).
        decode_hard: Maps `tokens` to images (B, 3, H, W).

    Returns:
        Scalar in [0, 1] for images in [0, 1].
    """
    return (decode_soft(probs) - decode_hard(tokens)).square().mean().sqrt()
