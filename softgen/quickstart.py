"""From real images to a one-step generator, with a report: `python -m softgen.quickstart`."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from softgen.callbacks import latest_checkpoint
from softgen.cli import fail, run_command
from softgen.data.base import ImageDataModule
from softgen.evaluate import named_protocol, write_json
from softgen.generation import (
    Generated,
    TokenSource,
    balanced_labels,
    generate,
    one_step_tokens,
    teacher_tokens,
)
from softgen.loading import load_generator, load_model, load_tokenizer
from softgen.metrics.protocol import Protocol
from softgen.models.base import MaskedDiffusionModel
from softgen.recipes import Recipe, find_recipe
from softgen.report import Figure, Section, TableRow, write_report
from softgen.sample import check_positive, check_writable
from softgen.sampling import MaskGITSampler
from softgen.tokenizers.base import ImageTokenizer

PROGRAM = "softgen.quickstart"
TEACHER_STEPS = (1, 4, 8, 16)
_SHOWN = 60


@dataclass(frozen=True)
class Row:
    """One line of metrics.json. `seconds` is the wall time of sampling (for the tokenizer, of its round trip)."""

    name: str
    fd: float
    n: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    seconds: float


@dataclass
class Run:
    """What a quickstart gathers as it goes."""

    recipe: Recipe
    out: Path
    seed: int
    protocol: Protocol
    rows: list[Row] = field(default_factory=list)
    shown: dict[str, Tensor] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)

    def folder(self, stage: str) -> Path:
        """The run folder of a stage."""
        return self.out / stage

    def model(self, stage: str) -> str:
        """What a stage left for the next."""
        return str(self.folder(stage) / "model")


def quickstart(
    *,
    data: Literal["digits", "fashion_mnist"] = "digits",
    data_root: str = "data/fashion_mnist",
    out: str = "runs/quickstart",
    seed: int = 0,
    n: int = 0,
    threads: int = 1,
    resume: bool = False,
    overrides: list[str] = [],  # noqa: B006 - never changed; jsonargparse shows it
) -> None:
    """Train tokenizer, teacher and Di[M]O student, score them, and write report.html and metrics.json.

    Args:
        data: Data set; the digits come with scikit-learn.
        data_root: Folder of Fashion-MNIST's files.
        out: Folder to write to.
        seed: Of weights, data order and all noise.
        n: Images that each figure is measured on; 0 takes 1797 for digits, 10,000 for Fashion-MNIST.
        threads: CPU threads; 1 is fastest for these small models.
        resume: Go on from the last checkpoint of each stage in `out`; stages that are done are not run again.
        overrides: Further options for every stage, such as --trainer.max_steps=20.

    Raises:
        ValueError: Naming the option, what was expected and what was got.
    """
    check_positive(threads=threads, n=n or 1)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a number from 0 to 2^32 - 1, got {seed}")
    check_writable(Path(out))
    recipe = find_recipe(data)
    start = time.perf_counter()
    torch.set_num_threads(threads)
    folder = Path(out)
    _say(f"1/5  classifier that the figures are measured with -> {folder / 'extractor'}")
    protocol = named_protocol(data, data_root=data_root, folder=str(folder / "extractor"))
    _say(f"     {protocol.accuracy:.1%} of held-out images classified rightly")
    run = Run(recipe=recipe, out=folder, seed=seed, protocol=protocol)
    count = n or recipe.samples

    common = [*overrides, f"--threads={threads}", *(["--ckpt_path=last"] if resume else [])]
    rooted = [*common, f"--data.init_args.root={data_root}"] if data == "fashion_mnist" else common
    _say("2/5  tokenizer: images to a few codes, and back")
    _fit(run, "1_tokenizer", rooted)
    _score_tokenizer(run, _reference(data, data_root), n=count)
    _say("3/5  teacher: predicts masked codes, many passes an image")
    _fit(run, "2_teacher", [*rooted, f"--model.init_args.tokenizer={run.model('1_tokenizer')}"])
    _say("4/5  Di[M]O: distils the teacher into one pass")
    _fit(run, "3_dimo", [*common, f"--model.init_args.teacher={run.model('2_teacher')}"])
    _say("5/5  sampling and scoring")
    guidance = _score_generators(run, n=count)

    wall = time.perf_counter() - start
    name = protocol.name(count)
    metrics = {
        "protocol": name,
        "seed": seed,
        "guidance": guidance,
        "real_accuracy": protocol.accuracy,
        "wall_seconds": round(wall, 1),
        "stage_seconds": {stage: round(value, 1) for stage, value in run.stage_seconds.items()},
        "resumed": run.resumed,
        "rows": [asdict(row) for row in run.rows],
    }
    write_json(folder / "metrics.json", metrics)
    _write_report(run, name=name, guidance=guidance, wall=wall)
    for row in run.rows:
        print(f"{row.name:12s} {name} {row.fd:8.3f}   accuracy {row.accuracy or 0:.3f}   n {row.n}")
    print(f"report: {folder / 'report.html'}   ({wall:.0f} s)")


def _say(text: str) -> None:
    print(text, flush=True)


def _fit(run: Run, stage: str, options: Sequence[str]) -> None:
    from softgen.fit import main as fit

    start = time.perf_counter()
    if "--ckpt_path=last" in options and latest_checkpoint(run.folder(stage)) is not None:
        run.resumed.append(stage)
    words = [f"--config={run.recipe.config(stage)}", f"--run_dir={run.folder(stage)}", f"--seed={run.seed}"]
    fit([*words, *options])
    run.stage_seconds[stage] = time.perf_counter() - start


def _reference(data: str, data_root: str) -> ImageDataModule:
    from softgen.data import Digits, FashionMNIST

    return Digits(train_on_all=True) if data == "digits" else FashionMNIST(root=data_root)


def _add(run: Run, name: str, images: Tensor, labels: Tensor, seconds: float) -> None:
    quality = run.protocol.score(images, labels)
    run.rows.append(
        Row(
            name=name,
            fd=quality.fd,
            n=quality.n,
            accuracy=quality.accuracy,
            precision=quality.precision,
            recall=quality.recall,
            seconds=round(seconds, 3),
        )
    )
    run.shown[name] = images[:_SHOWN]


def _score_tokenizer(run: Run, data: ImageDataModule, *, n: int) -> None:
    """Reconstructions of held-out images where there are enough, else of the training images."""
    held_out = data.val_source()
    source = held_out if len(held_out) >= n else data.train_source()
    real = source.fetch(range(min(n, len(source))))
    tokenizer = load_tokenizer(run.model("1_tokenizer"))
    start = time.perf_counter()
    with torch.inference_mode():
        images = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in torch.split(real["image"], 256)])
    _add(run, "tokenizer", images, real["label"], time.perf_counter() - start)
    run.shown["real"] = real["image"][:_SHOWN]


def _score_generators(run: Run, *, n: int) -> float:
    """The teacher at several numbers of steps and the student, at the guidance that the student learned from."""
    generator = load_generator(run.model("3_dimo"))
    teacher, tokenizer = load_model(run.model("2_teacher")), load_tokenizer(run.model("2_teacher"))
    guidance = float(generator.metadata.get("guidance", 1.0))
    sources = _teacher_sources(teacher, guidance=guidance) | {"dimo": one_step_tokens(generator)}
    labels = balanced_labels(n, num_classes=run.recipe.num_classes)
    for name, source in sources.items():
        made = _generate(source, tokenizer, labels, name=name, seed=run.seed)
        _add(run, name, made.images, labels, made.seconds)
    return guidance


def _teacher_sources(teacher: MaskedDiffusionModel, *, guidance: float) -> dict[str, TokenSource]:
    return {
        f"teacher_{steps}": teacher_tokens(teacher, MaskGITSampler(steps=steps, guidance=guidance))
        for steps in TEACHER_STEPS
    }


def _generate(source: TokenSource, tokenizer: ImageTokenizer, labels: Tensor, *, name: str, seed: int) -> Generated:
    return generate(source, tokenizer, labels, seed=seed, progress=f"{name:10s}")


def _write_report(run: Run, *, name: str, guidance: float, wall: float) -> None:
    by_name = {row.name: row for row in run.rows}
    n = by_name["dimo"].n
    write_report(
        run.out / "report.html",
        title=f"softgen quickstart: {run.recipe.name}",
        lead="From real images to a generator that draws an image in one pass.",
        header=("", name, "class accuracy", "precision", "recall", "seconds to sample", "what it is"),
        rows=[_table_row(row) for row in run.rows],
        notes=(
            f"{name}: Frechet distance between {n:,} images and the real training images, on the features of a small "
            f"classifier (right on {run.protocol.accuracy:.1%} of held-out images; trained by this run with a fixed "
            "seed). Lower is better. Never compare it with an FID.",
            f"Seed {run.seed}; guidance {guidance:g} for the teacher in every row, as the student was distilled with "
            f"it; {wall:.0f} s in all, {torch.get_num_threads()} thread(s). "
            f"Command: python -m softgen.quickstart --data {run.recipe.name} --seed {run.seed}",
        ),
        sections=_sections(run),
    )


_MEANING = {
    "tokenizer": "real images, encoded and decoded: the floor of every row below",
    "teacher_1": "the teacher, one pass: what the student has to beat",
    "teacher_4": "the teacher, 4 passes",
    "teacher_8": "the teacher, 8 passes",
    "teacher_16": "the teacher, 16 passes",
    "dimo": "the student, one pass",
}


def _table_row(row: Row) -> TableRow:
    numbers = [f"{value:.3f}" if value is not None else "" for value in (row.accuracy, row.precision, row.recall)]
    cells = (row.name, f"{row.fd:.2f}", *numbers, f"{row.seconds:.2f}", _MEANING.get(row.name, ""))
    return TableRow(cells=cells, highlight=row.name == "dimo")


def _sections(run: Run) -> list[Section]:
    def section(stage: str, title: str, purpose: str, shown: dict[str, str], curves: dict[str, str]) -> Section:
        figures = [Figure(images=run.shown[name], caption=caption) for name, caption in shown.items()]
        logs = sorted((run.folder(stage) / "logs").glob("version_*/metrics.csv"))
        return Section(title, purpose, run.stage_seconds.get(stage), figures, curves, logs)

    best = min(
        (row for row in run.rows if row.name in ("teacher_4", "teacher_8", "teacher_16")),
        key=lambda row: row.fd,
    )
    return [
        section(
            "1_tokenizer",
            "1. Tokenizer",
            "Turns an image into a few codes out of a codebook, and back. Everything later happens in codes, and no "
            "generator can be better than what the tokenizer brings back.",
            {"real": "Real images.", "tokenizer": "The same, through the tokenizer."},
            {"train/mse": "squared error"},
        ),
        section(
            "2_teacher",
            "2. Teacher",
            "A masked diffusion model learns to fill in masked codes from the visible ones. Sampling starts from masks "
            "alone and fills them in over several passes: good, but slow.",
            {
                "teacher_1": "One pass: the codes do not know of each other.",
                best.name: f"{best.name.removeprefix('teacher_')} passes, its best here.",
            },
            {"train/hard": "cross-entropy of masked codes"},
        ),
        section(
            "3_dimo",
            "3. Di[M]O",
            "Distils the teacher into one pass: the student's codes are masked again, and its logits move until "
            "teacher and auxiliary model agree on what was there. It needs no images.",
            {"dimo": "The student: one pass."},
            {
                "train/dimo_divergence_per_site": "divergence a masked site",
                "train/dimo_critic": "auxiliary's cross-entropy",
            },
        ),
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    try:
        run_command(quickstart, program=PROGRAM, args=args)
    except KeyboardInterrupt:
        fail("interrupted; run `python -m softgen.fit ... --ckpt_path last` to resume a stage", program=PROGRAM)


if __name__ == "__main__":
    main()
