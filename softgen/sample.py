"""Write images from a teacher or a one-step generator: `python -m softgen.sample --model runs/digits/3_dimo/model`."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from softgen.cli import run_command
from softgen.data.prompts import read_prompts
from softgen.devices import best_device
from softgen.flow import FlowSampler, Method
from softgen.generation import (
    Generated,
    TokenSource,
    autoregressive_tokens,
    balanced_labels,
    flow_latents,
    generate_batches,
    one_step_tokens,
    teacher_tokens,
)
from softgen.guidance import check_guidance
from softgen.images import remove_numbered, save_grid, save_image
from softgen.loading import check_compatible, check_latents, load_continuous_tokenizer, load_tokenizer
from softgen.masking import Schedule
from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import ImageCodeModel, MaskedDiffusionModel
from softgen.models.conditions import Asked
from softgen.models.generator import OneStepGenerator
from softgen.models.sit import SiT
from softgen.pretrained import Pretrained
from softgen.samplers import published_sampler
from softgen.sampling import AutoregressiveSampler, HaltonSampler, MaskGITSampler, Sampler

PROGRAM = "softgen.sample"
PUBLISHED_TAKES = {"steps": 8, "schedule": "arccos", "guidance": 1.0, "temperature": 1.0, "confidence_noise": 4.5}
"""Options that a published sampler has settings of its own for, and their defaults."""


def sample(
    *,
    model: str,
    tokenizer: str | None = None,
    out: str = "samples",
    n: int = 80,
    labels: list[int] | None = None,
    prompts: list[str] | None = None,
    prompt_file: str | None = None,
    sampler: Literal["maskgit", "halton", "published", "heun", "euler"] | None = None,
    steps: int = 8,
    schedule: Schedule = "arccos",
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    confidence_noise: float = 4.5,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    columns: int = 10,
    save_images: bool = True,
    device: str | None = None,
) -> None:
    """Sample images and write grid.png and images/00000.png, ... to a folder.

    Args:
        model: Folder or hub id of a teacher, or of a one-step generator (which ignores the options of samplers), or of
            an autoregressive model (which takes temperature and guidance), or of a SiT.
        tokenizer: Folder or hub id; by default the one beside the model.
        out: Folder to write to.
        n: Number of images.
        labels: Classes to go round; by default all.
        prompts: Of a text-conditional model: prompts to go round.
        prompt_file: As `prompts`, from a .txt file, one a line, or a .jsonl or .parquet file with `prompt`.
        sampler: Of a teacher: `maskgit`, its default, reveals the most confident sites first, `halton` spreads them
            over the image; `published` is that of a published model's authors at their settings, which takes none of
            the options below. Of a SiT: `heun`, its default, or `euler`, which take steps and both options of guidance.
        steps: Passes of a multi-step sampler.
        schedule: Sites left masked over time.
        guidance: Scale of classifier-free guidance; 1 is off.
        guidance_interval: Times of a SiT within which guidance is on; 0 is the data and 1 is noise.
        confidence_noise: Gumbel noise on the ranking of `maskgit`.
        temperature: Of the drawn codes; 0 takes the likeliest.
        seed: Image i depends on (seed, i) alone.
        batch_size: Images a pass.
        columns: Images a row of the grid.
        save_images: Write each image, not the grid alone.
        device: Torch device; by default the best one present.

    Raises:
        ValueError: Naming the option, what was expected and what was got.
    """
    check_positive(n=n, batch_size=batch_size, columns=columns)
    check_finite(temperature=temperature, confidence_noise=confidence_noise)
    target = choose_device(device)
    opened = Pretrained.from_pretrained(model, key="model").to(target)
    beside = tokenizer if tokenizer is not None else model
    if isinstance(opened, SiT):
        if prompts is not None or prompt_file is not None:
            raise ValueError("prompts: expected labels, since this model is class-conditional, got prompts")
        flow = FlowSampler(
            steps=steps,
            method=flow_method(sampler),
            guidance=guidance,
            guidance_interval=guidance_interval,
        )
        flow.check(opened)
        latents = load_continuous_tokenizer(beside).to(target)
        check_latents(opened, latents)
        classes = wanted_labels(labels, n=n, num_classes=opened.num_classes)
        check_writable(Path(out))
        made = generate_batches(
            flow_latents(opened, flow, latents), latents, classes, seed=seed, batch_size=batch_size, progress="sampling"
        )
        _write(made, Path(out), columns=columns, save_images=save_images)
        return
    check_masked_sampler(sampler)
    decoder = load_tokenizer(beside).to(target)
    backbone = backbone_of(opened, key="model")
    check_compatible(backbone, decoder)
    if isinstance(opened, OneStepGenerator):
        tokens_of: TokenSource = one_step_tokens(opened, temperature=temperature)
    elif isinstance(backbone, AutoregressiveTransformer):
        check_guidance(backbone, guidance)
        tokens_of = autoregressive_tokens(backbone, AutoregressiveSampler(temperature=temperature, guidance=guidance))
    else:
        assert isinstance(backbone, MaskedDiffusionModel)
        if sampler == "published":
            chosen: Sampler = published_sampler(backbone)
            check_published_alone(
                steps=steps,
                schedule=schedule,
                guidance=guidance,
                temperature=temperature,
                confidence_noise=confidence_noise,
            )
        else:
            common: dict[str, Any] = {"steps": steps, "schedule": schedule, "guidance": guidance}
            masked = (
                MaskGITSampler(**common, temperature=temperature, confidence_noise=confidence_noise)
                if sampler in (None, "maskgit")
                else HaltonSampler(**common, temperature=temperature)
            )
            masked.plan(backbone)  # refused before any work
            chosen = masked
        tokens_of = teacher_tokens(backbone, chosen)
    wanted = wanted_conditions(backbone, n=n, labels=labels, prompts=prompts_of(prompts, prompt_file))
    check_writable(Path(out))
    drawn = generate_batches(tokens_of, decoder, wanted, seed=seed, batch_size=batch_size, progress="sampling")
    _write(drawn, Path(out), columns=columns, save_images=save_images)


def flow_method(sampler: str | None) -> Method:
    """The method of a SiT's sampler; Heun's by default.

    Raises:
        ValueError: If it is a sampler of masked models.
    """
    if sampler not in (None, *get_args(Method)):
        raise ValueError(f"sampler: expected one of {', '.join(get_args(Method))} for a SiT, got {sampler!r}")
    return "euler" if sampler == "euler" else "heun"


def check_masked_sampler(sampler: str | None) -> None:
    """Refuse a SiT's sampler for another model.

    Raises:
        ValueError: Naming it.
    """
    if sampler in get_args(Method):
        raise ValueError(f"sampler: expected {sampler} with a SiT alone, got another model")


def check_published_alone(**options: float | str) -> None:
    """Refuse options beside a published sampler, which would ignore them.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in options.items():
        if value != PUBLISHED_TAKES[name]:
            raise ValueError(
                f"{name}: expected none with sampler published, which has settings of its own, got {value}"
            )


