"""How well text-conditional models draw what is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softgen.data.scenes import shapes_prompts
from softgen.generation import TokenSource, generate
from softgen.geneval import write_geneval
from softgen.metrics.shapes_geneval import ShapesGenEval
from softgen.models.base import ImageCodeModel
from softgen.models.open_clip_models import OpenCLIP
from softgen.tokenizers.base import ImageTokenizer


@dataclass(frozen=True)
class PromptRow:
    """One line of a table.

    Attributes:
        name: Of the sampler.
        tasks: Share of right pictures of each task, and `overall`, the mean of the tasks.
        clip: Mean cosine of picture and prompt under a CLIP, if one was given.
        n: Pictures.
        seconds: Of sampling.
    """

    name: str
    tasks: Mapping[str, float]
    clip: float | None
    n: int
    seconds: float

    def __str__(self) -> str:
        parts = [f"{self.name:12s}", *(f"{task} {share:.3f}" for task, share in self.tasks.items())]
        if self.clip is not None:
            parts.append(f"clip {self.clip:.4f}")
        return "  ".join([*parts, f"n {self.n}", f"sampling {self.seconds:.1f} s"])


def check_text_conditional(backbone: ImageCodeModel, *, task: str) -> None:
    """Refuse a class-conditional model.

    Raises:
        ValueError: Naming the task.
    """
    if backbone.text_encoder is None:
        raise ValueError(f"task: expected classes for a class-conditional model, got {task}")


def open_clip_model(folder: str | None, *, image_size: int) -> OpenCLIP | None:
    """The CLIP in a folder of ours, for images of that many pixels a side; None without a folder.

    Raises:
        ValueError: If there is none, or one for images of another size.
    """
    if folder is None:
        return None
    clip = OpenCLIP.from_pretrained(folder, key="clip")
    if clip.image_size != image_size:
        raise ValueError(f"clip: expected a CLIP for images of {image_size} pixels, got one for {clip.image_size}")
    return clip


@torch.inference_mode()
def clip_similarity(clip: OpenCLIP, images: Tensor, prompts: Sequence[str], *, batch_size: int = 256) -> float:
    """Mean cosine of images (n, 3, H, W) in [0, 1] and their n prompts."""
    device = clip.logit_scale.device
    parts = [
        (clip.encode_images(some.to(device)) * clip.encode_prompts(prompts[first : first + batch_size])).sum(dim=1)
        for first, some in zip(range(0, len(images), batch_size), torch.split(images, batch_size), strict=True)
    ]
    return float(torch.cat(parts).mean())


def write_geneval_images(
    source: TokenSource,
    tokenizer: ImageTokenizer,
    folder: Path,
    metadata: Sequence[Mapping[str, Any]],
    *,
    made_by: str,
    seed: int,
    samples: int = 4,
    batch_size: int = 256,
) -> None:
    """Draw GenEval's prompts into its own folder layout; an interrupted call is continued by the same one.

    Args:
        source: Draws the tokens.
        tokenizer: Decodes them.
        folder: Where to write.
        metadata: Rows of `softgen.geneval.read_geneval_metadata`.
        made_by: Kept in the folder, so that two models never mix.
        seed: Sample s of prompt i depends on (seed, i, s) alone.
        samples: Images a prompt.
        batch_size: Images a pass, at least those of one prompt.
    """
    chunk = max(1, batch_size // samples)
    drawn: dict[int, Tensor] = {}

    def images_of(index: int, prompt: str) -> Tensor:
        if index not in drawn:
            drawn.clear()
            rows = metadata[index : index + chunk]
            prompts = [str(row["prompt"]) for row in rows for _ in range(samples)]
            made = generate(source, tokenizer, prompts, seed=seed, batch_size=batch_size, first=index * samples)
            drawn.update({index + place: images for place, images in enumerate(torch.split(made.images, samples))})
        return drawn.pop(index)

    write_geneval(folder, metadata, images_of, source=made_by, samples=samples)


def shapes_rows(
    sources: Mapping[str, TokenSource],
    tokenizer: ImageTokenizer,
    *,
    n: int,
    seed: int,
    batch_size: int = 256,
    clip: OpenCLIP | None = None,
) -> list[PromptRow]:
    """Score samplers on n prompts of `Shapes` that no training shows, by `ShapesGenEval`.

    Args:
        sources: By name.
        tokenizer: Decodes the tokens.
        n: Prompts, spread evenly over the six tasks.
        seed: Picture i depends on (seed, i) alone.
        batch_size: Pictures a pass.
        clip: Adds its mean cosine.
    """
    prompts = [asked.prompt for asked in shapes_prompts(n)]
    rows = []
    for name, source in sources.items():
        made = generate(source, tokenizer, prompts, seed=seed, batch_size=batch_size, progress=name)
        metric = ShapesGenEval()
        metric.update(made.images, prompts)
        tasks = {task: round(float(share), 4) for task, share in metric.compute().items()}
        cosine = clip_similarity(clip, made.images, prompts, batch_size=batch_size) if clip is not None else None
        rows.append(PromptRow(name, tasks, cosine, n, round(made.seconds, 3)))
    return rows
