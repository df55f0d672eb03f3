"""An automatic weight at its largest no longer keeps the ratio that was asked for: that is told."""

import pytest
from lightning.pytorch import Trainer

from distill import DiMO, Sharpen, SoftDiMO
from softgen.data import Labels
from softgen.models import MaskedTransformer


@pytest.mark.parametrize(("ratio", "warned"), [(1e9, 1), (1e-3, 0)])
def test_an_automatic_weight_that_is_cut_is_told(ratio: float, warned: int, recwarn: pytest.WarningsRecorder) -> None:
    teacher = MaskedTransformer(num_codes=7, num_sites=16, num_classes=10, width=8, depth=1, heads=1)
    objectives = [DiMO(guidance=1.5), Sharpen(weight="auto", weight_ratio=ratio)]
    module = SoftDiMO(teacher=teacher, objectives=objectives)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Labels(num_classes=10, batch_size=8))

    module.on_validation_epoch_end()

    told = [str(warning.message) for warning in recwarn if "automatic weight" in str(warning.message)]
    assert told == warned * [
        "sharpen: its automatic weight is at its largest, 1000; its gradient stays below 1e+09 times (weight_ratio) "
        "that of the first objective"
    ]
