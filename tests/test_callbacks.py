"""Averaged weights, whenever a checkpoint is written, and what a finished run leaves."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from distill import DiMO, SoftDiMO
from softgen import load_generator, load_tokenizer
from softgen.callbacks import ExportModel, ResumeCheckpoint, StopOnNonFinite, StudentEMA
from softgen.callbacks.ema import averaged_product
from softgen.data import Digits, Labels
from softgen.models import MaskedTransformer
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import OptimizerConfig, TokenizerTraining


def _module() -> SoftDiMO:
    torch.manual_seed(0)
    teacher = MaskedTransformer(num_codes=7, num_sites=5, num_classes=3, width=8, depth=1, heads=1)
    return SoftDiMO(teacher=teacher, objectives=[DiMO(guidance=1.5)], optimizer=OptimizerConfig(lr=1e-2))


def _trainer(*callbacks: Callback, steps: int = 6, validate: bool = False, checkpoints: bool = False) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1 if validate else 0,
        val_check_interval=2 if validate else None,
        check_val_every_n_epoch=None if validate else 1,
        use_distributed_sampler=False,
    )


class _Recorder(Callback):
    """Keeps the student's head after every step, and saves a checkpoint in the middle of validation."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.heads: list[torch.Tensor] = []
        self.validated: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        assert isinstance(pl_module, SoftDiMO)
        self.heads.append(pl_module.student.model.state_dict()["head.weight"].clone())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SoftDiMO)
        self.validated = pl_module.student.model.state_dict()["head.weight"].clone()
        if self.path is not None:
            trainer.save_checkpoint(self.path)


def _data() -> Labels:
    return Labels(num_classes=3, batch_size=8)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_average_follows_the_formula_and_is_exported(device: str | None, tmp_path: Path) -> None:
    module, recorder = _module(), _Recorder()
    start = module.student.model.state_dict()["head.weight"].clone()
    trainer = _trainer(StudentEMA(decay=0.5, device=device), recorder, ExportModel(run_dir=str(tmp_path)))

    trainer.fit(module, datamodule=_data())

    expected = start
    for step, head in enumerate(recorder.heads):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * head
    exported = load_generator(tmp_path / "model")
    torch.testing.assert_close(exported.model.state_dict()["head.weight"], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(module.student.model.state_dict()["head.weight"], recorder.heads[-1])
    assert exported.metadata["guidance"] == 1.5
    assert not exported.training


def test_an_average_that_is_used_again_starts_again() -> None:
    averages = []
    used = StudentEMA(decay=0.5)
    _trainer(used, steps=3).fit(_module(), datamodule=_data())
    for callback in (used, StudentEMA(decay=0.5)):
        _trainer(callback, steps=3).fit(_module(), datamodule=_data())
        averages.append(callback.state_dict())
    assert averages[0]["updates"] == averages[1]["updates"] == 3
    for name, value in averages[1]["average"].items():
        assert torch.equal(averages[0]["average"][name], value)


def test_a_restored_average_is_a_copy() -> None:
    first, second = StudentEMA(decay=0.5), StudentEMA(decay=0.5)
    _trainer(first, steps=3).fit(_module(), datamodule=_data())
    before = {name: value.clone() for name, value in first.state_dict()["average"].items()}
    second.load_state_dict(first.state_dict())
    _trainer(second, steps=3).fit(_module(), datamodule=_data())
    assert second.updates == 6
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict()["average"].items())


def test_checkpoint_in_the_middle_of_validation_holds_the_raw_weights(tmp_path: Path) -> None:
    module, recorder, ema = _module(), _Recorder(tmp_path / "mid.ckpt"), StudentEMA(decay=0.5)
    trainer = _trainer(ema, recorder, steps=4, validate=True)

    trainer.fit(module, datamodule=_data())

    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["student.model.head.weight"], recorder.heads[3])
    assert recorder.validated is not None
    assert not torch.equal(recorder.validated, recorder.heads[3])
    average = next(state for name, state in saved["callbacks"].items() if "StudentEMA" in name)["average"]
    assert torch.equal(average["model.head.weight"], recorder.validated)


