"""What test-time embedding optimisation returns."""

from dataclasses import dataclass

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
        soft_scores: Reward of the soft decoding at every step, (T, B).
        hard_scores: Score of the hard decoding at every step, (T, B).
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
    soft_scores: Tensor
    hard_scores: Tensor
    best_step: Tensor
    trajectory: Tensor
    trajectory_steps: tuple[int, ...]
