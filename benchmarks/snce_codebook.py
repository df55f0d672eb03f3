"""SNCE against cross-entropy and label smoothing on a codebook of 16,384 codes, on Fashion-MNIST.

    python benchmarks/snce_codebook.py

Trains one tokenizer with 16,384 codes and freezes it; then, for each seed, a masked diffusion model and an
autoregressive one by each objective for equal steps, with the same batches and the same noise. Writes
benchmarks/results/snce_codebook.json, .md and .png. A run whose folder holds a result is not run again.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from softgen import load_tokenizer
from softgen.class_evaluation import named_protocol
from softgen.classifier import named_data
from softgen.cli import run_command
from softgen.files import write_json
from softgen.generation import autoregressive_tokens, balanced_labels, generate, teacher_tokens
from softgen.images import save_grid
from softgen.masking import exact_mask
from softgen.metrics.protocol import Protocol
from softgen.models import AutoregressiveTransformer, MaskedTransformer
from softgen.pretrained import Pretrained
from softgen.random import SampleRandom
from softgen.recipes import find_recipe
from softgen.relaxation import auto_two_tau_squared, linear_cross_entropy, soft_embedding
from softgen.sampling import AutoregressiveSampler, HaltonSampler
from softgen.tokenizers.base import ImageTokenizer

RESULTS = Path(__file__).parent / "results"
DATA: Literal["fashion_mnist"] = "fashion_mnist"
NUM_CODES = 16_384
FAMILIES = {"mdm": MaskedTransformer, "ar": AutoregressiveTransformer}


@dataclass(frozen=True)
class Run:
    """One model to train.

    Attributes:
        family: `mdm` or `ar`.
        target: As of `softgen.training.TeacherTraining`.
        factor: 2 tau^2 of SNCE over the median squared distance of latents to their codes.
        seed: Of weights, batches, masks and samples.
        init: How token embeddings start, as of `softgen.training.TeacherTraining`.
    """

    family: str
    target: str
    factor: float | None
    seed: int
    init: str = "codebook"

    @property
    def objective(self) -> str:
        """Its name in the table."""
        name = self.target if self.factor is None else f"{self.target} {self.factor:g}"
        return name if self.init == "codebook" else f"{name}, random embeddings"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.family}_{self.objective.replace(', ', '_').replace(' ', '_')}_seed_{self.seed}"


@dataclass(frozen=True)
class Setting:
    """Where things are, and how long a run is."""

    root: Path
    data_root: str
    steps: int
    n: int

    @property
    def tokenizer(self) -> Path:
        """The frozen tokenizer."""
        return self.root / "tokenizer" / "model"

    @property
    def figures(self) -> dict[str, int]:
        """What a result depends on, besides its run."""
        return {"steps": self.steps, "n": self.n}

    def folder(self, run: Run) -> Path:
        """The run folder."""
        return self.root / f"steps_{self.steps}" / run.name


def benchmark(
    *,
    data_root: str = "data/fashion_mnist",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    ar_seeds: list[int] = [0],  # noqa: B006 - never changed
    factors: list[float] = [1.0, 10.0],  # noqa: B006 - never changed
    random_init: bool = False,
    out: str = "runs/benchmarks/snce_codebook",
    processes: int = 2,
    steps: int = 500,
    n: int = 2000,
) -> None:
    """Train every model, score it, and write the tables.

    Args:
        data_root: Folder of Fashion-MNIST's files.
        seeds: Of the masked diffusion models; the tokenizer is one for all.
        ar_seeds: Of the autoregressive models.
        factors: Further values of 2 tau^2 for the first seed's masked diffusion model, over the median squared
            distance of latents to their codes; the default of the toolkit, 3.5, is what every seed runs.
        random_init: Also two models of the first seed whose token embeddings start at random.
        out: Where the runs are kept.
        processes: Models side by side, one thread each.
        steps: Of training, for every model.
        n: Images that each Frechet distance is measured on.
    """
    setting = Setting(Path(out), data_root, steps, n)
    _prepare(setting)
    runs = [
        Run(family, target, 3.5 if target == "snce" else None, seed)
        for family, its_seeds in (("mdm", seeds), ("ar", ar_seeds))
        for seed in its_seeds
        for target in ("hard", "label_smoothing", "snce")
    ]
    runs.sort(key=lambda run: run.target == "label_smoothing")
    runs += [Run("mdm", "snce", factor, seeds[0]) for factor in factors]
    if random_init:
        runs += [Run("mdm", target, factor, seeds[0], "random") for target, factor in (("hard", None), ("snce", 3.5))]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(_train_and_score, setting, run) for run in runs]
        try:
            for future in as_completed(started):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    results = [{**asdict(run), "objective": run.objective, **_result(setting, run)} for run in runs]
    content = {
        "command": f"python benchmarks/snce_codebook.py --data_root FOLDER --steps {steps} --n {n}",
        "seeds": seeds,
        "steps": steps,
        "n": n,
        "nearest_code_distance": _nearest_distance(setting),
        "tokenizer": _tokenizer_figures(setting),
        "runs": results,
        "claims": claims(results),
    }
    write_json(RESULTS / "snce_codebook.json", content)
    (RESULTS / "snce_codebook.md").write_text(_markdown(content))
    _picture(setting, [run for run in runs if run.seed == seeds[0]])
    print((RESULTS / "snce_codebook.md").read_text())


def _prepare(setting: Setting) -> None:
    """Train the tokenizer and the extractor where they are not there yet."""
    from softgen.fit import main as fit

    torch.set_num_threads(1)
    if not (setting.tokenizer / "config.json").is_file():
        fit(
            [
                f"--config={find_recipe(DATA).config('1_tokenizer')}",
                f"--run_dir={setting.root / 'tokenizer'}",
                f"--data.init_args.root={setting.data_root}",
                f"--model.init_args.tokenizer.init_args.num_codes={NUM_CODES}",
            ]
        )
    _protocol(setting)


@cache
def _protocol(setting: Setting) -> Protocol:
    return named_protocol(DATA, data_root=setting.data_root, folder=str(setting.root / "extractor"), progress=False)


def _train_and_score(setting: Setting, run: Run) -> None:
    folder = setting.folder(run)
    if (folder / "result.json").is_file():
        kept = _result(setting, run)["settings"]
        if kept != setting.figures:
            raise ValueError(f"out: expected runs of {setting.figures} in {folder}, got runs of {kept}")
        return
    from softgen.fit import main as fit

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(setting, run)))
    begin = time.perf_counter()
    fit([f"--config={folder / 'config.yaml'}"])
    seconds = time.perf_counter() - begin
    model, tokenizer = _open(setting, run), load_tokenizer(setting.tokenizer)
    labels = balanced_labels(setting.n, num_classes=10)
    quality = _protocol(setting).score(_samples(model, tokenizer, labels, seed=run.seed), labels)
    write_json(
        folder / "result.json",
        {**asdict(quality), **_held_out(setting, model, tokenizer), "seconds": seconds, "settings": setting.figures},
    )


def _config(setting: Setting, run: Run) -> dict[str, Any]:
    """The recipe of the teacher stage, wider, for this run."""
    config: dict[str, Any] = yaml.safe_load(find_recipe(DATA).config("2_teacher").read_text())
    options = config["model"]["init_args"]
    options |= {"tokenizer": str(setting.tokenizer), "target": run.target, "label_smoothing": 0.1}
    options["embedding_init"] = run.init
    options["model"]["class_path"] = f"softgen.models.{FAMILIES[run.family].__name__}"
    options["model"]["init_args"] |= {"num_codes": NUM_CODES, "width": 96}
    if run.factor is not None:
        options["two_tau_squared"] = run.factor * _nearest_distance(setting)
    config["data"]["init_args"] |= {"root": setting.data_root, "batch_size": 32}
    config["trainer"] |= {"max_steps": setting.steps, "limit_val_batches": 0}
    config["ema"]["decay"] = 0.98
    return config | {"run_dir": str(setting.folder(run)), "seed": run.seed}


@cache
@torch.inference_mode()
def _nearest_distance(setting: Setting) -> float:
    """Median squared distance of training latents to their codes."""
    tokenizer = load_tokenizer(setting.tokenizer)
    source = named_data(DATA, data_root=setting.data_root).train_source()
    latents = tokenizer.latents(source.fetch(range(256))["image"]).flatten(0, 1)
    return auto_two_tau_squared(latents, tokenizer.codebook, factor=1.0)


@torch.inference_mode()
def _tokenizer_figures(setting: Setting) -> dict[str, float]:
    """What the tokenizer's own reconstructions of held-out images get, which no model on its codes can beat."""
    tokenizer = load_tokenizer(setting.tokenizer)
    source = named_data(DATA, data_root=setting.data_root).val_source()
    batch = source.fetch(range(setting.n))
    tokens = torch.cat([tokenizer.encode(part) for part in torch.split(batch["image"], 256)])
    decoded = torch.cat([tokenizer.decode(part) for part in torch.split(tokens, 256)])
    quality = _protocol(setting).score(decoded, batch["label"])
    return {
        "fd": quality.fd,
        "mse": (decoded - batch["image"]).square().mean().item(),
        "codes_used": tokens.unique().numel() / NUM_CODES,
    }


