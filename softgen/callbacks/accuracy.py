"""Watches that the samples stay of the class asked for, by an independent classifier."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from softgen.callbacks.ema import averaged_product
from softgen.generation import balanced_labels, generate, one_step_tokens
from softgen.metrics.accuracy import class_accuracy
from softgen.metrics.classifier import SmallClassifier
from softgen.metrics.features import extract_features
from softgen.models.generator import OneStepGenerator
from softgen.pretrained import fingerprint
from softgen.tokenizers.base import ImageTokenizer
from softgen.training.stage import Stage


class AccuracyWatch(Callback):
    """Warns when class accuracy falls by more than `max_drop` below what it was before training.

    The same samples are drawn before training, at every validation and at the end, with averaged weights, so that the
    comparison is paired.

    Args:
        classifier: Folder of a `SmallClassifier` that nothing in the run is trained against; None does not watch.
        samples: Images drawn each time.
        max_drop: Largest fall that passes without a warning, in [0, 1]: 0.02 is two points.
        batch_size: Images a pass.

    Raises:
        ValueError: A setting is out of range, or (when fitting starts) the classifier is missing or does not go with
            the generator, or there is no class-conditional one-step generator to watch.
    """

    def __init__(
        self, *, classifier: str | None = None, samples: int = 1000, max_drop: float = 0.02, batch_size: int = 250
    ) -> None:
        for name, value in (("samples", samples), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"accuracy_watch.{name}: expected at least 1, got {value}")
        if not 0 <= max_drop <= 1:
            raise ValueError(f"accuracy_watch.max_drop: expected a number in [0, 1], got {max_drop}")
        self.classifier = classifier
        self.samples = samples
        self.max_drop = max_drop
        self.batch_size = batch_size
        self._judge: SmallClassifier | None = None
        self._before: float | None = None
        self._measured_with: tuple[str, int] | None = None
        self._is_restored = False

    @property
    def watching(self) -> bool:
        """Whether there is a classifier."""
        return self.classifier is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the classifier."""
        if not self._is_restored:
            self._before = None
        self._is_restored = False
        if self.classifier is None:
            return
        assert isinstance(pl_module, Stage)
        generator, tokenizer = pl_module.product, pl_module.tokenizer_beside
        if not isinstance(generator, OneStepGenerator) or not generator.model.num_classes or tokenizer is None:
            raise ValueError(
                "accuracy_watch.classifier: expected none, since the stage trains no class-conditional one-step "
                f"generator, got {self.classifier}"
            )
        with torch.random.fork_rng(devices=[]):  # building a module draws its weights
            self._judge = SmallClassifier.from_pretrained(self.classifier, key="accuracy_watch.classifier")
        for name, expected, got in (
            ("num_classes", generator.model.num_classes, self._judge.num_classes),
            ("image_size", tokenizer.image_size, self._judge.image_size),
        ):
            if expected != got:
                raise ValueError(f"accuracy_watch.classifier: expected {name} {expected}, got {got}")
        self._judge.to(pl_module.device)
        now = (fingerprint(self._judge), self.samples)
        if self._before is not None and self._measured_with != now:
            rank_zero_warn(
                "accuracy_watch: the accuracy before training was measured with another classifier or number of "
                "samples; this run measures it anew, where it resumes"
            )
            self._before = None
        self._measured_with = now

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What was restored is not for the next run."""
        self._is_restored = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step; a resumed run knows what it was."""
        if self._judge is not None and self._before is None:
            self._before = self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and compare."""
        if self._judge is not None and self._before is not None and not trainer.sanity_checking:
            pl_module.log("val/accuracy", self._compare(trainer, pl_module), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last look."""
        if self._judge is not None and self._before is not None:
            self._compare(trainer, pl_module)

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> float:
        assert self._before is not None
        now = self._measure(trainer, pl_module)
        if now < self._before - self.max_drop:
            rank_zero_warn(
                f"Class accuracy of the samples fell from {self._before:.1%} to {now:.1%} by step "
                f"{trainer.global_step} ({self.samples} samples, classifier {self.classifier}): the run is trading "
                "what was asked for against its objectives"
            )
        return now

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> float:
        assert isinstance(pl_module, Stage)
        assert self._judge is not None
        tokenizer = pl_module.frozen("tokenizer")
        assert isinstance(tokenizer, ImageTokenizer)
        precision = trainer.precision_plugin.forward_context()
        with averaged_product(trainer, pl_module) as generator, precision:
            assert isinstance(generator, OneStepGenerator)
            labels = balanced_labels(self.samples, num_classes=generator.model.num_classes)
            training = generator.training
            generator.eval()
            made = generate(
                one_step_tokens(generator), tokenizer, labels, seed=pl_module.seed, batch_size=self.batch_size
            )
            generator.train(training)
        seen = extract_features(made.images, extractor=self._judge)
        assert seen.logits is not None
        return class_accuracy(seen.logits, labels)

    def state_dict(self) -> dict[str, Any]:
        """The accuracy before training, and what it was measured with."""
        return {"before": self._before, "measured_with": self._measured_with}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._before, self._measured_with = state_dict["before"], state_dict["measured_with"]
        self._is_restored = True
