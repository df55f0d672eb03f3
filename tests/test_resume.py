"""A run that is killed and resumed ends bit-equal to one that never stopped."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softgen.callbacks import checkpoints, latest_checkpoint
from softgen.fit import main
from softgen.models import MaskedTransformer
from softgen.training import Stage

TOKENIZER = [
    "--model=softgen.training.TokenizerTraining",
    "--model.init_args.tokenizer=softgen.tokenizers.ConvVQTokenizer",
    "--model.init_args.tokenizer.init_args.image_size=8",
    "--model.init_args.tokenizer.init_args.num_codes=16",
    "--model.init_args.tokenizer.init_args.channels=[8,8]",
    "--model.init_args.warmup_steps=4",
    "--data=softgen.data.Digits",
    "--data.init_args.batch_size=256",
]
DISTILL = [
    "--model=distill.SoftDiMO",
    "--model.init_args.optimizer.decay=cosine",
    "--model.init_args.optimizer.lr=0.001",
    "--data=softgen.data.Labels",
    "--data.init_args.num_classes=3",
    "--data.init_args.samples_per_epoch=40",
    "--data.init_args.batch_size=8",
]


def _teacher(folder: Path) -> str:
    torch.manual_seed(0)
    teacher = MaskedTransformer(num_codes=7, num_sites=5, num_classes=3, width=16, depth=2, heads=2)
    teacher.save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def _options(stage: str, folder: Path) -> list[str]:
    extra = ["--trainer.accumulate_grad_batches=2"] if stage.startswith("accumulating") else []
    if "tokenizer" in stage:
        return [*TOKENIZER, *extra]
    return [*DISTILL, *extra, f"--model.init_args.teacher={_teacher(folder)}"]


def _fit(options: list[str], run_dir: Path, *extra: str) -> None:
    main(
        [
            f"--run_dir={run_dir}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=17",
            "--trainer.limit_val_batches=1",
            "--trainer.val_check_interval=5",
            "--trainer.logger=false",
            "--checkpoint.every_n_steps=3",
            "--seed=5",
            *options,
            *extra,
        ]
    )


def _in_child(action: Callable[[], None]) -> int:
    """Run in a forked process; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die_after(batches: int, options: list[str], run_dir: Path) -> None:
    report = Stage.report

    def counting(self: Stage, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal batches
        if batches == 0:
            _kill_self()
        batches -= 1
        return report(self, *args, **kwargs)  # type: ignore[arg-type]

    Stage.report = counting  # type: ignore[method-assign, assignment]
    _fit(options, run_dir)


def _same_tensors(first: Path, second: Path) -> None:
    left, right = load_file(first), load_file(second)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    ("stage", "killed_after"), [("tokenizer", 11), ("distill", 4), ("distill", 13), ("accumulating", 23)]
)
def test_killed_run_resumes_bit_equal(stage: str, killed_after: int, tmp_path: Path) -> None:
    options = _options(stage, tmp_path)
    _fit(options, tmp_path / "whole")
    died_of = _in_child(lambda: _run_and_die_after(killed_after, options, tmp_path / "killed"))
    assert died_of == signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()

    _fit(options, tmp_path / "killed", "--ckpt_path=last")

    _same_tensors(tmp_path / "whole/model/model.safetensors", tmp_path / "killed/model/model.safetensors")
    whole = checkpoints.read_checkpoint(tmp_path / "whole/checkpoints/step_00000017.ckpt")
    killed = checkpoints.read_checkpoint(tmp_path / "killed/checkpoints/step_00000017.ckpt")
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, killed["state_dict"][name]), name
    for index, state in whole["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg"], killed["optimizer_states"][0]["state"][index]["exp_avg"])


