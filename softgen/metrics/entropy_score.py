"""Entropy score: the inception score's formula on any classifier (Salimans et al. 2016, arXiv 1606.03498)."""

from typing import Any

import torch
from torch import Tensor

from softgen.metrics.feature_metric import ExtractorMetric, gathered
from softgen.metrics.features import FeatureExtractor, check_samples, require_classifier


def entropy_score(logits: Tensor, *, splits: int = 1) -> float:
    """exp(E_x KL(p(y|x) || p(y))), in [1, C], averaged over the splits; higher is better.

    It is 1 when every image gets the same class probabilities, and C when all C classes are equally frequent
    and each image is certain.

    Args:
        logits: Class logits, (n, C).
        splits: Number of consecutive parts that are scored on their own.

    Raises:
        ValueError: Fewer than 2 images a split, or values that are not finite.
    """
    if splits < 1:
        raise ValueError(f"splits: expected at least 1, got {splits}")
    rows = check_samples(logits, name="logits", minimum=2 * splits)
    scores = [_score(part.log_softmax(dim=1)) for part in rows.tensor_split(splits)]
    return float(torch.stack(scores).mean())


def _score(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    marginal = probs.mean(dim=0)
    return ((probs * log_probs).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()).exp()


class EntropyScore(ExtractorMetric):
    """The entropy score of generated images, see `entropy_score`.

    Logits are kept in float32, 4 n C bytes; the score is computed in float64 on the CPU.

    Args:
        extractor: An extractor with a classifier.
        splits: Number of consecutive parts that are scored on their own. Images come one process after another: with
            more than one part the score depends on the number of processes.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: The extractor has no classifier, or `splits` is below 1; in `compute`, fewer than 2
            images a split or logits that are not finite.
    """

    short_name = "entropy_score"
    higher_is_better = True
    fake_logits: list[Tensor]

    def __init__(self, extractor: FeatureExtractor, *, splits: int = 1, **kwargs: Any) -> None:
        super().__init__(extractor, **kwargs)
        require_classifier(extractor)
        if splits < 1:
            raise ValueError(f"splits: expected at least 1, got {splits}")
        self.splits = splits
        assert extractor.num_classes is not None, "require_classifier has looked"
        self.add_rows("fake_logits", like=torch.zeros(0, extractor.num_classes))

    def update(self, images: Tensor) -> None:
        """Add generated images (B, 3, H, W) in [0, 1]."""
        with torch.no_grad():
            self.fake_logits.append(self.extractor.logits(images).float())

    def compute(self) -> Tensor:
        """The score, a float32 scalar."""
        return torch.tensor(entropy_score(gathered(self.fake_logits), splits=self.splits))