def test_frozen_teacher_stays_out_of_the_checkpoint_and_in_eval_mode(tmp_path: Path) -> None:
    module = _module()
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    _trainer(StudentEMA()).fit(module, datamodule=_data())
    module.train()
    assert not module.teacher.training
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "objectives"}
    assert all(torch.equal(value, before[name]) for name, value in module.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_clipping_is_by_group() -> None:
    module = _module()
    clipped: dict[str, float] = {}

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
            assert isinstance(optimizer, torch.optim.Optimizer)
            for group in optimizer.param_groups:
                grads = [p.grad.flatten() for p in group["params"] if p.grad is not None]
                if grads:
                    clipped[group["name"]] = torch.cat(grads).norm().item()

    trainer = _trainer(Watch(), steps=4)
    trainer.gradient_clip_val = 1e-3
    trainer.fit(module, datamodule=_data())
    assert clipped.keys() == {"student", "auxiliary"}
    for norm in clipped.values():
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_student_stands_still_while_critics_learn_alone() -> None:
    module = _module()
    objective = next(iter(module.objectives))
    objective.critic_only_steps = 3  # type: ignore[assignment]
    start = module.student.model.state_dict()["head.weight"].clone()
    recorder = _Recorder()
    _trainer(recorder, steps=5).fit(module, datamodule=_data())
    assert all(torch.equal(head, start) for head in recorder.heads[:3])
    first_step = (recorder.heads[3] - start).abs().max().item()
    assert 0 < first_step <= 1.001e-2  # Adam's first step is at most lr: no moments were gathered before


def test_a_broken_gradient_behind_a_finite_loss_leaves_no_checkpoint(tmp_path: Path) -> None:
    class Break(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
            if trainer.global_step == 2:
                assert isinstance(module, SoftDiMO)
                head = module.student.model.get_parameter("head.bias")
                assert head.grad is not None
                head.grad[0] = torch.nan

    for every in (3, 1000):
        run = tmp_path / str(every)
        callbacks = [StopOnNonFinite(), Break(), ResumeCheckpoint(run_dir=str(run), every_n_steps=every)]
        trainer = _trainer(*callbacks, steps=3, checkpoints=True)
        with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity after step 3$"):
            trainer.fit(_module(), datamodule=Labels(num_classes=3, batch_size=8))
        assert not list(run.rglob("*.ckpt"))


def test_averages_of_half_precision_are_kept_in_float32() -> None:
    ema, module = StudentEMA(decay=0.9999), _module().bfloat16()
    trainer = _trainer()
    ema.on_fit_start(trainer, module)
    weight = module.student.model.get_parameter("head.weight")
    before = ema.state_dict()["average"]["model.head.weight"].clone()
    assert before.dtype == torch.float32
    ema.updates = 10**6
    with torch.no_grad():
        weight.add_(1)
    ema._last_step = -1  # one step more than at the last look
    ema.on_train_batch_end(trainer, module)
    moved = ema.state_dict()["average"]["model.head.weight"] - before
    torch.testing.assert_close(moved, 1e-4 * (weight.detach().float() - before), rtol=1e-2, atol=1e-7)
    with ema.averaged(module):
        assert weight.dtype == torch.bfloat16


def test_averaged_codes_are_unit_vectors(tmp_path: Path) -> None:
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=16, code_dim=4, channels=[8, 8])
    module = TokenizerTraining(tokenizer=tokenizer, warmup_steps=1, optimizer=OptimizerConfig(lr=1e-2))
    trainer = _trainer(StudentEMA(decay=0.9), ExportModel(run_dir=str(tmp_path)), steps=6)
    trainer.fit(module, datamodule=Digits(batch_size=64))
    codes = load_tokenizer(tmp_path / "model").codebook
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(16), atol=1e-6, rtol=0)


def test_nothing_trained_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    module = _module()
    with pytest.warns(UserWarning, match="Nothing was trained"):
        _trainer(ExportModel(run_dir=str(tmp_path)), steps=0).fit(module, datamodule=_data())
    assert not (tmp_path / "model").exists()


def test_settings_outside_their_range() -> None:
    with pytest.raises(ValueError, match=r"StudentEMA.decay: expected a number in \[0, 1\), got 1.0"):
        StudentEMA(decay=1.0)
    with pytest.raises(ValueError, match=r"^StudentEMA.device: expected a device of torch, got 'nowhere'$"):
        StudentEMA(device="nowhere")


def test_averaging_inside_validation_leaves_the_average_in_place(tmp_path: Path) -> None:
    heads: dict[str, torch.Tensor] = {}

    class Nested(Callback):
        def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            with averaged_product(trainer, pl_module) as product, averaged_product(trainer, pl_module):
                heads["inside"] = product.state_dict()["model.head.weight"].clone()
            heads["after"] = product.state_dict()["model.head.weight"].clone()

    module, ema = _module(), StudentEMA(decay=0.5)
    recorder = _Recorder(tmp_path / "mid.ckpt")
    _trainer(ema, Nested(), recorder, steps=2, validate=True).fit(module, datamodule=_data())

    average = ema.state_dict()["average"]["model.head.weight"]
    assert recorder.validated is not None
    assert all(torch.equal(head, average) for head in (heads["inside"], heads["after"], recorder.validated))
    assert not torch.equal(average, recorder.heads[-1])
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["student.model.head.weight"], recorder.heads[-1])
    assert torch.equal(module.student.model.state_dict()["head.weight"], recorder.heads[-1])


@pytest.mark.parametrize("averaging", [True, False])
def test_averaged_product_between_steps(averaging: bool) -> None:
    module, ema, recorder = _module(), StudentEMA(decay=0.5), _Recorder()
    trainer = _trainer(*([ema] if averaging else []), recorder, steps=2)
    trainer.fit(module, datamodule=_data())
    raw = recorder.heads[-1]
    with averaged_product(trainer, module) as product:
        assert product is module.student
        expected = ema.state_dict()["average"]["model.head.weight"] if averaging else raw
        assert torch.equal(product.state_dict()["model.head.weight"], expected)
        assert torch.equal(expected, raw) != averaging
    assert torch.equal(module.student.model.state_dict()["head.weight"], raw)
    with suppress(KeyError), averaged_product(trainer, module):
        raise KeyError
    assert torch.equal(module.student.model.state_dict()["head.weight"], raw)


def test_constants_that_no_checkpoint_holds_are_not_averaged() -> None:
    """An attention mask of minus infinities would become NaN."""
    module, ema = _module(), StudentEMA(decay=0.5)
    mask = torch.full((2, 2), -torch.inf)
    module.student.register_buffer("mask", mask, persistent=False)
    _trainer(ema).fit(module, datamodule=_data())
    with ema.averaged(module):
        assert torch.equal(module.student.get_buffer("mask"), mask)
