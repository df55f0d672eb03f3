"""The watch on class accuracy: what it measures, when it warns, and that training does not notice it."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from distill import GAN, DiMO, Objective, Reward, SoftDiMO
from rewards import Reward as RewardModel
from softgen.callbacks import AccuracyWatch, StudentEMA
from softgen.data import Digits, ImageDataModule, Labels
from softgen.metrics import SmallClassifier
from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.random import SampleRandom, derive_seed
from softgen.testing import ToyMaskedModel, ToyTokenizer
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import OptimizerConfig, Stage, TokenizerTraining

SITES, SAMPLES, SEED = 4, 60, 3
FELL = "Class accuracy of the samples fell"


def _toy(*, right: float = 0.9) -> ToyMaskedModel:
    """Two classes of four independent sites, whose code is the class with probability `right`."""
    digits = torch.cartesian_prod(*[torch.arange(2)] * SITES)
    tables = [torch.where(digits == label, right, 1 - right).prod(dim=1).view([2] * SITES) for label in (0, 1)]
    return ToyMaskedModel(joint=torch.stack(tables))


def _module(*, lr: float = 0.0) -> SoftDiMO:
    student = OneStepGenerator(_toy(), r_init=1.0, noise=0.0)
    return SoftDiMO(
        teacher=_toy(),
        tokenizer=ToyTokenizer(num_codes=2, patch=2),
        student=student,
        objectives=[DiMO(guidance=1.0)],
        optimizer=OptimizerConfig(lr=lr),
        seed=SEED,
    )


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    """Class 1 where more than two of the four patches are white, else class 0."""
    model = SmallClassifier(name="net", image_size=4, num_classes=2, width=1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        for layer in model.body:
            if isinstance(layer, nn.Conv2d):
                layer.weight[0, 0, 1, 1] = 1  # white stays 1, black, which is -1, becomes 0
            elif isinstance(layer, nn.BatchNorm2d):
                layer.weight.fill_(1)
        model.neck.weight[0, :4] = 1
        model.head.weight[1, 0] = 1
        model.head.bias[0] = 2.5
    model.save(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def _accuracy(model: ToyMaskedModel) -> float:
    """What the watch has to find, from the documented stream of draws."""
    labels = torch.arange(SAMPLES) % 2
    noise = SampleRandom(derive_seed(SEED, "generate"), range(SAMPLES), device=torch.device("cpu"))
    with torch.no_grad():
        tokens = OneStepGenerator(model, r_init=1.0, noise=0.0).sample(model.encode(labels), noise)
    return ((tokens.sum(dim=1) > 2).long() == labels).double().mean().item()


class _Corrupt(Callback):
    """Puts another table in the student's place when a step is reached."""

    def __init__(self, *, at: int, right: float = 0.1) -> None:
        self.at = at
        self.right = right

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._corrupt(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._corrupt(trainer, pl_module)

    def _corrupt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SoftDiMO)
        if trainer.global_step == self.at:
            pl_module.student.model.load_state_dict(_toy(right=self.right).state_dict())


def _watch(classifier: str | None, *, max_drop: float = 0.02) -> AccuracyWatch:
    return AccuracyWatch(classifier=classifier, samples=SAMPLES, batch_size=16, max_drop=max_drop)


def _trainer(*callbacks: Callback, steps: int = 4, validate: bool = True) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1 if validate else 0,
        val_check_interval=2 if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        use_distributed_sampler=False,
    )


def _data() -> Labels:
    return Labels(2, batch_size=4)


def _warnings_of(trainer: Trainer, module: Stage, data: ImageDataModule, *, ckpt_path: str | None = None) -> list[str]:
    """The warnings that this package gave in a fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return [str(warning.message) for warning in caught if str(warning.message).startswith("Class accuracy")]


def test_samples_of_the_other_class_are_warned_of(classifier: str) -> None:
    before, after = _accuracy(_toy()), _accuracy(_toy(right=0.1))
    assert after < 0.1 < 0.9 < before
    trainer = _trainer(_Corrupt(at=2), _watch(classifier), steps=3)
    caught = _warnings_of(trainer, _module(), _data())
    message = (
        f"{FELL} from {before:.1%} to {after:.1%} by step {{}} ({SAMPLES} samples, classifier {classifier}): "
        "the run is trading what was asked for against its objectives"
    )
    assert caught == [message.format(2), message.format(3)]  # at the validation and at the end
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx(after)


def test_silent_while_accuracy_holds(classifier: str) -> None:
    trainer = _trainer(_watch(classifier, max_drop=0.0))
    assert _warnings_of(trainer, _module(), _data()) == []
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx(_accuracy(_toy()))


def test_max_drop_is_the_largest_fall_that_passes(classifier: str) -> None:
    fall = _accuracy(_toy()) - _accuracy(_toy(right=0.7))
    assert fall > 0.1
    for max_drop, expected in ((fall + 1e-6, 0), (fall - 1e-6, 1)):
        trainer = _trainer(_Corrupt(at=2, right=0.7), _watch(classifier, max_drop=max_drop), validate=False)
        assert len(_warnings_of(trainer, _module(), _data())) == expected


class _WarmAverage(StudentEMA):
    """Past the warm-up of the decay: two steps hardly move the average."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.updates = 10_000


