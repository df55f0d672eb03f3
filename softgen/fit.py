"""Train a stage: `python -m softgen.fit --config configs/digits/1_tokenizer.yaml`.

`fit` is understood when no subcommand is given; `validate`, `test` and `predict` are the others.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from softgen.callbacks import (
    AccuracyWatch,
    ExportModel,
    MemoryPlan,
    ResumeCheckpoint,
    SampleGrid,
    StepProgress,
    StopOnNonFinite,
    StudentEMA,
    latest_checkpoint,
    read_checkpoint,
)
from softgen.cli import OneLineErrors, quiet_lightning, user_errors
from softgen.data.base import ImageDataModule
from softgen.pretrained import check_keys
from softgen.training.stage import Stage

PROGRAM = "softgen.fit"


class StageParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""

    program = PROGRAM


class StageCLI(LightningCLI):
    """LightningCLI for stages: one seed, one run folder, one path to resume from."""

    _checkpoint_weights: dict[str, Any] | None = None

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Replaces Lightning's `--seed_everything`."""
        parser.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and all noise.")
        parser.add_argument("--run_dir", type=str, default="runs/run", help="Folder that the run writes to.")
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads; 1 is fastest for small models."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks that every stage has, and what follows from `--seed` and `--run_dir`."""
        parser.add_lightning_class_args(StudentEMA, "ema")
        parser.add_lightning_class_args(ResumeCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SampleGrid, "samples")
        parser.add_lightning_class_args(AccuracyWatch, "accuracy_watch")
        parser.link_arguments("run_dir", "checkpoint.run_dir")
        parser.link_arguments("run_dir", "samples.run_dir")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed", "model.init_args.seed")
        parser.link_arguments("seed", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words given; Lightning warns when those of the process are others."""
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        config = self._options()
        if config.threads is not None:
            if config.threads < 1:
                raise ValueError(f"threads: expected at least 1, got {config.threads}")
            torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)  # numbers that small make a processor slow and say nothing
        if not 0 <= config.seed < 2**32:
            raise ValueError(f"seed: expected a number from 0 to 2^32 - 1, got {config.seed}")
        seed_everything(config.seed, workers=True, verbose=False)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyperparameters override the command line: the command line wins."""

    def _options(self) -> Any:
        return self.config[self.config["subcommand"]]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the loggers of the run folder and the callbacks that are not up for choice."""
        run_dir = self._options().run_dir
        given = self._get(self.config_init, "trainer")
        if given["logger"] is None:
            kwargs["logger"] = _loggers(run_dir)
        callbacks = given["callbacks"] or []
        chosen = callbacks if isinstance(callbacks, list) else [callbacks]
        if given["enable_progress_bar"] is False or any(isinstance(one, ProgressBar) for one in chosen):
            ours = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [one for one in ours if not isinstance(one, StepProgress)]
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, ExportModel(run_dir=run_dir))  # type: ignore[attr-defined]
        return trainer

    def before_instantiate_classes(self) -> None:
        """A checkpoint is looked at before anything is built."""
        options = self._options()
        fitting = self.config["subcommand"] == "fit"
        if options.get("ckpt_path") is None and fitting:
            return
        if options.get("ckpt_path") in (None, "last"):
            found = latest_checkpoint(options.run_dir)
            if found is None and not fitting:
                raise ValueError(f"ckpt_path: expected a checkpoint, got none in {options.run_dir}")
            options.ckpt_path = str(found) if found is not None else None
            note = f"resuming from {found}" if found is not None else "no checkpoint yet, starting anew"
            print(f"{PROGRAM}: {note}", file=sys.stderr)
        if options.ckpt_path is not None:
            self._checkpoint_weights = read_checkpoint(Path(options.ckpt_path))["state_dict"]

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another model, and data of another kind, before any work."""
        assert isinstance(self.model, Stage)
        if not isinstance(self.datamodule, ImageDataModule):
            raise ValueError(f"data: expected an ImageDataModule, got {type(self.datamodule).__name__}")
        self.model.check_data(self.datamodule)
        if self._checkpoint_weights is not None:
            check_keys(self.model.state_dict(), self._checkpoint_weights, key="ckpt_path")
            self._options().weights_only = True


def _loggers(run_dir: str) -> list[Any]:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    csv = CSVLogger(run_dir, name="logs")
    return [csv, TensorBoardLogger(run_dir, name="logs", version=csv.version)]


def main(args: list[str] | None = None, *, cli_class: type[StageCLI] = StageCLI) -> StageCLI:
    """Run the command; returns what was built, for use from Python.

    Args:
        args: Command-line words; by default those of the process.
        cli_class: The CLI to build.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] not in cli_class.subcommands():
        words.insert(0, "fit")
    quiet_lightning()
    StageParser.words = words
    try:
        with user_errors(PROGRAM):
            return cli_class(
                Stage,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                parser_class=StageParser,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,
                seed_everything_default=False,
                load_from_checkpoint_support=False,
                trainer_defaults={
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                    "num_sanity_val_steps": 0,
                    "callbacks": [StopOnNonFinite(), MemoryPlan(), StepProgress()],
                },
                args=words,
            )
    except SIGTERMException as stopped:
        # Lightning would leave with code 0; whoever waits for this command must not go on to the next stage.
        raise SystemExit(128 + signal.SIGTERM) from stopped


if __name__ == "__main__":
    main()
