"""The runs of benchmarks/sftok.py: which tokenizers and generators are trained, how, and what is measured of them."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recipe_runs import fit_stage, is_done, judge, protocol, statistics_of
from torch import Tensor
from torch.nn import functional as F

from softgen.classifier import named_data
from softgen.files import write_json
from softgen.generation import TokenSource, balanced_labels, generate, one_step_tokens, teacher_tokens
from softgen.loading import load_generator, load_model, load_tokenizer
from softgen.metrics import FeatureStatistics, frechet_distance
from softgen.metrics.protocol import Protocol
from softgen.sampling import MaskGITSampler
from softgen.tokenizers import ImageTokenizer, SFTok
from softgen.training.code_usage import code_usage, count_codes

CONFIGS = Path(__file__).parents[1] / "configs" / "sftok"
STEPS = (1, 2, 4, 8, 16)
FEW = (1, 8)
GUIDANCE = 1.5
_BATCH = 500
_VALIDATIONS, _VALIDATED = 8, 4  # of a run whose curve is drawn, and batches each


@dataclass(frozen=True)
class Setting:
    """Where things are, and how long the runs are.

    Attributes:
        root: Folder of the runs.
        data_root: Folder of Fashion-MNIST's files.
        proxy_steps: Of the tokenizer of the proxy codes, which all share.
        warm_up_steps: Of warm-up.
        alignment_steps: Of alignment after warm-up; without warm-up both are alignment.
        fine_tuning_steps: Of fine-tuning.
        teacher_steps: Of the masked diffusion teacher.
        dimo_steps: Of the one-step generator.
        n: Held-out images of each figure.
        traced: Held-out images of Figure 4.
        samples: Of a generation distance.
    """

    root: Path
    data_root: str
    proxy_steps: int
    warm_up_steps: int
    alignment_steps: int
    fine_tuning_steps: int
    teacher_steps: int
    dimo_steps: int
    n: int
    traced: int
    samples: int

    @property
    def proxies(self) -> Path:
        """The tokenizer of the proxy codes."""
        return self.root / "proxies" / "model"

    @property
    def protocol(self) -> Protocol:
        """How generated images are scored."""
        return protocol(self.root, self.data_root)

    def figures(self) -> dict[str, int]:
        """What results depend on, besides the run."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}


@dataclass(frozen=True)
class Arm:
    """A tokenizer of the comparison.

    Attributes:
        name: In the tables.
        warm_up: Whether its alignment starts from warm-up.
        replace_prob: Of alignment: 1 is the paper's, 0 shows true proxies; None has no alignment, but as many steps of
            warm-up.
        full: Whether every number of decoder steps is measured, and Figure 4.
    """

    name: str
    warm_up: bool
    replace_prob: float | None
    full: bool = False

    def folder(self, setting: Setting, seed: int) -> Path:
        """Of its run."""
        words = self.name.lower().replace(",", "").replace(" ", "_")
        return setting.root / f"{words}_seed_{seed}"


VANILLA = Arm("vanilla", warm_up=True, replace_prob=0.0, full=True)
SFVR = Arm("SFVR", warm_up=True, replace_prob=1.0, full=True)
SFVR_COLD = Arm("SFVR, no warm-up", warm_up=False, replace_prob=1.0)
COLD = (
    Arm("warm-up alone", warm_up=False, replace_prob=None),
    Arm("vanilla, no warm-up", warm_up=False, replace_prob=0.0),
    SFVR_COLD,
)
RATIOS = (Arm("ratio 0.5", warm_up=True, replace_prob=0.5), Arm("ratio 0.8", warm_up=True, replace_prob=0.8))
ARMS = (*COLD, VANILLA, *RATIOS, SFVR)


def train_proxies(setting: Setting) -> None:
    """Train the tokenizer of the proxy codes; nothing if that is done."""
    folder = setting.proxies.parent
    if not is_done(folder, setting.figures()):
        _write(setting, folder, _fit(setting, "0_proxies", folder, seed=0, steps=setting.proxy_steps), {})


def run_warm_up(setting: Setting, seed: int) -> None:
    """Train what the arms with warm-up start from; nothing if that is done."""
    folder = warm_up_folder(setting, seed)
    if not is_done(folder, setting.figures()):
        words = [f"--model.init_args.teacher={setting.proxies}"]
        seconds = _fit(setting, "1_warm_up", folder, words, seed=seed, steps=setting.warm_up_steps, curve=True)
        _write(setting, folder, seconds, {"curve": _curve(folder)})