def test_averaged_weights_are_what_is_measured(classifier: str) -> None:
    trainer = _trainer(_Corrupt(at=2), _WarmAverage(decay=0.99), _watch(classifier))
    module = _module()
    assert _warnings_of(trainer, module, _data()) == []
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx(_accuracy(_toy()))
    assert torch.equal(module.student.model.state_dict()["log_joint"], _toy(right=0.1).log_joint)


def test_accuracy_before_training_survives_a_resume(classifier: str, tmp_path: Path) -> None:
    trainer = _trainer(_watch(classifier), steps=2)
    assert _warnings_of(trainer, _module(), _data()) == []
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    trainer = _trainer(_Corrupt(at=2), _watch(classifier), steps=4, validate=False)
    caught = _warnings_of(trainer, _module(), _data(), ckpt_path=str(tmp_path / "run.ckpt"))

    assert len(caught) == 1
    assert caught[0].startswith(f"{FELL} from {_accuracy(_toy()):.1%} to {_accuracy(_toy(right=0.1)):.1%} by step 4")


def test_a_watched_run_goes_on_unwatched(classifier: str, tmp_path: Path) -> None:
    trainer = _trainer(_watch(classifier), steps=2)
    trainer.fit(_module(), datamodule=_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer = _trainer(_Corrupt(at=2), _watch(None), steps=4)
    assert _warnings_of(trainer, _module(), _data(), ckpt_path=str(tmp_path / "run.ckpt")) == []
    assert trainer.global_step == 4


def test_a_watch_that_is_used_again_measures_again(classifier: str) -> None:
    watch = _watch(classifier)
    _trainer(watch, steps=2).fit(_module(), datamodule=_data())
    other = _module()
    other.student.model.load_state_dict(_toy(right=0.1).state_dict())
    assert _warnings_of(_trainer(watch, steps=2), other, _data()) == []


@dataclass
class _Sight:
    """What a measurement must leave alone: the global random state, the modes, the student's weights."""

    random_state: Tensor
    modes: list[bool]
    weights: list[Tensor]


class _Witness(Callback):
    """Looks at each hook that the watch has."""

    def __init__(self) -> None:
        self.seen: dict[str, _Sight] = {}

    def _look(self, hook: str, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SoftDiMO)
        self.seen[f"{hook} {trainer.global_step}"] = _Sight(
            random_state=torch.get_rng_state(),
            modes=[module.training for module in pl_module.modules()],
            weights=[value.clone() for value in pl_module.student.state_dict().values()],
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look("fit start", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look("train start", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look("validation", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look("train end", trainer, pl_module)


@pytest.mark.parametrize("hook", ["fit start 0", "train start 0", "validation 2", "validation 4", "train end 4"])
def test_random_state_modes_and_weights_are_left_alone(classifier: str, hook: str) -> None:
    witnesses = _Witness(), _Witness()
    callbacks = [StudentEMA(decay=0.5), witnesses[0], _watch(classifier), witnesses[1]]
    _trainer(*callbacks).fit(_module(lr=0.01), datamodule=_data())
    before, after = (witness.seen[hook] for witness in witnesses)
    assert torch.equal(before.random_state, after.random_state)
    assert before.modes == after.modes
    assert any(before.modes) == ("validation" not in hook)
    assert all(torch.equal(*pair) for pair in zip(before.weights, after.weights, strict=True))


def test_a_watched_run_ends_bit_equal_to_one_that_is_not(classifier: str) -> None:
    ends = []
    for watch in (_watch(None), _watch(classifier)):
        torch.manual_seed(0)
        module = _module(lr=0.01)
        trainer = _trainer(StudentEMA(decay=0.5), watch)
        trainer.fit(module, datamodule=_data())
        assert ("val/accuracy" in trainer.callback_metrics) == watch.watching
        ends.append(module.student.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_validation_alone_of_a_watched_checkpoint(classifier: str, tmp_path: Path) -> None:
    trainer = _trainer(_watch(classifier), steps=2)
    trainer.fit(_module(), datamodule=_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    (metrics,) = _trainer(_watch(classifier)).validate(
        _module(), datamodule=_data(), ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True, verbose=False
    )
    assert "val/max_probability" in metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "accuracy_watch.samples: expected at least 1, got 0"),
        ({"batch_size": 0}, "accuracy_watch.batch_size: expected at least 1, got 0"),
        ({"max_drop": -0.1}, "accuracy_watch.max_drop: expected a number in [0, 1], got -0.1"),
        ({"max_drop": float("nan")}, "accuracy_watch.max_drop: expected a number in [0, 1], got nan"),
        ({"max_drop": 2.0}, "accuracy_watch.max_drop: expected a number in [0, 1], got 2.0"),
    ],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AccuracyWatch(**options)  # type: ignore[arg-type]


def test_a_classifier_that_does_not_go_with_the_generator_is_refused(tmp_path: Path) -> None:
    SmallClassifier(name="net", image_size=4, num_classes=3, width=1).save(tmp_path / "three")
    SmallClassifier(name="net", image_size=8, num_classes=2, width=1).save(tmp_path / "large")
    ToyTokenizer().save_pretrained(tmp_path / "other")
    for folder, message in (
        ("three", "expected num_classes 2, got 3"),
        ("large", "expected image_size 4, got 8"),
        ("other", f"expected a SmallClassifier in {tmp_path}/other, got a ToyTokenizer"),
        ("gone", f"expected a folder or a hub id 'owner/name', got '{tmp_path}/gone'"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'accuracy_watch.classifier: {message}')}$"):
            _trainer(_watch(str(tmp_path / folder))).fit(_module(), datamodule=_data())


def test_a_stage_without_classes_or_generator_is_refused(classifier: str) -> None:
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=16, channels=[8, 8])
    unconditional = MaskedTransformer(num_codes=2, num_sites=4, num_classes=0, width=8, depth=1, heads=1)
    stages: list[tuple[Stage, ImageDataModule]] = [
        (TokenizerTraining(tokenizer=tokenizer, warmup_steps=1, optimizer=OptimizerConfig()), Digits()),
        (
            SoftDiMO(
                teacher=unconditional, tokenizer=ToyTokenizer(num_codes=2, patch=2), objectives=[DiMO(guidance=1.0)]
            ),
            _data(),
        ),
        (SoftDiMO(teacher=_toy(), objectives=[DiMO(guidance=1.0)]), _data()),
    ]
    message = (
        "accuracy_watch.classifier: expected none, since the stage trains no class-conditional one-step generator, "
        f"got {classifier}"
    )
    for stage, data in stages:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            _trainer(_watch(classifier)).fit(stage, datamodule=data)


class _Brightness(RewardModel):
    takes = "any"

    def forward(self, images: Tensor, conditions: object) -> Tensor:
        return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("named", "classes", "warned"),
    [("", 10, False), ("gan", 10, True), ("reward", 10, True), ("gan, reward", 10, True), ("gan, reward", 0, False)],
)
def test_refining_unwatched_classes_is_warned_of(named: str, classes: int, warned: bool, tmp_path: Path) -> None:
    SmallClassifier(name="net", image_size=8, num_classes=10, width=1).save(tmp_path / "net")

    def caught(*callbacks: Callback) -> list[str]:
        teacher = MaskedTransformer(num_codes=7, num_sites=16, num_classes=classes, width=8, depth=1, heads=1)
        objectives: list[Objective] = [DiMO(guidance=1.0)]
        if "gan" in named:
            objectives.append(GAN())
        if "reward" in named:
            objectives.append(Reward(rewards=[_Brightness()]))
        tokenizer = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
        module = SoftDiMO(teacher=teacher, tokenizer=tokenizer, objectives=objectives)
        return _warnings_of(_trainer(*callbacks, steps=1, validate=False), module, Digits(batch_size=8))

    message = (
        f"Class accuracy is not watched while {named} moves the student: "
        "accuracy_watch.classifier takes the folder of an independent classifier"
    )
    assert caught() == caught(_watch(None)) == ([message] if warned else [])
    if classes:
        assert caught(_watch(str(tmp_path / "net"), max_drop=1.0)) == []
