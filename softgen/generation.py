"""Images from any generative model of codes, in batches, the same whatever the batch size."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from softgen.devices import on_accelerator
from softgen.flow import FlowSampler
from softgen.models.autoregressive import AutoregressiveTransformer
from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Asked, check_prompts
from softgen.models.generator import OneStepGenerator
from softgen.models.sit import SiT
from softgen.random import SampleRandom, derive_seed
from softgen.sampling import AutoregressiveSampler, Sampler
from softgen.tokenizers.base import ImageTokenizer
from softgen.tokenizers.continuous import ContinuousTokenizer

TokenSource = Callable[[Asked, SampleRandom], Tensor]
"""Maps labels (B,) or B prompts, and their noise, to tokens (B, N), or to the latents of a continuous tokenizer."""


@dataclass(frozen=True)
class Generated:
    """Generated images (n, 3, H, W) in [0, 1] on the CPU, and the seconds that sampling the tokens took."""

    images: Tensor
    seconds: float


def teacher_tokens(model: MaskedDiffusionModel, sampler: Sampler) -> TokenSource:
    """Tokens of a masked diffusion model, by a multi-step sampler."""
    return lambda asked, noise: sampler(model, model.encode(asked), noise)


def autoregressive_tokens(model: AutoregressiveTransformer, sampler: AutoregressiveSampler) -> TokenSource:
    """Tokens of an autoregressive model, site after site."""
    return lambda asked, noise: sampler(model, model.encode(asked), noise)


def one_step_tokens(generator: OneStepGenerator, *, temperature: float = 1.0) -> TokenSource:
    """Tokens by one pass of a generator."""
    return lambda asked, noise: generator.sample(generator.model.encode(asked), noise, temperature=temperature)


def flow_latents(model: SiT, sampler: FlowSampler, tokenizer: ContinuousTokenizer) -> TokenSource:
    """Latents (B, L, D) of a SiT, as the tokenizer's decoder takes them."""
    return lambda asked, noise: tokenizer.denormalise(sampler(model, model.encode(asked), noise))


def generate(
    tokens_of: TokenSource,
    tokenizer: ImageTokenizer | ContinuousTokenizer,
    asked: Asked,
    *,
    seed: int,
    batch_size: int = 256,
    progress: str | None = None,
    first: int = 0,
) -> Generated:
    """Sample one image a label, or a prompt; arguments as `generate_batches`."""
    parts = list(
        generate_batches(tokens_of, tokenizer, asked, seed=seed, batch_size=batch_size, progress=progress, first=first)
    )
    return Generated(images=torch.cat([part.images for part in parts]), seconds=sum(part.seconds for part in parts))


@torch.inference_mode()
def generate_batches(
    tokens_of: TokenSource,
    tokenizer: ImageTokenizer | ContinuousTokenizer,
    asked: Asked,
    *,
    seed: int,
    batch_size: int = 256,
    progress: str | None = None,
    first: int = 0,
) -> Iterator[Generated]:
    """Sample one image a label, or a prompt, and give them batch by batch: many large images do not fit in memory.

    Args:
        tokens_of: From `teacher_tokens`, `one_step_tokens` or `flow_latents`.
        tokenizer: Decodes the tokens; its device is used throughout.
        asked: Labels (n,) int64, or n prompts.
        seed: Image i depends on (seed, first + i) alone.
        batch_size: Images a pass.
        progress: Text of a progress bar; None shows none.
        first: Number of the first image, for those that are made in several calls.

    Raises:
        ValueError: One text is given instead of a list of them, or no prompt.
    """
    if not isinstance(asked, Tensor):
        check_prompts(asked, key="asked")
    device = tokenizer.codebook.device if isinstance(tokenizer, ImageTokenizer) else next(tokenizer.parameters()).device
    for ordinals in tqdm(list(_slices(len(asked), batch_size)), desc=progress, disable=progress is None):
        numbers = range(first + ordinals.start, first + ordinals.stop)
        noise = SampleRandom(derive_seed(seed, "generate"), numbers, device=device)
        batch = asked[ordinals.start : ordinals.stop]
        if isinstance(batch, Tensor):
            batch = batch.to(device)
        start = time.perf_counter()
        tokens = tokens_of(batch, noise)
        _wait(device)
        seconds = time.perf_counter() - start
        yield Generated(images=tokenizer.under(batch).decode(tokens).float().cpu(), seconds=seconds)


def _wait(device: torch.device) -> None:
    """Until the device has done what was asked of it; a CPU already has."""
    if on_accelerator(device):
        torch.accelerator.synchronize()


def balanced_labels(n: int, *, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, 1, ...: n of them, int64; zeros for a model without classes."""
    return torch.arange(n) % max(1, num_classes)


def _slices(n: int, size: int) -> Iterator[range]:
    for first in range(0, n, size):
        yield range(first, min(first + size, n))
