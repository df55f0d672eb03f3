"""What is told: an automatic weight that is cut, and a softmax that passes no gradient."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer

from distill import GAN, DiMO, Objective, Sharpen, SoftDiMO
from distill.objectives.base import DistillState, ObjectiveLosses
from distill.symptoms import warn_of_lost_gradients
from softgen.data import Labels
from softgen.models import MaskedTransformer, OneStepGenerator
from softgen.relaxation import Relaxation
from softgen.testing import ToyTokenizer


@pytest.mark.parametrize(("ratio", "warned"), [(1e9, 1), (1e-3, 0)])
def test_an_automatic_weight_that_is_cut_is_told(ratio: float, warned: int, recwarn: pytest.WarningsRecorder) -> None:
    teacher = MaskedTransformer(num_codes=7, num_sites=16, num_classes=10, width=8, depth=1, heads=1)
    objectives = [DiMO(guidance=1.5), Sharpen(weight="auto", weight_ratio=ratio)]
    module = SoftDiMO(teacher=teacher, objectives=objectives)
    trainer = _trainer(max_steps=4, limit_val_batches=0)
    trainer.fit(module, datamodule=Labels(num_classes=10, batch_size=8))

    module.on_validation_epoch_end()

    told = [str(warning.message) for warning in recwarn if "automatic weight" in str(warning.message)]
    assert told == warned * [
        "sharpen: its automatic weight is at its largest, 1000; its gradient stays below 1e+09 times (weight_ratio) "
        "that of the first objective"
    ]


@pytest.mark.parametrize(("temperature", "warned"), [(1.0, 1), (9.0, 1), (16.0, 0)])
def test_a_relaxation_that_passes_no_gradient_is_told(
    temperature: float, warned: int, recwarn: pytest.WarningsRecorder
) -> None:
    objectives = [DiMO(), GAN(taps=[0], relaxation=Relaxation(temperature=temperature))]

    warn_of_lost_gradients(objectives, {"val/margin": torch.tensor(63.0)}, step=0)

    assert [str(warning.message) for warning in recwarn] == warned * [
        "gan: at half of the sites the largest logit is 63 above the second, so that hardly any gradient passes the "
        f"softmax at temperature {temperature:g}; raise GAN.relaxation.temperature and model.temperature together, to "
        "26 for example"
    ]


def test_validation_tells_of_lost_gradients(recwarn: pytest.WarningsRecorder) -> None:
    teacher = MaskedTransformer(num_codes=7, num_sites=4, num_classes=3, width=8, depth=2, heads=1)
    torch.nn.init.normal_(teacher.head.weight)
    student = OneStepGenerator(copy.deepcopy(teacher), logit_scale=1000.0)
    module = SoftDiMO(teacher=teacher, tokenizer=ToyTokenizer(num_codes=7), student=student, objectives=[_Relaxed()])
    _trainer(max_steps=1, limit_val_batches=1).validate(
        module, datamodule=Labels(num_classes=3, batch_size=8), verbose=False
    )
    assert any("relaxed: at half of the sites" in str(warning.message) for warning in recwarn)


def test_the_gap_is_measured_at_the_temperatures_of_training() -> None:
    teacher = MaskedTransformer(num_codes=7, num_sites=4, num_classes=3, width=8, depth=2, heads=1)
    torch.nn.init.normal_(teacher.head.weight)
    gaps = {}
    for temperature, sampled_at in ((1.0, 1.0), (1e6, 1e6)):
        student = OneStepGenerator(copy.deepcopy(teacher), logit_scale=1000.0)
        module = SoftDiMO(
            teacher=teacher,
            tokenizer=ToyTokenizer(num_codes=7),
            student=student,
            objectives=[_Relaxed(Relaxation(temperature=temperature))],
            temperature=sampled_at,
        )
        (values,) = _trainer(max_steps=1, limit_val_batches=1).validate(
            module, datamodule=Labels(num_classes=3, batch_size=64), verbose=False
        )
        gaps[temperature] = values["val/relaxation_gap"]
    assert gaps[1.0] < 0.02
    assert gaps[1e6] > 10 * gaps[1.0]


class _Relaxed(Objective):
    """Has a relaxation, and nothing to train."""

    name = "relaxed"

    def __init__(self, relaxation: Relaxation = Relaxation()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.relaxation = relaxation

    def forward(self, state: DistillState) -> ObjectiveLosses:
        raise NotImplementedError


def _trainer(*, max_steps: int, limit_val_batches: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        limit_val_batches=limit_val_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
