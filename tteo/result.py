"""What test-time embedding optimisation returns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TTEOResult:
    """Optimised samples, one a condition and candidate.

    Shape legend: B samples (conditions times candidates, candidates of a condition side by side), T steps done.

    Attributes:
        images: Best hard-decoded images, (B, 3, H, W) in [0, 1].
        tokens: Their codes, (B, N).
        embeddings: The input embeddings that gave them, (B, L, d).
        before: Scores of the hard-decoded images at the start, (B,).
        after: Scores of the best images, (B,); never below `before`, which is one of those that they are chosen from.
        start_images: Hard-decoded images at the start, (B, 3, H, W).
        start_tokens: Their codes, (B, N).
        soft_scores: Reward of the soft decoding at every step, (T, B).
        hard_scores: Score of the hard decoding at every step and after the last, (T + 1, B).
        best_step: Step at which each best image was found, (B,) int64; 0 is the start.
        trajectory: Hard-decoded images at the steps `trajectory_steps`, (S, B, 3, H, W); empty where none were kept.
        trajectory_steps: Which steps those are.
    """

    images: Tensor
    tokens: Tensor
    embeddings: Tensor
    before: Tensor
    after: Tensor
    start_images: Tensor
    start_tokens: Tensor
    soft_scores: Tensor
    hard_scores: Tensor
    best_step: Tensor
    trajectory: Tensor
    trajectory_steps: tuple[int, ...]


def concatenate(parts: Sequence[TTEOResult]) -> TTEOResult:
    """The results of several batches as one; a batch that stopped early keeps its last scores and images."""
    longest = max(parts, key=lambda part: len(part.hard_scores))

    def samples(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    def history(name: str) -> Tensor:
        length = len(getattr(longest, name))
        return torch.cat([_extend(getattr(part, name), length) for part in parts], dim=1)

    return TTEOResult(
        images=samples("images"),
        tokens=samples("tokens"),
        embeddings=samples("embeddings"),
        before=samples("before"),
        after=samples("after"),
        start_images=samples("start_images"),
        start_tokens=samples("start_tokens"),
        soft_scores=history("soft_scores"),
        hard_scores=history("hard_scores"),
        best_step=samples("best_step"),
        trajectory=history("trajectory"),
        trajectory_steps=longest.trajectory_steps,
    )


def _extend(rows: Tensor, length: int) -> Tensor:
    """Repeat the last row until there are `length`."""
    return torch.cat([rows, rows[-1:].expand(length - len(rows), *rows.shape[1:])]) if len(rows) < length else rows
