"""Two gloo processes on the CPU: identical weights, and one process's loss at the same global batch."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softgen.fit import main
from softgen.models import MaskedTransformer
from softgen.tokenizers import ConvVQTokenizer
from softgen.training import Stage

STEPS = 6


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _options(stage: str, folder: Path) -> list[str]:
    torch.manual_seed(0)
    tokenizer = ConvVQTokenizer(image_size=8, num_codes=7, channels=[8, 8])
    teacher = MaskedTransformer(num_codes=7, num_sites=16, num_classes=10, width=16, depth=2, heads=2)
    teacher.save_pretrained(folder / "teacher", tokenizer=tokenizer)
    if stage == "distill":
        return [
            "--model=distill.SoftDiMO",
            f"--model.init_args.teacher={folder / 'teacher'}",
            "--model.init_args.optimizer.lr=0.001",
            "--data=softgen.data.Labels",
            "--data.init_args.num_classes=10",
        ]
    if stage == "teacher":
        return [
            "--model=softgen.training.TeacherTraining",
            f"--model.init_args.tokenizer={folder / 'teacher'}",
            "--model.init_args.model=softgen.models.MaskedTransformer",
            "--model.init_args.model.num_codes=7",
            "--model.init_args.model.num_sites=16",
            "--model.init_args.model.num_classes=10",
            "--model.init_args.model.width=16",
            "--model.init_args.model.depth=2",
            "--model.init_args.model.heads=2",
            "--data=softgen.data.Digits",
        ]
    return [
        "--model=softgen.training.TokenizerTraining",
        "--model.init_args.tokenizer=softgen.tokenizers.ConvVQTokenizer",
        "--model.init_args.tokenizer.image_size=8",
        "--model.init_args.tokenizer.num_codes=16",
        "--model.init_args.tokenizer.channels=[8,8]",
        "--model.init_args.warmup_steps=2",
        "--data=softgen.data.Digits",
    ]


def _train(
    options: list[str], folder: Path, *, batch_size: int, devices: int, accumulate: int = 1, validate: bool = False
) -> None:
    """Fit, and write this rank's losses, what validation measured at the end, and final weights to `folder`."""
    losses: list[list[float]] = []
    report = Stage.report

    def recording(self: Stage, batch: object, named: dict[str, Tensor], logs: object) -> Tensor:
        losses.append([loss.item() for loss in named.values()])
        return report(self, batch, named, logs)  # type: ignore[arg-type]

    Stage.report = recording  # type: ignore[method-assign, assignment]
    try:
        cli = main(
            [
                *options,
                f"--data.init_args.batch_size={batch_size}",
                f"--run_dir={folder}",
                "--trainer.accelerator=cpu",
                f"--trainer.devices={devices}",
                f"--trainer.strategy={'ddp' if devices > 1 else 'auto'}",
                f"--trainer.accumulate_grad_batches={accumulate}",
                f"--trainer.max_steps={STEPS}",
                f"--trainer.val_check_interval={STEPS}",
                "--trainer.check_val_every_n_epoch=null",
                "--trainer.num_sanity_val_steps=0",
                f"--trainer.limit_val_batches={1.0 if validate else 0}",
                "--trainer.gradient_clip_val=1.0",
                "--trainer.logger=false",
            ]
        )
    finally:
        Stage.report = report  # type: ignore[method-assign]
    rank = os.environ.get("RANK", "0")
    (folder / f"losses_{rank}.json").write_text(json.dumps(losses))
    measured = {name: value.item() for name, value in cli.trainer.callback_metrics.items() if name.startswith("val/")}
    (folder / f"validation_{rank}.json").write_text(json.dumps(measured))
    torch.save(cli.model.state_dict(), folder / f"weights_{rank}.pt")


def _train_on_two(options: list[str], folder: Path, *, batch_size: int, validate: bool = False) -> None:
    port, children = str(_free_port()), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # What torchrun sets.
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE="2",
                    LOCAL_WORLD_SIZE="2",
                    GROUP_RANK="0",
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                    TORCHELASTIC_RUN_ID="test",
                )
                _train(options, folder, batch_size=batch_size, devices=2, validate=validate)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0]


def _losses(folder: Path, rank: int = 0) -> Tensor:
    return torch.tensor(json.loads((folder / f"losses_{rank}.json").read_text()))


def _validation(folder: Path, rank: int = 0) -> dict[str, float]:
    measured: dict[str, float] = json.loads((folder / f"validation_{rank}.json").read_text())
    return measured


def _weights(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(folder / f"weights_{rank}.pt", weights_only=True)
    return weights


@pytest.mark.parametrize("stage", ["tokenizer", "teacher", "distill"])
def test_two_processes(stage: str, tmp_path: Path) -> None:
    options = _options(stage, tmp_path)
    _train_on_two(options, tmp_path / "two", batch_size=8)

    on_two = _weights(tmp_path / "two")
    for name, value in _weights(tmp_path / "two", 1).items():
        assert torch.equal(value, on_two[name]), name
    if stage == "tokenizer":
        return  # the codes of one process start from latents that two processes do not both see
    _train(options, tmp_path / "one", batch_size=16, devices=1)
    mean = (_losses(tmp_path / "two", 0) + _losses(tmp_path / "two", 1)) / 2
    torch.testing.assert_close(mean, _losses(tmp_path / "one"), atol=1e-5, rtol=0)
    for name, value in _weights(tmp_path / "one").items():
        torch.testing.assert_close(on_two[name], value, atol=1e-3, rtol=0)


def test_two_processes_validate_what_one_does(tmp_path: Path) -> None:
    """359 held-out digits: 7 are left for the last batch, fewer than the 16 of a process."""
    options = _options("teacher", tmp_path)
    _train_on_two(options, tmp_path / "two", batch_size=16, validate=True)
    _train(options, tmp_path / "one", batch_size=32, devices=1, validate=True)
    expected = _validation(tmp_path / "one")
    assert expected.keys() == {"val/hard"}
    for rank in range(2):
        assert _validation(tmp_path / "two", rank) == pytest.approx(expected, abs=1e-4)


def test_accumulated_parts_see_the_draws_of_the_whole_batch(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    _train(options, tmp_path / "whole", batch_size=16, devices=1)
    _train(options, tmp_path / "parts", batch_size=8, devices=1, accumulate=2)
    # The first step, before any weight has moved: Di[M]O's term is a mean over the batch, so parts average to it.
    whole, parts = _losses(tmp_path / "whole")[0, 0], _losses(tmp_path / "parts")[:2, 0]
    torch.testing.assert_close(parts.mean(), whole, atol=1e-6, rtol=0)