def run_arm(setting: Setting, arm: Arm, seed: int) -> None:
    """Train and measure a tokenizer; nothing if that is done."""
    folder = arm.folder(setting, seed)
    if is_done(folder, setting.figures()):
        return
    words, steps = [f"--model.init_args.teacher={setting.proxies}"], setting.alignment_steps
    if not arm.warm_up:
        steps += setting.warm_up_steps
    if arm.replace_prob is not None:
        words.append(f"--model.init_args.replace_prob={arm.replace_prob}")
        start = str(warm_up_folder(setting, seed) / "model") if arm.warm_up else json.dumps(_untrained())
        words += [f"--model.init_args.tokenizer={start}", f"--model.init_args.from_scratch={not arm.warm_up}".lower()]
    curve = arm in (SFVR, SFVR_COLD)
    stage = "1_warm_up" if arm.replace_prob is None else "2_alignment"
    seconds = _fit(setting, stage, folder, words, seed=seed, steps=steps, curve=curve)
    tokenizer = open_sftok(folder)
    measured = measure(setting, tokenizer, STEPS if arm.full else FEW)
    measured |= trace(setting, tokenizer) if arm.full else {}
    _write(setting, folder, seconds, {**measured, "curve": _curve(folder) if curve else []})


def run_chain(setting: Setting, seed: int) -> None:
    """SFVR, fine-tuning, a teacher on its tokens, a one-step generator; whatever of them is not done."""
    run_arm(setting, SFVR, seed)
    tuned, teacher, dimo = (chain_folder(setting, name, seed) for name in ("fine_tuned", "teacher", "dimo"))
    if not is_done(tuned, setting.figures()):
        words = [f"--model.init_args.teacher={setting.proxies}"]
        words.append(f"--model.init_args.tokenizer={SFVR.folder(setting, seed) / 'model'}")
        words.append(f"--model.init_args.perceptual.network={judge(setting.root)}")
        seconds = _fit(setting, "3_fine_tuning", tuned, words, seed=seed, steps=setting.fine_tuning_steps)
        _write(setting, tuned, seconds, measure(setting, open_sftok(tuned), STEPS))
    if not is_done(teacher, setting.figures()):
        words = [f"--model.init_args.tokenizer={tuned / 'model'}"]
        seconds = _fit(setting, "4_teacher", teacher, words, seed=seed, steps=setting.teacher_steps)
        rows = {f"teacher_{steps}": _score(setting, teacher, seed, steps=steps) for steps in (1, 8)}
        _write(setting, teacher, seconds, {"rows": rows})
    if not is_done(dimo, setting.figures()):
        words = [f"--model.init_args.teacher={teacher / 'model'}"]
        seconds = _fit(setting, "5_dimo", dimo, words, seed=seed, steps=setting.dimo_steps)
        rows = {"dimo": _score(setting, dimo, seed), "dimo_decoded_once": _score(setting, dimo, seed, decoder_steps=1)}
        _write(setting, dimo, seconds, {"rows": rows})


def warm_up_folder(setting: Setting, seed: int) -> Path:
    """The folder of a seed's warm-up."""
    return setting.root / f"warm_up_seed_{seed}"


def chain_folder(setting: Setting, name: str, seed: int) -> Path:
    """The folder of a run that follows SFVR: `fine_tuned`, `teacher` or `dimo`."""
    return setting.root / f"{name}_seed_{seed}"


def open_sftok(folder: Path, *, steps: int | None = None) -> SFTok:
    """The tokenizer of a run, or that beside its model; with another number of decoder steps if asked for."""
    tokenizer = load_tokenizer(folder / "model")
    assert isinstance(tokenizer, SFTok)
    tokenizer.steps = tokenizer.steps if steps is None else steps
    return tokenizer


def _untrained() -> dict[str, Any]:
    import yaml

    content = yaml.safe_load((CONFIGS / "1_warm_up.yaml").read_text())
    tokenizer: dict[str, Any] = content["model"]["init_args"]["tokenizer"]
    return tokenizer


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, their proxies (n, P), and the statistics of their features."""

    images: Tensor
    proxies: Tensor
    reference: FeatureStatistics


@cache
def held_out(setting: Setting) -> HeldOut:
    """The first `n` held-out images."""
    source = named_data("fashion_mnist", data_root=setting.data_root).val_source()
    images = source.fetch(range(min(setting.n, len(source))))["image"]
    tokenizer = proxies_of(setting)
    with torch.no_grad():
        codes = torch.cat([tokenizer.encode(part) for part in images.split(_BATCH)])
    return HeldOut(images, codes, statistics_of(images, setting.protocol))


@cache
def proxies_of(setting: Setting) -> ImageTokenizer:
    """The tokenizer of the proxy codes."""
    return load_tokenizer(setting.proxies)


def _compare(setting: Setting, images: Tensor) -> dict[str, float]:
    real = held_out(setting)
    distance = frechet_distance(statistics_of(images, setting.protocol), real.reference)
    return {"fd": distance, "mse": F.mse_loss(images, real.images).item(), "n": len(images)}


@torch.no_grad()
def measure_proxies(setting: Setting) -> dict[str, Any]:
    """What the proxy codes themselves become."""
    codes, tokenizer = held_out(setting).proxies, proxies_of(setting)
    return _compare(setting, torch.cat([tokenizer.decode(part) for part in codes.split(_BATCH)]))


@torch.no_grad()
def measure(setting: Setting, tokenizer: SFTok, all_steps: Iterable[int]) -> dict[str, Any]:
    """Codes in use, and reconstruction by each number of steps; images by the proxies' decoder until fine-tuning."""
    real = held_out(setting)
    tokens = torch.cat([tokenizer.encode(part) for part in real.images.split(_BATCH)])
    usage = code_usage(count_codes(tokens.view(1, -1), num_codes=tokenizer.num_codes))
    rows = []
    for steps in all_steps:
        images, right = [], 0
        for part, truth in zip(tokens.split(_BATCH), real.proxies.split(_BATCH), strict=True):
            refined = tokenizer.refine(tokenizer.codebook[part], steps=steps)
            right += int((refined.tokens == truth).sum())
            if tokenizer.config["pixel_decoder"] is None:
                images.append(proxies_of(setting).decode(refined.tokens))
            else:
                images.append(tokenizer.pixels(refined.logits).clamp(0, 1))
        rows.append({"steps": steps, "top_1": right / real.proxies.numel(), **_compare(setting, torch.cat(images))})
    return {"codebook_used": float(usage.used), "perplexity": float(usage.perplexity), "by_steps": rows}


