"""The runs of benchmarks/softvq.py: which tokenizers and generators are trained, how, and what is measured of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recipe_runs import fit_stage, is_done, judge, protocol, statistics_of
from torch import Tensor
from torch.nn import functional as F

from softgen.classifier import named_data
from softgen.data import OpenMoji
from softgen.files import write_json
from softgen.flow import FlowSampler
from softgen.generation import balanced_labels, flow_latents, generate
from softgen.loading import load_continuous_tokenizer
from softgen.metrics import FeatureStatistics, frechet_distance, linear_probe
from softgen.metrics.protocol import Protocol
from softgen.models import SiT
from softgen.tokenizers import SoftVQ
from softgen.tokenizers.baseline_quantizers import NoQuantizer
from softgen.tokenizers.soft_quantizer import SoftQuantizer
from softgen.training.code_usage import code_usage, count_codes

CONFIGS = Path(__file__).parents[1] / "configs" / "softvq"
TOKENS = (32, 16, 8)
COMPARED = 8
"""Tokens of everything but the comparison of lengths: the highest compression."""
CODES = 512
KINDS: Mapping[str, Mapping[str, Any]] = {
    "VQ": {"quantization": "vq"},
    "AE": {"quantization": "none"},
    "SoftVQ": {},
}


GENERATED = (*KINDS, "SoftVQ aligned", "tau=1")
"""The tokenizers that a SiT is trained on."""


@dataclass(frozen=True)
class Setting:
    """Where things are, and how long the runs are.

    Attributes:
        root: Folder of the runs.
        data_root: Folder of Fashion-MNIST's files.
        tokenizer_steps: Of every tokenizer.
        flow_steps: Of every generator.
        sampler_steps: Heun steps of every sample.
        n: Held-out images of each figure, and training images of the probe.
        samples: Of a generation distance.
    """

    root: Path
    data_root: str
    tokenizer_steps: int
    flow_steps: int
    sampler_steps: int
    n: int
    samples: int

    @property
    def protocol(self) -> Protocol:
        """How generated images are scored."""
        return protocol(self.root, self.data_root)

    def figures(self, kind: str) -> dict[str, int]:
        """What the results of a kind of run depend on, besides the run."""
        own = {"tokenizer_steps": self.tokenizer_steps, "n": self.n}
        if kind == "flow":
            own |= {"flow_steps": self.flow_steps, "sampler_steps": self.sampler_steps, "samples": self.samples}
        return own


@dataclass(frozen=True)
class Arm:
    """A tokenizer to train.

    Attributes:
        name: In the tables.
        tokens: L.
        seed: Of weights, data order and noise.
        options: Arguments of `SoftVQ` that differ from the recipe.
        aligned: Whether its latents are aligned with the judge's features.
        openmoji: Whether it learns OpenMoji at 32 pixels in place of Fashion-MNIST.
    """

    name: str
    tokens: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: bool = False
    openmoji: bool = False

    @property
    def folder(self) -> str:
        """Of its run, within the root."""
        words = self.name.lower().replace(" ", "_").replace("=", "_").replace(",", "")
        return f"{'openmoji_' if self.openmoji else ''}{words}_{self.tokens}_seed_{self.seed}"


def kind_arms(seeds: Sequence[int], length_seeds: Sequence[int]) -> list[Arm]:
    """The same network with hard codes, none and soft codes, at the highest compression and then at the others."""
    return [
        Arm(name, tokens, seed, options)
        for tokens in reversed(TOKENS)
        for name, options in KINDS.items()
        for seed in (seeds if tokens == COMPARED else length_seeds)
    ]


def aligned_arms(seeds: Sequence[int]) -> list[Arm]:
    """SoftVQ with alignment."""
    return [Arm("SoftVQ aligned", COMPARED, seed, aligned=True) for seed in seeds]


def tau_arms(sweep_seeds: Sequence[int]) -> list[Arm]:
    """Temperatures other than 0.07."""
    taus = (0.001, 0.01, 0.1, 1.0)
    arms = [Arm(f"tau={tau:g}", COMPARED, seed, {"tau": tau}) for tau in taus for seed in sweep_seeds]
    return arms + [Arm("tau learnable", COMPARED, seed, {"temperature": "learnable"}) for seed in sweep_seeds]


def codebook_arms(sweep_seeds: Sequence[int]) -> list[Arm]:
    """Codebooks of other sizes."""
    return [
        Arm(f"K={codes}", COMPARED, seed, {"codebook_size": codes}) for codes in (32, 128, 2048) for seed in sweep_seeds
    ]


def variant_arms(sweep_seeds: Sequence[int]) -> list[Arm]:
    """Product, residual, both, and predicted temperatures."""
    variants: Mapping[str, Mapping[str, Any]] = {
        "PQ, G=2": {"groups": 2},
        "PQ, G=4": {"groups": 4},
        "RQ": {"levels": 2},
        "R-PQ, G=4": {"groups": 4, "levels": 2},
        "GMMVQ": {"temperature": "predicted"},
    }
    return [Arm(name, COMPARED, seed, options) for name, options in variants.items() for seed in sweep_seeds]


def openmoji_arms(seeds: Sequence[int]) -> list[Arm]:
    """The quantisers on pictures in colour."""
    vit = {"width": 64, "depth": 2, "heads": 2, "patch_size": 8}
    sizes = {"image_size": 32, "encoder": vit, "decoder": vit}
    return [
        Arm(name, COMPARED, seed, {**sizes, **kind}, openmoji=True) for name, kind in KINDS.items() for seed in seeds
    ]


@dataclass(frozen=True)
class _Images:
    """Held-out images and as many of the training images as the probe takes, with labels."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    reference: FeatureStatistics