def _open(setting: Setting, run: Run) -> Pretrained:
    return FAMILIES[run.family].from_pretrained(setting.folder(run) / "model")


def _samples(model: Pretrained, tokenizer: ImageTokenizer, labels: Tensor, *, seed: int) -> Tensor:
    if isinstance(model, AutoregressiveTransformer):
        source = autoregressive_tokens(model, AutoregressiveSampler())
    else:
        assert isinstance(model, MaskedTransformer)
        source = teacher_tokens(model, HaltonSampler(steps=8))
    return generate(source, tokenizer, labels, seed=seed, batch_size=100).images


@torch.inference_mode()
def _held_out(setting: Setting, model: Pretrained, tokenizer: ImageTokenizer, *, count: int = 500) -> dict[str, float]:
    """On held-out images, half of whose sites are hidden (autoregressive: each site from those before it).

    `decoded_mse` is the error of pixels of the image that is decoded with the expected code vector at every site that
    was predicted; `hard_nll` is -log p of its code.
    """
    batch = named_data(DATA, data_root=setting.data_root).val_source().fetch(range(count))
    errors, losses = [], []
    for rows in torch.split(torch.arange(count), 50):
        images, noise = batch["image"][rows], SampleRandom(0, rows.tolist(), device=tokenizer.codebook.device)
        tokens = tokenizer.encode(images)
        if isinstance(model, AutoregressiveTransformer):
            predicted, inputs = torch.ones_like(tokens, dtype=torch.bool), tokens
        else:
            assert isinstance(model, MaskedTransformer)
            sites = tokenizer.num_sites
            predicted = exact_mask(torch.full((len(rows),), sites // 2), noise.uniform(sites))
            inputs = model.embed(tokens.masked_fill(predicted, model.mask_id))
        hidden = model.hidden(inputs, model.encode(batch["label"][rows]))[predicted]
        head, codes = model.head, tokenizer.codebook
        losses.append(linear_cross_entropy(hidden, head.weight, tokens[predicted], bias=head.bias))
        vectors = codes[tokens]
        vectors[predicted] = torch.nn.functional.normalize(
            soft_embedding(hidden, head.weight, codes, bias=head.bias), dim=-1
        )
        errors.append((tokenizer.decode_embeddings(vectors) - images).square().mean())
    return {
        "decoded_mse": torch.stack(errors).mean().item(),
        "hard_nll": torch.stack(losses).mean().item(),
    }


def _result(setting: Setting, run: Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((setting.folder(run) / "result.json").read_text())
    return content


def claims(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of the mean Frechet distances over seeds, and each seed's own."""
    rows = []
    for family in FAMILIES:
        for worse in ("hard", "label_smoothing"):
            distances = {
                name: {row["seed"]: row["fd"] for row in results if (row["family"], row["objective"]) == (family, name)}
                for name in (worse, "snce 3.5")
            }
            pairs = list(zip(distances[worse].values(), distances["snce 3.5"].values(), strict=True))
            ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
            asked = 2.0 if family == "mdm" else None
            rows.append(
                {
                    "claim": f"{family}: {worse} / SNCE",
                    "ratio_of_means": ratio,
                    "by_seed": [a / b for a, b in pairs],
                    "at_least": asked,
                    "holds": None if asked is None else ratio >= asked,
                }
            )
    return rows


COLUMNS = ("accuracy", "precision", "recall", "decoded_mse", "hard_nll", "seconds")


def _markdown(content: Mapping[str, Any]) -> str:
    runs, seeds, tokenizer = content["runs"], content["seeds"], content["tokenizer"]
    lines = [
        "# SNCE on a codebook of 16,384 codes",
        "",
        f"`{content['command']}`. Fashion-MNIST, 7x7 tokens, one frozen tokenizer ({tokenizer['codes_used']:.0%} of "
        f"its codes used by {content['n']:,} held-out images, whose reconstructions get a Frechet distance of "
        f"{tokenizer['fd']:.2f} and an MSE of {tokenizer['mse']:.4f}). {content['steps']} steps of 32 images for every "
        f"model, early in training on purpose: this compares how fast they learn. Frechet distance of {content['n']:,} "
        "samples (features of fashionnet) without guidance: 8 Halton steps for the masked diffusion model (mdm), one "
        "pass a site for the autoregressive one (ar). The number after snce is 2 tau^2 over the median squared "
        f"distance of latents to their codes, {content['nearest_code_distance']:.4g}; 3.5 is what `auto` takes. Token "
        "embeddings start from the codebook (`embedding_init: codebook`) unless they are said to start at random.",
        "",
        "| model | objective | Frechet distance by seed | mean | accuracy | precision | recall | decoded MSE | "
        "hard NLL | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        names = dict.fromkeys(run["objective"] for run in runs if run["family"] == family)
        for name in sorted(names, key=_order):
            same = [run for run in runs if (run["family"], run["objective"]) == (family, name)]
            means = {key: statistics.mean(run[key] for run in same) for key in ("fd", *COLUMNS)}
            cells = [f"{means[key]:.3f}" for key in COLUMNS[:3]]
            cells += [f"{means['decoded_mse']:.4f}", f"{means['hard_nll']:.2f}", f"{means['seconds']:.0f}"]
            by_seed = ", ".join(f"{run['fd']:.1f}" for run in same)
            lines.append(f"| {family} | {name} | {by_seed} | **{means['fd']:.1f}** | {' | '.join(cells)} |")
    lines += [
        "",
        f"Seeds {', '.join(map(str, seeds))} of weights, batches, masks and samples; a row with one figure is seed "
        f"{seeds[0]} alone. Decoded MSE: held-out images of which half of the sites are hidden (ar: each site from "
        "those before it), decoded with the expected code vector where a site was predicted. Hard NLL is -log p of "
        "the very code, in nats, which orders the objectives otherwise than their images do: no model is to be judged "
        "by it. Seconds: wall time of the training on one thread, beside another.",
        "",
        "| ratio of mean Frechet distances | by seed | asked | holds |",
        "|---|---|---|---|",
    ]
    for row in content["claims"]:
        asked = "" if row["at_least"] is None else f"at least {row['at_least']:g}"
        holds = {None: "", True: "yes", False: "no"}[row["holds"]]
        shown = ", ".join(f"{ratio:.2f}" for ratio in row["by_seed"])
        lines.append(f"| {row['claim']}: **{row['ratio_of_means']:.2f}** | {shown} | {asked} | {holds} |")
    lines += [
        "",
        "![samples](snce_codebook.png)",
        "",
        f"Two rows of 20 samples a model, seed {seeds[0]}: {_rows(runs, seeds)}.",
        "",
    ]
    return "\n".join(lines)


def _order(objective: str) -> tuple[str, float]:
    name, _, factor = objective.partition(" ")
    return name, float(factor or 0)


def _rows(runs: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    return "; ".join(f"{run['family']} {run['objective']}" for run in runs if run["seed"] == seeds[0])


def _picture(setting: Setting, runs: Sequence[Run]) -> None:
    tokenizer, labels = load_tokenizer(setting.tokenizer), balanced_labels(40, num_classes=10)
    images = [_samples(_open(setting, run), tokenizer, labels, seed=run.seed) for run in runs]
    save_grid(torch.cat(images), RESULTS / "snce_codebook.png", columns=20)


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/snce_codebook.py", args=None)