def _run_and_be_told_to_stop_after(batches: int, options: list[str], run_dir: Path) -> None:
    report = Stage.report

    def counting(self: Stage, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal batches
        batches -= 1
        if batches == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(self, *args, **kwargs)  # type: ignore[arg-type]

    Stage.report = counting  # type: ignore[method-assign, assignment]
    _fit(options, run_dir)


@pytest.mark.parametrize(
    ("stage", "batches", "step"),
    [
        ("accumulating", 12, 7),
        ("accumulating", 13, 7),
        ("accumulating", 1, None),
        ("accumulating tokenizer", 8, 4),  # its codes have just begun
        ("accumulating tokenizer", 13, 7),
    ],
)
def test_a_run_that_is_told_to_stop_within_a_step_resumes_bit_equal(
    stage: str, batches: int, step: int | None, tmp_path: Path
) -> None:
    """The gradients of a step that is not complete are lost, and its batches come again.

    An epoch of five batches has three steps, of two, two and one.
    """
    options = _options(stage, tmp_path)
    _fit(options, tmp_path / "whole")
    _in_child(lambda: _run_and_be_told_to_stop_after(batches, options, tmp_path / "told"))
    found = latest_checkpoint(tmp_path / "told")
    assert found == (tmp_path / f"told/checkpoints/step_{step:08d}.ckpt" if step else None)

    if found is not None:
        _fit(options, tmp_path / "told", "--ckpt_path=last")
        _same_tensors(tmp_path / "whole/model/model.safetensors", tmp_path / "told/model/model.safetensors")


def _run_and_be_told_to_stop_in_validation(validation: int, options: list[str], run_dir: Path) -> None:
    def counting(self: Stage) -> None:
        nonlocal validation
        validation -= 1
        if validation == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    Stage.on_validation_start = counting  # type: ignore[method-assign]
    _fit(options, run_dir)


@pytest.mark.parametrize(
    ("stage", "interval", "step"),
    [("distill", 2, 4), ("distill", 5, 10), ("accumulating", 3, 4), ("accumulating tokenizer", 4, 5)],
)
def test_a_run_that_is_told_to_stop_in_validation_resumes_bit_equal(
    stage: str, interval: int, step: int, tmp_path: Path
) -> None:
    """In the middle of an epoch, at its end, and within an accumulated step; the weights are averaged ones then."""
    options = [*_options(stage, tmp_path), f"--trainer.val_check_interval={interval}", "--trainer.limit_val_batches=2"]
    _fit(options, tmp_path / "whole")
    _in_child(lambda: _run_and_be_told_to_stop_in_validation(2, options, tmp_path / "told"))
    assert latest_checkpoint(tmp_path / "told") == tmp_path / f"told/checkpoints/step_{step:08d}.ckpt"

    _fit(options, tmp_path / "told", "--ckpt_path=last")
    _same_tensors(tmp_path / "whole/model/model.safetensors", tmp_path / "told/model/model.safetensors")


def test_global_draws_are_those_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout takes no generator; its masks must not depend on where a run was interrupted."""
    report, drawn = Stage.report, []

    def drawing(self: Stage, *args: object, **kwargs: object) -> torch.Tensor:
        drawn.append(torch.rand(()).item())
        return report(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Stage, "report", drawing)
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "whole")
    whole = list(drawn)
    assert len(set(whole)) == 17
    (tmp_path / "whole/checkpoints/step_00000017.ckpt").unlink()
    _fit(options, tmp_path / "whole", "--ckpt_path=last")
    assert drawn[17:] == whole[15:]


def _run_and_die_while_saving(options: list[str], run_dir: Path) -> None:
    save = torch.save
    saves = 0

    def dying(value: object, file: object, *args: object, **kwargs: object) -> None:
        nonlocal saves
        saves += 1
        if saves < 3:
            save(value, file, *args, **kwargs)  # type: ignore[arg-type]
            return
        target = next((run_dir / "checkpoints").iterdir()).parent / ".step_00000009.ckpt.partial"
        target.write_bytes(b"PK half a checkpoint")
        _kill_self()

    torch.save = dying
    _fit(options, run_dir)


def test_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    assert _in_child(lambda: _run_and_die_while_saving(options, tmp_path / "run")) == signal.SIGKILL

    found = latest_checkpoint(tmp_path / "run")

    assert found == tmp_path / "run/checkpoints/step_00000006.ckpt"
    _fit(options, tmp_path / "run", "--ckpt_path=last")
    _fit(options, tmp_path / "whole")
    _same_tensors(tmp_path / "whole/model/model.safetensors", tmp_path / "run/model/model.safetensors")


def test_truncated_checkpoint_is_passed_over(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_00000017.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])

    with pytest.warns(UserWarning, match="Passing over a damaged checkpoint"):
        found = latest_checkpoint(tmp_path / "run")

    assert found == tmp_path / "run/checkpoints/step_00000015.ckpt"


def test_command_line_wins_over_the_checkpoint(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run")

    cli = main(
        [
            *options,
            f"--run_dir={tmp_path / 'run'}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=20",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            "--model.init_args.temperature=0.5",
            "--model.init_args.optimizer.lr=0.0005",
            "--model.init_args.optimizer.betas=[0.5,0.9]",
            "--model.init_args.optimizer.warmup_steps=0",
            "--model.init_args.optimizer.decay=linear",
            "--model.init_args.optimizer.final_factor=0.5",
            "--ckpt_path=last",
        ]
    )

    assert cli.model.temperature == 0.5
    assert cli.trainer.global_step == 20
    (schedule,) = [config.scheduler for config in cli.trainer.lr_scheduler_configs]
    for group in schedule.optimizer.param_groups:
        assert group["betas"] == (0.5, 0.9)
        assert group["lr"] == pytest.approx(0.5 * 0.0005)


def test_the_first_step_after_a_resume_has_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run")
    seen: list[float] = []

    def note(self: Stage, optimizer: torch.optim.Optimizer) -> None:
        seen.extend(group["lr"] for group in optimizer.param_groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "on_before_optimizer_step", note)
        patch.setattr("distill.SoftDiMO.on_before_optimizer_step", note)
        rate = ["--model.init_args.optimizer.lr=0.0004", "--model.init_args.optimizer.warmup_steps=0"]
        rate.append("--model.init_args.optimizer.decay=constant")
        _fit(options, tmp_path / "run", "--trainer.max_steps=18", *rate, "--ckpt_path=last")
    assert set(seen) == {0.0004}


def test_newly_trained_weights_need_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run", "--trainer.max_steps=3")
    with pytest.raises(SystemExit):
        _fit(options, tmp_path / "run", "--model.init_args.freeze_embedding=false", "--ckpt_path=last")
    expected = "ckpt_path: expected a checkpoint with an average of model.token_embedding.weight, which this run trains"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["--trainer.enable_progress_bar=false", "--trainer.callbacks=TQDMProgressBar"])
def test_the_progress_bar_can_be_another_or_none(choice: str, tmp_path: Path) -> None:
    words = [*_options("distill", tmp_path), "--trainer.max_steps=2", choice]
    _fit(words, tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()


def test_second_run_in_the_same_folder(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run")
    first = load_file(tmp_path / "run/model/model.safetensors")

    with pytest.warns(UserWarning, match="held checkpoints of an earlier run"):
        _fit(options, tmp_path / "run", "--seed=6", "--trainer.max_steps=8")

    aside = tmp_path / "run/checkpoints_before_1"
    assert sorted(path.name for path in aside.iterdir()) == ["step_00000015.ckpt", "step_00000017.ckpt"]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoints/step_00000008.ckpt"
    second = load_file(tmp_path / "run/model/model.safetensors")
    assert not torch.equal(first["model.head.weight"], second["model.head.weight"])


def test_going_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run")

    with pytest.warns(UserWarning, match="held checkpoints of an earlier run"):
        _fit(
            options,
            tmp_path / "run",
            f"--ckpt_path={tmp_path / 'run/checkpoints/step_00000015.ckpt'}",
            "--trainer.max_steps=16",
        )

    assert [path.name for path in (tmp_path / "run/checkpoints_before_1").iterdir()] == ["step_00000017.ckpt"]
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoints/step_00000016.ckpt"


def test_checkpoint_of_another_teacher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options("distill", tmp_path)
    _fit(options, tmp_path / "run")
    other = MaskedTransformer(num_codes=7, num_sites=5, num_classes=3, width=16, depth=2, heads=2)
    other.save_pretrained(tmp_path / "teacher")

    with pytest.raises(SystemExit) as stop:
        _fit(options, tmp_path / "run", "--ckpt_path=last", "--trainer.max_steps=20")

    assert stop.value.code == 2
    assert "model.teacher: expected the teacher that the checkpoint was trained with" in capsys.readouterr().err
