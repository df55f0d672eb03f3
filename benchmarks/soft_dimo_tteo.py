"""TTEO on the students of benchmarks/soft_dimo.py: what it raises, and what a step costs."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from rewards import ClassifierReward
from softgen.generation import balanced_labels
from softgen.metrics import SmallClassifier, class_accuracy, extract_features
from softgen.models.generator import OneStepGenerator
from softgen.random import SampleRandom
from softgen.relaxation import probabilities
from softgen.tokenizers.base import ImageTokenizer
from tteo import TTEOSettings, optimize


def measure_tteo(
    generator: OneStepGenerator,
    tokenizer: ImageTokenizer,
    reward: ClassifierReward,
    held_out: SmallClassifier,
    *,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """TTEO of a student by SGD, as in the paper, and by Adam, judged by a classifier that it does not climb."""
    labels = balanced_labels(count, num_classes=10)
    rows = {}
    for name, settings in (
        ("sgd", TTEOSettings(steps=30, lr=0.2, batch_size=100)),
        ("adam", TTEOSettings(steps=30, lr=0.02, optimizer="adam", batch_size=100)),
    ):
        begin = time.process_time()
        result = optimize(generator, tokenizer, reward, labels, settings=settings, seed=seed)
        seconds = time.process_time() - begin
        rows[name] = {
            "n": count,
            "steps": settings.steps,
            "before": result.before.mean().item(),
            "after": result.after.mean().item(),
            "last": result.hard_scores[-1].mean().item(),
            "raised": (result.after > result.before).float().mean().item(),
            "raised_at_last_step": (result.hard_scores[-1] > result.before).float().mean().item(),
            "accuracy_before": _accuracy(held_out, result.start_images, labels),
            "accuracy_after": _accuracy(held_out, result.images, labels),
            "seconds": seconds,
        }
    return {**rows, "step_over_forward": _cost(generator, tokenizer, reward)}


def _accuracy(held_out: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    logits = extract_features(images, extractor=held_out).logits
    assert logits is not None
    return class_accuracy(logits, labels)


def _cost(generator: OneStepGenerator, tokenizer: ImageTokenizer, reward: ClassifierReward) -> float:
    """Process time of a step over that of generator + decoder + reward forward, interleaved, medians of 9."""
    labels = balanced_labels(100, num_classes=10)
    noise = SampleRandom(0, range(100), device=tokenizer.codebook.device)
    e_in = generator.init(noise)
    condition = generator.model.encode(labels)

    @torch.inference_mode()
    def forward() -> None:
        soft = tokenizer.embed_soft(probabilities(generator.logits(e_in, condition)))
        reward(tokenizer.decode_embeddings(soft), labels)

    def run(steps: int) -> float:
        begin = time.process_time()
        optimize(generator, tokenizer, reward, labels, settings=TTEOSettings(steps=steps))
        return time.process_time() - begin

    ratios = []
    for _ in range(9):
        begin = time.process_time()
        forward()
        one = time.process_time() - begin
        ratios.append((run(6) - run(1)) / 5 / one)
    return statistics.median(ratios)
