"""Score a teacher or a one-step generator: `python -m softgen.evaluate --model runs/digits/3_dimo/model`."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from softgen.classifier import RECIPES, named_data
from softgen.cli import run_command
from softgen.data.base import ImageDataModule
from softgen.flow import FlowSampler
from softgen.generation import (
    TokenSource,
    autoregressive_tokens,
    balanced_labels,
    flow_latents,
    generate,
    one_step_tokens,
    teacher_tokens,
)
from softgen.geneval import read_geneval_metadata, read_geneval_results
from softgen.guidance import check_guidance
from softgen.loading import check_compatible, check_latents, load_continuous_tokenizer, load_tokenizer
from softgen.metrics.protocol import Protocol, small_protocol
from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import MaskedDiffusionModel
from softgen.models.generator import OneStepGenerator
from softgen.models.sit import SiT
from softgen.pretrained import CONFIG_NAME, Pretrained, fingerprint
from softgen.prompt_evaluation import (
    check_text_conditional,
    open_clip_model,
    shapes_rows,
    write_geneval_images,
)
from softgen.sample import (
    backbone_of,
    check_finite,
    check_masked_sampler,
    check_positive,
    check_writable,
    choose_device,
    flow_method,
)
from softgen.sampling import AutoregressiveSampler, HaltonSampler, MaskGITSampler
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer

PROGRAM = "softgen.evaluate"


@dataclass(frozen=True)
class Row:
    """One line of a table: `fd` is the Frechet distance that the protocol names."""

    name: str
    protocol: str
    fd: float
    n: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    entropy_score: float | None
    seconds: float


def evaluate(
    *,
    model: str | None = None,
    task: Literal["classes", "shapes", "geneval"] = "classes",
    metadata: str | None = None,
    images: str | None = None,
    results: str | None = None,
    data: ImageDataModule | None = None,
    data_name: Literal["digits", "fashion_mnist"] = "digits",
    data_root: str = "data/fashion_mnist",
    extractor: str | None = None,
    clip: str | None = None,
    tokenizer: str | None = None,
    n: int = 0,
    steps: list[int] = [8],  # noqa: B006 - never changed; jsonargparse shows it
    sampler: Literal["maskgit", "halton", "heun", "euler"] | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    confidence_noise: float = 4.5,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    out: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Print Frechet distance, class accuracy, precision and recall, or how many prompts were drawn right, with n.

    Args:
        model: Folder or hub id of a teacher, or of a one-step generator (which ignores the options of samplers), or of
            an autoregressive model (which takes temperature and guidance), or of a SiT (steps and guidance).
        task: `classes` for class-conditional models; for text-conditional ones `shapes`, the six tasks of GenEval on
            prompts of `softgen.data.Shapes` that no training shows, verified by a program; or `geneval` itself, whose
            evaluator runs elsewhere (arXiv 2310.11513): its images are written, or its results read.
        metadata: For `geneval`: its evaluation_metadata.jsonl.
        images: For `geneval`: folder to write four images of every prompt to, in its own layout.
        results: For `geneval`: the evaluator's result file, read back into a table; takes no model.
        data: Real images, as a data module (class_path and init_args); with it, `extractor` is required to exist.
        data_name: Real images known by name, where `data` is not given.
        data_root: Folder of Fashion-MNIST's files.
        extractor: Folder of the classifier whose features are compared; by default runs/<data_name>/extractor, where
            it is trained (fixed seed, under a minute) if it is not there yet.
        clip: For `shapes`: folder of a CLIP, whose mean cosine of picture and prompt is added.
        tokenizer: Folder or hub id; by default the one beside the model.
        n: Number of samples; 0 takes 1797 for digits, 1000 for prompts and 10,000 otherwise.
        steps: For a teacher or a SiT, one row for each number of steps.
        sampler: `maskgit` (by default) or `halton`; of a SiT `heun` (by default) or `euler`.
        guidance: Scale of classifier-free guidance; 1 is off.
        guidance_interval: Times of a SiT within which guidance is on; 0 is the data and 1 is noise.
        confidence_noise: Gumbel noise on the ranking of `maskgit`.
        temperature: Of the drawn codes.
        seed: Of the samples.
        batch_size: Images a pass.
        out: JSON file to write the rows to.
        device: Torch device; by default the best one present.
        threads: CPU threads; 1 is fastest for small models.

    Raises:
        ValueError: Naming the option, what was expected and what was got.
    """
    if results is not None:
        print_geneval_results(results, metadata=metadata, out=out)
        return
    if model is None:
        raise ValueError("model: expected a folder or hub id, got none")
    if task == "geneval" and (metadata is None or images is None):
        missing = "metadata" if metadata is None else "images"
        raise ValueError(f"{missing}: expected a path for task geneval, got none")
    if not n:
        n = 1000 if task == "shapes" else 1797 if data is None and data_name == "digits" else 10_000
    check_positive(n=n, batch_size=batch_size, threads=1 if threads is None else threads)
    check_finite(temperature=temperature, confidence_noise=confidence_noise)
    if not steps:
        raise ValueError("steps: expected at least one number of steps, got none")
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out: expected a JSON file, got the folder {out!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    target = choose_device(device)
    opened = Pretrained.from_pretrained(model, key="model").to(target)
    beside = tokenizer if tokenizer is not None else model
    if isinstance(opened, SiT):
        if task != "classes":
            raise ValueError(f"task: expected classes for a class-conditional model, got {task}")
        latents = load_continuous_tokenizer(beside).to(target)
        check_latents(opened, latents)
        flows = {
            count: FlowSampler(
                steps=count, method=flow_method(sampler), guidance=guidance, guidance_interval=guidance_interval
            )
            for count in steps
        }
        for flow in flows.values():
            flow.check(opened)
        if out is not None:
            check_writable(Path(out).parent)
        _score_classes(
            {f"{flow.method}_{count}": flow_latents(opened, flow, latents) for count, flow in flows.items()},
            latents,
            num_classes=opened.num_classes,
            protocol=_protocol(opened.num_classes, data, data_name, data_root, extractor),
            n=n,
            seed=seed,
            batch_size=batch_size,
            out=out,
            facts={"model": model, "seed": seed, "guidance": guidance},
        )
        return
    check_masked_sampler(sampler)
    backbone = backbone_of(opened, key="model")
    decoder = load_tokenizer(beside).to(target)
    check_compatible(backbone, decoder)
    check_guidance(backbone, guidance)
    sources = _sources(
        opened,
        steps=steps,
        sampler="halton" if sampler == "halton" else "maskgit",
        guidance=guidance,
        confidence_noise=confidence_noise,
        temperature=temperature,
    )
    if out is not None:
        check_writable(Path(out).parent)
    facts = {"model": model, "seed": seed, "guidance": guidance}
    if task == "shapes":
        check_text_conditional(backbone, task=task)
        judge = open_clip_model(clip)
        drawn = shapes_rows(
            sources, decoder, n=n, seed=seed, batch_size=batch_size, clip=None if judge is None else judge.to(target)
        )
        for line in drawn:
            print(line)
        if out is not None:
            write_json(Path(out), {**facts, "task": task, "rows": [asdict(line) for line in drawn]})
        return
    if task == "geneval":
        assert metadata is not None
        assert images is not None
        check_text_conditional(backbone, task=task)
        if len(sources) > 1:
            raise ValueError(f"steps: expected one number of steps for task geneval, got {len(sources)}")
        ((name, source),) = sources.items()
        made_by = (
            f"{model} ({fingerprint(opened)}), tokenizer {fingerprint(decoder)}, {name}, guidance {guidance:g}, "
            f"temperature {temperature:g}, confidence noise {confidence_noise:g}, seed {seed}"
        )
        rows_asked = read_geneval_metadata(metadata)
        write_geneval_images(
            source, decoder, Path(images), rows_asked, made_by=made_by, seed=seed, batch_size=batch_size
        )
        print(f"{len(rows_asked)} prompts, 4 images each: {images}")
        return
    if backbone.text_encoder is not None:
        raise ValueError(f"task: expected shapes or geneval for a text-conditional model, got {task}")
    _score_classes(
        sources,
        decoder,
        num_classes=backbone.num_classes,
        protocol=_protocol(backbone.num_classes, data, data_name, data_root, extractor),
        n=n,
        seed=seed,
        batch_size=batch_size,
        out=out,
        facts=facts,
    )


def _protocol(
    num_classes: int,
    data: ImageDataModule | None,
    data_name: Literal["digits", "fashion_mnist"],
    data_root: str,
    extractor: str | None,
) -> Protocol:
    """What real images the samples are compared with, and through which classifier."""
    if data is None:
        return named_protocol(data_name, data_root=data_root, folder=extractor)
    if extractor is None:
        raise ValueError("extractor: expected the folder of a classifier to go with data, got none")
    if num_classes and data.num_classes != num_classes:
        raise ValueError(f"data.num_classes: expected {num_classes} as the model has, got {data.num_classes}")
    if not (Path(extractor) / CONFIG_NAME).is_file():
        raise ValueError(f"extractor: expected the folder of a classifier, got {extractor!r}")
    return small_protocol(data, name=Path(extractor).name, epochs=8, folder=extractor)


def _score_classes(
    sources: Mapping[str, TokenSource],
    decoder: ImageTokenizer | ContinuousTokenizer,
    *,
    num_classes: int,
    protocol: Protocol,
    n: int,
    seed: int,
    batch_size: int,
    out: str | None,
    facts: Mapping[str, object],
) -> None:
    """Sample, score and print a row a source."""
    rows = []
    labels = balanced_labels(n, num_classes=num_classes)
    for name, source in sources.items():
        made = generate(source, decoder, labels, seed=seed, batch_size=batch_size, progress=name)
        quality = protocol.score(made.images, labels if num_classes else None)
        row = Row(name=name, protocol=protocol.name(n), seconds=round(made.seconds, 3), **asdict(quality))
        rows.append(row)
        print(_line(row))
    if out is not None:
        write_json(Path(out), {**facts, "rows": [asdict(row) for row in rows]})


def print_geneval_results(results: str, *, metadata: str | None, out: str | None) -> None:
    """Print the shares of the official evaluator's result file, and write them to a JSON file.

    Raises:
        ValueError: If there is no metadata, or the file does not match it.
    """
    if metadata is None:
        raise ValueError("metadata: expected the file that the images were made from, got none")
    scores = read_geneval_results(results, read_geneval_metadata(metadata))
    print("  ".join([*(f"{task} {share:.3f}" for task, share in scores.table.items()), f"n {scores.num_images}"]))
    if out is not None:
        write_json(Path(out), {"task": "geneval", "tasks": scores.table, "n": scores.num_images})


def _sources(
    opened: Pretrained,
    *,
    steps: Sequence[int],
    sampler: Literal["maskgit", "halton"],
    guidance: float,
    confidence_noise: float,
    temperature: float,
) -> dict[str, TokenSource]:
    """What a model can be sampled by, one row of the table each."""
    if isinstance(opened, OneStepGenerator):
        return {"one_step": one_step_tokens(opened, temperature=temperature)}
    if isinstance(opened, AutoregressiveTransformer):
        sampling = AutoregressiveSampler(temperature=temperature, guidance=guidance)
        return {"autoregressive": autoregressive_tokens(opened, sampling)}
    assert isinstance(opened, MaskedDiffusionModel)
    sources = {}
    for count in steps:
        chosen: MaskGITSampler | HaltonSampler = HaltonSampler(steps=count, guidance=guidance, temperature=temperature)
        if sampler == "maskgit":
            chosen = MaskGITSampler(
                steps=count, guidance=guidance, confidence_noise=confidence_noise, temperature=temperature
            )
        chosen.plan(opened)  # refused before any work
        sources[f"{sampler}_{count}"] = teacher_tokens(opened, chosen)
    return sources


def named_protocol(
    name: Literal["digits", "fashion_mnist"],
    *,
    data_root: str,
    folder: str | None = None,
    progress: bool = True,
) -> Protocol:
    """The protocol of a data set that comes with the toolkit: `digitsnet` or `fashionnet`."""
    from softgen.data import Digits

    recipe = RECIPES[name]
    return small_protocol(
        named_data(name, data_root=data_root),
        name=recipe.name,
        epochs=recipe.epochs,
        width=recipe.width,
        folder=folder if folder is not None else f"runs/{name}/extractor",
        reference=Digits(train_on_all=True) if name == "digits" else None,
        progress=progress,
    )


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(scratch, path)


def _line(row: Row) -> str:
    parts = [f"{row.name:12s} {row.protocol} {row.fd:.3f}"]
    for key in ("accuracy", "precision", "recall", "entropy_score"):
        value = getattr(row, key)
        if value is not None:
            parts.append(f"{key} {value:.3f}")
    return "  ".join([*parts, f"n {row.n}", f"sampling {row.seconds:.1f} s"])


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(evaluate, program=PROGRAM, args=args)


if __name__ == "__main__":
    main()
