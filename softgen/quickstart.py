"""From real images to a one-step generator, with a report: `python -m softgen.quickstart`."""

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from softgen.callbacks import latest_checkpoint
from softgen.class_evaluation import named_protocol
from softgen.classifier import classifier
from softgen.cli import fail, run_command
from softgen.data.base import ImageDataModule
from softgen.files import write_json
from softgen.generation import (
    Generated,
    TokenSource,
    balanced_labels,
    generate,
    one_step_tokens,
    teacher_tokens,
)
from softgen.loading import load_generator, load_model, load_tokenizer
from softgen.metrics.accuracy import class_log_probability
from softgen.metrics.classifier import SmallClassifier
from softgen.models.base import MaskedDiffusionModel
from softgen.pretrained import CONFIG_NAME
from softgen.quickstart_page import Row, Run, write_page
from softgen.recipes import find_recipe
from softgen.sample import check_positive, check_writable
from softgen.sampling import MaskGITSampler
from softgen.tokenizers.base import ImageTokenizer

PROGRAM = "softgen.quickstart"
TEACHER_STEPS = (1, 4, 8, 16)
_SHOWN = 60
_TTEO = ["--settings.steps=10", "--settings.lr=1.0", "--settings.batch_size=256"]


def quickstart(
    *,
    data: Literal["digits", "fashion_mnist"] = "digits",
    data_root: str = "data/fashion_mnist",
    out: str = "runs/quickstart",
    seed: int = 0,
    n: int = 0,
    threads: int = 1,
    resume: bool = False,
    refine: bool = True,
    overrides: list[str] = [],  # noqa: B006 - never changed; jsonargparse shows it
) -> None:
    """Train tokenizer, teacher and one-step student, refine it, score all, and write report.html and metrics.json.

    Args:
        data: Data set; the digits come with scikit-learn.
        data_root: Folder of Fashion-MNIST's files.
        out: Folder to write to.
        seed: Of weights, data order and all noise.
        n: Images that each figure is measured on; 0 takes 1797 for digits, 10,000 for Fashion-MNIST.
        threads: CPU threads; 1 is fastest for these small models.
        refine: Go on from Di[M]O with the GAN, the reward and TTEO.
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
    parts = 8 if refine else 5
    _say(f"1/{parts}  classifier that the figures are measured with, and a judge for the reward")
    protocol = named_protocol(data, data_root=data_root, folder=str(folder / "extractor"))
    _say(f"     {protocol.accuracy:.1%} of held-out images classified rightly")
    if not (folder / "judge" / CONFIG_NAME).is_file():
        classifier(data_name=data, data_root=data_root, out=str(folder / "judge"))
    judge = SmallClassifier.load(folder / "judge")
    run = Run(recipe=recipe, out=folder, seed=seed, protocol=protocol, judge=judge)
    count = n or recipe.samples

    common = [*overrides, f"--threads={threads}", *(["--ckpt_path=last"] if resume else [])]
    rooted = [*common, f"--data.init_args.root={data_root}"] if data == "fashion_mnist" else common
    _say(f"2/{parts}  tokenizer: images to a few codes, and back")
    _fit(run, "1_tokenizer", rooted)
    _score_tokenizer(run, _reference(data, data_root), n=count)
    _say(f"3/{parts}  teacher: predicts masked codes, many passes an image")
    _fit(run, "2_teacher", rooted)
    _say(f"4/{parts}  Di[M]O: distils the teacher into one pass")
    _fit(run, "3_dimo", common)
    if refine:
        _say(f"5/{parts}  GAN: the frozen teacher tells real from drawn")
        _fit(run, "4_gan", rooted)
        _say(f"6/{parts}  reward: a judge looks through the decoder")
        _fit(run, "5_reward", common)
        _say(f"7/{parts}  TTEO: the input embedding of each image climbs the reward")
        _optimise(run, n=count)
    _say(f"{parts}/{parts}  sampling and scoring")
    guidance = _score_generators(run, n=count)
    if refine:
        _score_optimised(run, n=count)

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
    write_page(run, name=name, guidance=guidance, wall=wall)
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
    words = [f"--config={run.recipe.write_config(stage, run.out)}", f"--seed={run.seed}"]
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
            reward=class_log_probability(images, labels, classifier=run.judge),
            seconds=round(seconds, 3),
        )
    )
    run.shown[name] = images[:_SHOWN]


def _optimise(run: Run, *, n: int) -> None:
    """`python -m tteo` in this process; by name, since softgen stands below it."""
    start = time.perf_counter()
    labels = balanced_labels(n, num_classes=run.recipe.num_classes).tolist()
    importlib.import_module("tteo.__main__").main(
        [
            f"--generator={run.model('4_gan')}",
            f"--label={labels}",
            "--reward=rewards.ClassifierReward",
            f"--reward.init_args.classifier={run.out / 'judge'}",
            f"--out={run.folder('6_tteo')}",
            f"--seed={run.seed}",
            *_TTEO,
        ]
    )
    run.stage_seconds["6_tteo"] = time.perf_counter() - start


def _score_optimised(run: Run, *, n: int) -> None:
    tokenizer = load_tokenizer(run.model("4_gan"))
    labels = balanced_labels(n, num_classes=run.recipe.num_classes)
    result = load_file(run.folder("6_tteo") / "result.safetensors")
    with torch.inference_mode():
        before = tokenizer.decode(result["start_tokens"][:_SHOWN])
        images = torch.cat([tokenizer.decode(part) for part in torch.split(result["tokens"], 256)])
    _add(run, "tteo", images, labels, run.stage_seconds["6_tteo"])
    run.shown["tteo_before"] = before


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
    for name, stage in (("dimo_gan", "4_gan"), ("dimo_reward", "5_reward")):
        if stage in run.stage_seconds:
            sources[name] = one_step_tokens(load_generator(run.model(stage)))
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


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    try:
        run_command(quickstart, program=PROGRAM, args=args)
    except KeyboardInterrupt:
        fail("interrupted; run `python -m softgen.fit ... --ckpt_path last` to resume a stage", program=PROGRAM)


if __name__ == "__main__":
    main()