@cache
def _images(setting: Setting) -> _Images:
    data = named_data("fashion_mnist", data_root=setting.data_root)
    train, held_out = data.train_source(), data.val_source()
    seen, unseen = (source.fetch(range(min(setting.n, len(source)))) for source in (train, held_out))
    return _Images(
        train=seen["image"],
        train_labels=seen["label"],
        held_out=unseen["image"],
        held_out_labels=unseen["label"],
        reference=statistics_of(unseen["image"], setting.protocol),
    )


def run_tokenizer(setting: Setting, arm: Arm) -> None:
    """Train and measure a tokenizer; nothing if that is done."""
    folder = setting.root / arm.folder
    if is_done(folder, setting.figures("tokenizer")):
        return
    init = "--model.init_args.tokenizer.init_args."
    options = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in arm.options.items()}
    words = [f"{init}num_latents={arm.tokens}", *(f"{init}{name}={value}" for name, value in options.items())]
    words += (
        ["--data=softgen.data.OpenMoji", "--data.init_args.batch_size=32"]
        if arm.openmoji
        else [f"--data.init_args.root={setting.data_root}"]
    )
    if arm.options.get("quantization", "soft") != "soft":
        words.append("--model.init_args.kl_weight=0")
    if arm.aligned:
        align = {"features": str(judge(setting.root)), "how": "avg_1d", "hidden": 128, "weight": 0.1}
        words.append(f"--model.init_args.align={json.dumps(align)}")
    seconds = fit_stage(CONFIGS / "1_tokenizer.yaml", folder, words, seed=arm.seed, steps=setting.tokenizer_steps)
    measure = _measure_openmoji if arm.openmoji else _measure_tokenizer
    figures = measure(setting, open_tokenizer(folder))
    write_json(folder / "result.json", {"settings": setting.figures("tokenizer"), "seconds": seconds, **figures})