@torch.no_grad()
def trace(setting: Setting, tokenizer: SFTok) -> dict[str, Any]:
    """The paper's Figure 4a: each of the steps against the true proxies and against the last step.

    KL from the truth is that of one-hot proxies, which is cross-entropy; from the last step, that of its distribution.
    Means over images and proxies, in nats; top-1 is the share of equal proxies.
    """
    real = held_out(setting)
    images, truth = real.images[: setting.traced], real.proxies[: setting.traced]
    rows: list[dict[str, float]] = [{} for _ in range(tokenizer.steps)]
    for part, true in zip(images.split(_BATCH), truth.split(_BATCH), strict=True):
        share = len(part) / len(images)
        steps = list(tokenizer.predictions(tokenizer.codebook[tokenizer.encode(part)]))
        last, last_log = steps[-1], steps[-1].logits.log_softmax(-1)
        for row, step in zip(rows, steps, strict=True):
            log = step.logits.log_softmax(-1)
            found = {
                "kl_truth": F.nll_loss(log.flatten(0, 1), true.flatten()).item(),
                "kl_last": (last_log.exp() * (last_log - log)).sum(-1).mean().item(),
                "top_1_truth": (step.tokens == true).float().mean().item(),
                "top_1_last": (step.tokens == last.tokens).float().mean().item(),
            }
            for name, value in found.items():
                row[name] = row.get(name, 0.0) + share * value
    return {"trace": rows}


def tokens_of(folder: Path, *, steps: int | None = None) -> TokenSource:
    """Tokens of a teacher by that many steps, or of a one-step generator."""
    if steps is None:
        return one_step_tokens(load_generator(folder / "model"))
    return teacher_tokens(load_model(folder / "model"), MaskGITSampler(steps=steps, guidance=GUIDANCE))


def _score(
    setting: Setting, folder: Path, seed: int, *, steps: int | None = None, decoder_steps: int | None = None
) -> dict[str, Any]:
    labels = balanced_labels(setting.samples, num_classes=10)
    decoder = open_sftok(folder, steps=decoder_steps)
    made = generate(tokens_of(folder, steps=steps), decoder, labels, seed=seed, batch_size=_BATCH)
    return asdict(setting.protocol.score(made.images, labels))


def _curve(folder: Path) -> list[dict[str, float]]:
    """Held-out error and proxies over the steps of a run."""
    names = {"mse": "val/mse", "first": "val/first_step_accuracy", "last": "val/last_step_accuracy"}
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/mse")]
    return [
        {"step": int(row["step"]) + 1, **{name: float(row[column]) for name, column in names.items()}} for row in rows
    ]


def _write(setting: Setting, folder: Path, seconds: float, measured: Mapping[str, Any]) -> None:
    write_json(folder / "result.json", {"settings": setting.figures(), "seconds": seconds, **measured})


def _fit(
    setting: Setting,
    stage: str,
    folder: Path,
    words: Sequence[str] = (),
    *,
    seed: int,
    steps: int,
    curve: bool = False,
) -> float:
    """Train a stage of the recipe, with a few validations if their curve is wanted."""
    options: dict[str, Any] = {} if stage == "5_dimo" else {"data.init_args.root": setting.data_root}
    if curve:
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": "logs"},
        }
        options["trainer.logger"] = json.dumps(logger)
        options["trainer.limit_val_batches"] = _VALIDATED
        options["trainer.val_check_interval"] = max(1, steps // _VALIDATIONS)
    return fit_stage(CONFIGS / f"{stage}.yaml", folder, words, seed=seed, steps=steps, options=options)