def prompts_of(prompts: Sequence[str] | None, prompt_file: str | None) -> Sequence[str] | None:
    """The prompts given, or those of a file.

    Raises:
        ValueError: If both are given, or the file cannot be read.
    """
    if prompt_file is None:
        return prompts
    if prompts is not None:
        raise ValueError("prompt_file: expected prompts or a file of them, got both")
    return read_prompts(Path(prompt_file), option="prompt_file")


def wanted_conditions(
    backbone: ImageCodeModel, *, n: int, labels: Sequence[int] | None, prompts: Sequence[str] | None
) -> Asked:
    """What n images are asked for: prompts of a text-conditional model, labels of a class-conditional one.

    Raises:
        ValueError: If it is the other kind, there is nothing, or a label is not a class.
    """
    if backbone.text_encoder is None:
        if prompts is not None:
            raise ValueError("prompts: expected labels, since this model is class-conditional, got prompts")
        return wanted_labels(labels, n=n, num_classes=backbone.num_classes)
    if labels is not None:
        raise ValueError("labels: expected prompts, since this model is text-conditional, got labels")
    if not prompts:
        raise ValueError("prompts: expected at least one, since this model is text-conditional, got none")
    asked = [prompts[index % len(prompts)] for index in range(n)]
    backbone.text_encoder.warn_of_problems(asked)
    return asked


def wanted_labels(labels: Sequence[int] | None, *, n: int, num_classes: int) -> Tensor:
    """N labels that go round `labels`, or round all classes.

    Raises:
        ValueError: If a label is not a class.
    """
    if labels is None:
        return balanced_labels(n, num_classes=num_classes)
    for label in labels:
        if not 0 <= label < max(1, num_classes):
            raise ValueError(f"labels: expected classes in 0..{num_classes - 1}, got {label}")
    if not labels:
        raise ValueError("labels: expected at least one class, got none")
    return torch.tensor(labels)[torch.arange(n) % len(labels)]


def backbone_of(opened: Pretrained, *, key: str) -> ImageCodeModel:
    """The network of a teacher or of a generator.

    Raises:
        ValueError: If it is neither.
    """
    backbone = opened.model if isinstance(opened, OneStepGenerator) else opened
    if not isinstance(backbone, ImageCodeModel):
        raise ValueError(f"{key}: expected a teacher or a one-step generator, got a {type(opened).__name__}")
    return backbone


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best one present.

    Raises:
        ValueError: If torch does not know it, or it is not there.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"device: expected a device that is present, got {name!r}") from error
    return device


def check_finite(**numbers: float) -> None:
    """Refuse numbers below 0, NaN and infinity.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be made or written to.

    Raises:
        ValueError: Naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written to, got {str(folder)!r}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out: expected a folder that can be written to, got {str(folder)!r}")


def check_positive(**counts: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _write(batches: Iterable[Generated], folder: Path, *, columns: int, save_images: bool) -> None:
    """Images as they come; of all of them no more are held than the grid shows."""
    remove_numbered(folder / "images")
    count, seconds = 0, 0.0
    shown: list[Tensor] = []
    for batch in batches:
        if (left := columns * columns - count) > 0:
            shown.append(batch.images[:left].clone())  # a view would hold the whole batch
        if save_images:
            for index, image in enumerate(batch.images, start=count):
                save_image(image, folder / "images" / f"{index:05d}.png")
        count, seconds = count + len(batch.images), seconds + batch.seconds
    save_grid(torch.cat(shown), folder / "grid.png", columns=columns)
    print(f"{count} images in {seconds:.2f} s of sampling: {folder / 'grid.png'}")


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(sample, program=PROGRAM, args=args)


if __name__ == "__main__":
    main()
