"""Score a teacher or a one-step generator: `python -m softgen.evaluate --model runs/digits/3_dimo/model`."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from softgen.class_evaluation import default_n, protocol_of, score_classes
from softgen.cli import run_command
from softgen.data.base import ImageDataModule
from softgen.files import write_json
from softgen.flow import FlowSampler
from softgen.generation import (
    TokenSource,
    autoregressive_tokens,
    flow_latents,
    one_step_tokens,
    teacher_tokens,
)
from softgen.geneval import read_geneval_metadata, read_geneval_results
from softgen.guidance import check_guidance
from softgen.loading import check_compatible, check_latents, load_continuous_tokenizer, load_tokenizer
from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import MaskedDiffusionModel
from softgen.models.generator import OneStepGenerator
from softgen.models.sit import SiT
from softgen.pretrained import Pretrained, fingerprint
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
    check_published_alone,
    check_writable,
    choose_device,
    flow_method,
)
from softgen.samplers import published_sampler
from softgen.sampling import AutoregressiveSampler, HaltonSampler, MaskGITSampler
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer

PROGRAM = "softgen.evaluate"


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
    statistics: str | None = None,
    inception_weights: str | None = None,
    clip: str | None = None,
    tokenizer: str | None = None,
    n: int = 0,
    steps: list[int] = [8],  # noqa: B006 - never changed; jsonargparse shows it
    sampler: Literal["maskgit", "halton", "published", "heun", "euler"] | None = None,
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
        data: Real images, as a data module (class_path and init_args); with it, `extractor` is required.
        data_name: Real images known by name, where `data` is not given.
        data_root: Folder of Fashion-MNIST's files.
        extractor: Folder of the classifier whose features are compared (`softgen.classifier` leaves one); by default
            runs/<data_name>/extractor, where it is trained (fixed seed, under a minute) if it is not there yet. Or
            `inception`, for a published FID: the network, the rounding and the stretching of ADM's evaluator.
        statistics: For `inception`, in place of `data`: .npz with `mu` and `sigma` of the real images, such as ADM's
            VIRTUAL_imagenet256_labeled.npz.
        inception_weights: For `inception`: file of its weights (pt_inception-2015-12-05-6726825d.pth); by default it
            is downloaded once.
        clip: For `shapes`: folder of a CLIP, whose mean cosine of picture and prompt is added.
        tokenizer: Folder or hub id; by default the one beside the model.
        n: Number of samples; 0 takes 1797 for digits, 1000 for prompts, 50,000 for `inception`, else 10,000.
        steps: For a teacher or a SiT, one row for each number of steps.
        sampler: `maskgit` (by default) or `halton`; or `published`, that of a published model's authors at their
            settings, which takes no steps, guidance, noise or temperature. Of a SiT `heun` (by default) or `euler`.
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
        is_digits = data is None and data_name == "digits"
        n = 1000 if task == "shapes" else default_n(extractor=extractor, is_digits=is_digits)
    check_positive(n=n, batch_size=batch_size, threads=1 if threads is None else threads)
    check_finite(temperature=temperature, confidence_noise=confidence_noise)
    if not steps:
        raise ValueError("steps: expected at least one number of steps, got none")
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out: expected a JSON file, got the folder {out!r}")
    if threads is not None:
        torch.set_num_threads(threads)
    target = choose_device(device)
    protocol_for = partial(
        protocol_of,
        data=data,
        data_name=data_name,
        data_root=data_root,
        extractor=extractor,
        statistics=statistics,
        inception_weights=inception_weights,
        device=target,
    )
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
        score_classes(
            {f"{flow.method}_{count}": flow_latents(opened, flow, latents) for count, flow in flows.items()},
            latents,
            num_classes=opened.num_classes,
            protocol=protocol_for(opened.num_classes, latents.image_size),
            n=n,
            seed=seed,
            batch_size=batch_size,
            out=out,
            facts={
                **_origin(model, opened, beside, latents, seed=seed),
                "guidance": guidance,
                "guidance_interval": guidance_interval,
            },
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
        sampler=sampler or "maskgit",
        guidance=guidance,
        confidence_noise=confidence_noise,
        temperature=temperature,
    )
    if out is not None:
        check_writable(Path(out).parent)
    settings = f"guidance {guidance:g}, temperature {temperature:g}, confidence noise {confidence_noise:g}"
    facts = _origin(model, opened, beside, decoder, seed=seed)
    if "published" in sources:
        assert isinstance(opened, MaskedDiffusionModel)
        settings = str(published_sampler(opened))
        facts["sampler"] = settings
    else:
        facts["temperature"] = temperature
        if not isinstance(opened, OneStepGenerator):
            facts["guidance"] = guidance
        if any(name.startswith("maskgit") for name in sources):
            facts["confidence_noise"] = confidence_noise
    if task == "shapes":
        check_text_conditional(backbone, task=task)
        judge = open_clip_model(clip, image_size=decoder.image_size)
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
        made_by = f"{model} ({fingerprint(opened)}), tokenizer {fingerprint(decoder)}, {name}, {settings}, seed {seed}"
        rows_asked = read_geneval_metadata(metadata)
        write_geneval_images(
            source, decoder, Path(images), rows_asked, made_by=made_by, seed=seed, batch_size=batch_size
        )
        print(f"{len(rows_asked)} prompts, 4 images each: {images}")
        return
    if backbone.text_encoder is not None:
        raise ValueError(f"task: expected shapes or geneval for a text-conditional model, got {task}")
    score_classes(
        sources,
        decoder,
        num_classes=backbone.num_classes,
        protocol=protocol_for(backbone.num_classes, decoder.image_size),
        n=n,
        seed=seed,
        batch_size=batch_size,
        out=out,
        facts=facts,
    )


def _origin(
    model: str, opened: Pretrained, beside: str, tokenizer: ImageTokenizer | ContinuousTokenizer, *, seed: int
) -> dict[str, object]:
    """What made the images, with short hashes of the weights: a folder may hold others tomorrow."""
    return {
        "model": model,
        "model_fingerprint": fingerprint(opened),
        "tokenizer": beside,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "seed": seed,
    }


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
    sampler: str,
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
    if sampler == "published":
        published = published_sampler(opened)
        check_published_alone(guidance=guidance, temperature=temperature, confidence_noise=confidence_noise)
        for count in steps:
            check_published_alone(steps=count)
        return {"published": teacher_tokens(opened, published)}
    sources = {}
    for count in steps:
        chosen: MaskGITSampler | HaltonSampler = HaltonSampler(steps=count, guidance=guidance, temperature=temperature)
        if sampler != "halton":
            chosen = MaskGITSampler(
                steps=count, guidance=guidance, confidence_noise=confidence_noise, temperature=temperature
            )
        chosen.plan(opened)  # refused before any work
        sources[f"{sampler}_{count}"] = teacher_tokens(opened, chosen)
    return sources


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(evaluate, program=PROGRAM, args=args)


if __name__ == "__main__":
    main()
