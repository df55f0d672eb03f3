"""All published rewards at once, in one Soft-Di[M]O objective and in one TTEO run."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))
pytest.importorskip("transformers")

from tiny_checkpoints import BUILDERS

from distill import DiMO, Reward, SoftDiMO
from rewards import CLIPReward, CompositeReward
from rewards import Reward as RewardModel
from softgen.data import Labels
from softgen.models import MaskedTransformer
from softgen.tokenizers import ConvVQTokenizer
from tteo import TTEOSettings, optimize

NAMES = ["zero", "one", "two"]


@pytest.fixture
def rewards(tmp_path: Path) -> list[RewardModel]:
    found: list[RewardModel] = []
    for name, build in sorted(BUILDERS.items()):
        (tmp_path / name).mkdir()
        found.append(build(tmp_path / name))
    from tiny_checkpoints import architecture

    found.append(CLIPReward(architecture(tmp_path), pretrained="random"))
    for reward in found:
        reward.class_names = tuple(NAMES)
    return found


def _stage(rewards: list[RewardModel]) -> SoftDiMO:
    torch.manual_seed(0)
    tokenizer = ConvVQTokenizer(image_size=16, num_codes=7, code_dim=4, channels=[8, 8])
    teacher = MaskedTransformer(num_codes=7, num_sites=64, num_classes=3, width=16, depth=1, heads=2)
    return SoftDiMO(teacher=teacher, tokenizer=tokenizer, objectives=[DiMO(), Reward(rewards=rewards, micro_batch=1)])


def test_six_rewards_in_one_objective(rewards: list[RewardModel]) -> None:
    stage = _stage(rewards)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, datamodule=Labels(num_classes=3, batch_size=2))
    values = stage.latest_values
    assert {f"reward_score_{reward.name}" for reward in rewards} <= set(values)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in values.values())


def test_six_rewards_at_test_time(rewards: list[RewardModel]) -> None:
    stage = _stage(rewards)
    assert stage.tokenizer is not None
    composite = CompositeReward(rewards)
    result = optimize(
        stage.student, stage.tokenizer, composite, torch.tensor([0, 2]), settings=TTEOSettings(steps=2, lr=1.0)
    )
    assert result.soft_scores.isfinite().all()
    assert not torch.equal(result.soft_scores[0], result.soft_scores[1])
