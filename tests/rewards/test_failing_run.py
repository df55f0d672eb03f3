"""A training run whose reward dies: one line, and the checkpoint of the step before stays whole."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from distill import DiMO, SoftDiMO
from distill import Reward as RewardObjective
from rewards import Reward
from rewards.isolated import WorkerError
from softgen.data import Labels
from softgen.models import MaskedTransformer
from softgen.tokenizers import ConvVQTokenizer


class Mortal(Reward):
    """Dies at one of its calls; the first is the probe, every other one a step."""

    takes = "any"

    def __init__(self, dies_at: int | None) -> None:
        super().__init__(name="mortal")
        self.calls, self.dies_at = 0, dies_at

    def forward(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        self.calls += 1
        if self.calls == self.dies_at:
            raise WorkerError("reward mortal: expected a worker that lives, got one that died twice")
        return images.square().mean(dim=(1, 2, 3))


def _fit(folder: Path, *, dies_at: int | None, resumed: Path | None = None) -> SoftDiMO:
    torch.manual_seed(0)
    tokenizer = ConvVQTokenizer(image_size=16, num_codes=7, code_dim=4, channels=[8, 8])
    teacher = MaskedTransformer(num_codes=7, num_sites=64, num_classes=3, width=16, depth=1, heads=2)
    stage = SoftDiMO(
        teacher=teacher, tokenizer=tokenizer, objectives=[DiMO(), RewardObjective(rewards=[Mortal(dies_at)])]
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, datamodule=Labels(num_classes=3, batch_size=2), ckpt_path=resumed, weights_only=True)
    return stage


def test_a_reward_that_dies_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^reward mortal: expected a worker that lives, got one that died twice$"):
        _fit(tmp_path / "dying", dies_at=3)
    (kept,) = (tmp_path / "dying").iterdir()
    assert kept.name == "step=1.ckpt"
    assert torch.load(kept, map_location="cpu", weights_only=True)["global_step"] == 1
    # It goes on from there as if nothing had happened.
    resumed = _fit(tmp_path / "resumed", dies_at=None, resumed=kept)
    whole = _fit(tmp_path / "whole", dies_at=None)
    for name, value in whole.student.state_dict().items():
        assert torch.equal(resumed.student.state_dict()[name], value), name