def run_flow(setting: Setting, arm: Arm) -> None:
    """Train and measure a generator on the latents of a tokenizer; nothing if that is done."""
    folder = flow_folder(setting, arm)
    if is_done(folder, setting.figures("flow")):
        return
    tokenizer = setting.root / arm.folder / "model"
    words = [f"--model.init_args.tokenizer={tokenizer}"]
    words.append(f"--model.init_args.model.init_args.num_latents={arm.tokens}")
    words.append(f"--data.init_args.root={setting.data_root}")
    seconds = fit_stage(CONFIGS / "2_flow.yaml", folder, words, seed=arm.seed, steps=setting.flow_steps)
    labels = balanced_labels(setting.samples, num_classes=10)
    model, decoder = SiT.from_pretrained(folder / "model"), load_continuous_tokenizer(folder / "model")
    source = flow_latents(model, FlowSampler(steps=setting.sampler_steps), decoder)
    made = generate(source, decoder, labels, seed=arm.seed, batch_size=1000)
    quality = asdict(setting.protocol.score(made.images, labels))
    write_json(folder / "result.json", {"settings": setting.figures("flow"), "seconds": seconds, **quality})


def flow_folder(setting: Setting, arm: Arm) -> Path:
    """The folder of a generator's run."""
    return setting.root / f"sit_on_{arm.folder}"


def open_tokenizer(folder: Path) -> SoftVQ:
    """The tokenizer of a run."""
    tokenizer = load_continuous_tokenizer(folder / "model")
    assert isinstance(tokenizer, SoftVQ)
    return tokenizer


@torch.no_grad()
def _measure_tokenizer(setting: Setting, tokenizer: SoftVQ) -> dict[str, Any]:
    """Reconstruction, codes in use and linear probe on held-out images."""
    images = _images(setting)
    pixels, latents, figures = _reconstruct(tokenizer, images.held_out)
    train = torch.cat([tokenizer.encode(part) for part in _parts(images.train)])
    probe = linear_probe(train, images.train_labels, latents, images.held_out_labels)
    distance = frechet_distance(statistics_of(pixels, setting.protocol), images.reference)
    return {**figures, "fd": distance, "probe": probe.accuracy}


@torch.no_grad()
def _measure_openmoji(setting: Setting, tokenizer: SoftVQ) -> dict[str, Any]:
    """Reconstruction and codes in use. The held-out emoji are too few for a Frechet distance."""
    return _reconstruct(tokenizer, openmoji_images())[2]


def openmoji_images() -> Tensor:
    """The held-out emoji."""
    data = OpenMoji()
    data.prepare_data()
    source = data.val_source()
    images: Tensor = source.fetch(range(len(source)))["image"]
    return images


def _reconstruct(tokenizer: SoftVQ, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Reconstructions, latents and figures."""
    decoded, latents, counts = [], [], None
    for part in _parts(images):
        raw = tokenizer.raw_latents(part)
        latents.append(tokenizer.quantizer(raw))
        decoded.append(tokenizer.decode(latents[-1]))
        if not isinstance(tokenizer.quantizer, NoQuantizer):
            new = count_codes(tokenizer.quantizer.codes(raw), num_codes=tokenizer.config["codebook_size"])
            counts = new if counts is None else counts + new
    pixels = torch.cat(decoded)
    usage = None if counts is None else code_usage(counts)
    figures = {
        "n": len(pixels),
        "mse": F.mse_loss(pixels, images).item(),
        "codebook_used": None if usage is None else float(usage.used),
        "perplexity": None if usage is None else float(usage.perplexity),
    }
    return pixels, torch.cat(latents), figures


@torch.no_grad()
def codes_averaged(setting: Setting, tokenizer: SoftVQ) -> float | None:
    """Over how many codes a latent is spread: the mean perplexity of its posterior; None without a soft quantiser."""
    if not isinstance(tokenizer.quantizer, SoftQuantizer):
        return None
    images, _ = held_out_images(setting, 500)
    posterior = tokenizer.quantizer.posterior(tokenizer.raw_latents(images))
    return float((-torch.special.xlogy(posterior, posterior).sum(dim=-1)).exp().mean())


def _parts(images: Tensor) -> Iterator[Tensor]:
    yield from torch.split(images, 500)


def held_out_images(setting: Setting, count: int) -> tuple[Tensor, Tensor]:
    """The first held-out images and their labels."""
    images = _images(setting)
    return images.held_out[:count], images.held_out_labels[:count]
