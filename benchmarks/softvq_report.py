"""Tables and pictures of benchmarks/softvq.py."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from softvq_runs import COMPARED, GENERATED, KINDS, TOKENS, Arm, Setting, flow_folder, held_out_images, open_tokenizer
from torch import Tensor

from softgen.flow import FlowSampler
from softgen.generation import balanced_labels, flow_latents, generate
from softgen.images import grid
from softgen.loading import load_continuous_tokenizer
from softgen.models import SiT

CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_SCATTERED = 2000

_RUNS = ("tokenizers", "openmoji", "generators")

Row = Mapping[str, Any]


def claims(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the paper says, next to what was measured: the figures, and whether it holds here."""
    rows, flows = content["tokenizers"], content["generators"]

    def mean(name: str, key: str = "fd") -> float:
        return _mean(_rows(rows, name, COMPARED), lambda row: row[key])

    def gfd(name: str) -> float:
        return _mean(_rows(flows, name, COMPARED), lambda row: row["fd"])

    seeds = {row["seed"] for row in _rows(rows, "tau=1", COMPARED)}
    same = _mean([row for row in _rows(rows, "SoftVQ", COMPARED) if row["seed"] in seeds], itemgetter("fd"))
    ratio = mean("SoftVQ") / mean("VQ")
    aligned_probe, probe = mean("SoftVQ aligned", "probe"), mean("SoftVQ", "probe")
    return {
        f"SoftVQ reconstructs better than VQ at {COMPARED} tokens: distances have a ratio of at most 0.6": {
            "measured": f"{ratio:.2f}",
            "holds": ratio <= 0.6,
        },
        "tau 0.07 beats 0.001 and 1": {
            "measured": f"{same:.1f} against {mean('tau=0.001'):.1f} and {mean('tau=1'):.1f}, seeds {sorted(seeds)}",
            "holds": same < min(mean("tau=0.001"), mean("tau=1")),
        },
        "alignment raises the linear probe": {
            "measured": f"{probe:.1%} to {aligned_probe:.1%}",
            "holds": aligned_probe > probe,
        },
        "alignment lowers the generation distance": {
            "measured": f"{gfd('SoftVQ'):.1f} to {gfd('SoftVQ aligned'):.1f}",
            "holds": gfd("SoftVQ aligned") < gfd("SoftVQ"),
        },
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The page."""
    rows, settings = content["tokenizers"], content["settings"]
    lines = [
        "# SoftVQ-VAE on Fashion-MNIST",
        "",
        f"`{content['command']}`. Every tokenizer is the same network trained for {settings['tokenizer_steps']:,} "
        f"steps of 32 images, every SiT for {settings['flow_steps']:,} of 64. Reconstruction distance: Frechet, on "
        f"the features of a small classifier, between {rows[0]['n']:,} held-out images and what becomes of them; 0 is "
        f"perfect. Generation distance: {settings['samples']:,} samples by {settings['sampler_steps']} Heun steps "
        "without guidance, against all training images. Probe: accuracy on held-out latents of a logistic regression "
        "on all their numbers. Codes averaged: perplexity of the posterior of one latent, mean over 500 images. "
        f"Seeds {', '.join(map(str, content['seeds']))}, of a row with fewer the first of them; +- is the standard "
        "deviation over them.",
        "",
        "| the paper's claim | measured | holds here |",
        "|---|---|---|",
        *(
            f"| {name} | {claim['measured']} | {'yes' if claim['holds'] else '**no**'} |"
            for name, claim in content["claims"].items()
        ),
        "",
        "## Quantiser and number of tokens",
        "",
        *_table(rows, [(name, tokens) for tokens in TOKENS for name in KINDS]),
        "",
        f"## Temperature, codebook, variants and alignment, {COMPARED} tokens",
        "",
        *_table(rows, _others(rows)),
        "",
        "## A SiT on each",
        "",
        *_flow_table(content["generators"]),
        "",
        f"## OpenMoji, {COMPARED} tokens",
        "",
        f"The same network in patches of 8 pixels on 1,918 emoji of 32 pixels; squared error of the "
        f"{content['openmoji'][0]['n']} held-out ones, too few for a Frechet distance.",
        "",
        *_emoji_table(content["openmoji"]),
        "",
        _seconds(content),
        *([content["note"]] if content["note"] else []),
        "",
        "![pictures](softvq.png)",
        "",
        f"Top: held-out images, and what VQ, AE, SoftVQ and SoftVQ with alignment make of them, {COMPARED} tokens. "
        "Middle: samples of the SiT on VQ, AE, SoftVQ and SoftVQ with alignment, guidance 1.5, a class a column. "
        "Bottom: held-out latents in two dimensions (t-SNE), by class.",
        "",
    ]
    return "\n".join(lines)


def _others(rows: Sequence[Row]) -> list[tuple[str, int]]:
    names = dict.fromkeys(row["name"] for row in rows if row["tokens"] == COMPARED and row["name"] not in KINDS)
    ordered = ["SoftVQ", *(name for name in names if name != "SoftVQ aligned"), "SoftVQ aligned"]
    return [(name, COMPARED) for name in ordered]


def _table(rows: Sequence[Row], names: Sequence[tuple[str, int]]) -> list[str]:
    lines = [
        "| tokenizer | tokens | seeds | distance | squared error | codes used | perplexity | codes averaged | probe, % "
        "| s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, tokens in names:
        same = _rows(rows, name, tokens)
        coded = [row for row in same if row["codebook_used"] is not None]
        used = f"{_mean(coded, lambda row: row['codebook_used']):.0%}" if coded else "-"
        perplexity = f"{_mean(coded, lambda row: row['perplexity']):.0f}" if coded else "-"
        soft = [row for row in same if row["averaged"] is not None]
        averaged = f"{_mean(soft, itemgetter('averaged')):.0f}" if soft else "-"
        shown = "SoftVQ (tau=0.07, K=512)" if name == "SoftVQ" and len(names) > len(KINDS) * len(TOKENS) else name
        lines.append(
            f"| {shown} | {tokens} | {len(same)} | {_spread(same, lambda row: row['fd'], '.1f')} | "
            f"{_mean(same, lambda row: row['mse']):.4f} | {used} | {perplexity} | {averaged} | "
            f"{_spread(same, lambda row: 100 * row['probe'], '.1f')} | {_mean(same, lambda row: row['seconds']):.0f} |"
        )
    return lines


def _flow_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| latents of | tokens | seeds | distance | accuracy | precision | recall | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in GENERATED:
        same = _rows(rows, name, COMPARED)
        quality = [f"{_mean(same, itemgetter(key)):.3f}" for key in ("accuracy", "precision", "recall")]
        lines.append(
            f"| {name} | {COMPARED} | {len(same)} | {_spread(same, lambda row: row['fd'], '.1f')} | "
            f"{' | '.join(quality)} | {_mean(same, lambda row: row['seconds']):.0f} |"
        )
    return lines


def _emoji_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| tokenizer | seeds | squared error | codes used | s |", "|---|---|---|---|---|"]
    for name in KINDS:
        same = _rows(rows, name, COMPARED)
        coded = [row for row in same if row["codebook_used"] is not None]
        used = f"{_mean(coded, itemgetter('codebook_used')):.0%}" if coded else "-"
        lines.append(
            f"| {name} | {len(same)} | {_spread(same, itemgetter('mse'), '.4f')} | {used} | "
            f"{_mean(same, itemgetter('seconds')):.0f} |"
        )
    return lines


def _seconds(content: Mapping[str, Any]) -> str:
    trained = sum(row["seconds"] for key in _RUNS for row in content[key])
    count = sum(len(content[key]) for key in _RUNS)
    return (
        f"{count} runs, {trained / 60:.0f} minutes of training in all, each on one thread, that is {trained / 120:.0f} "
        "minutes of 2 cores; s is the mean wall time of a run."
    )


def _rows(rows: Sequence[Row], name: str, tokens: int) -> list[Row]:
    return [row for row in rows if row["name"] == name and row["tokens"] == tokens]


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return statistics.mean(value(row) for row in rows)


def _spread(rows: Sequence[Row], value: Callable[[Row], float], form: str) -> str:
    if len(rows) == 1:
        return f"{value(rows[0]):{form}}"
    return f"{_mean(rows, value):{form}} +- {statistics.stdev(value(row) for row in rows):{form}}"


def picture(setting: Setting, path: Path, *, seed: int) -> None:
    """Reconstructions, samples and latents of one seed, at the highest compression."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [Arm(name, COMPARED, seed, options) for name, options in KINDS.items()]
    arms.append(Arm("SoftVQ aligned", COMPARED, seed, aligned=True))
    canvas = Figure(figsize=(16, 15.5), layout="constrained")
    axes = canvas.subplot_mosaic([["rec"] * 4, ["made"] * 4, [arm.name for arm in arms]], height_ratios=[4, 6.4, 4.2])
    for name, image, title in (
        ("rec", _reconstructions(setting, arms), f"originals; {'; '.join(arm.name for arm in arms)}"),
        ("made", _samples(setting, arms), f"two rows each: {'; '.join(arm.name for arm in arms)}"),
    ):
        axes[name].imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[name].set_axis_off()
        axes[name].set_title(title)
    for arm in arms:
        points, labels = _scattered(setting, arm)
        for label, word in enumerate(CLOTHES):
            chosen = points[labels == label]
            axes[arm.name].scatter(chosen[:, 0], chosen[:, 1], s=3, label=word)
        axes[arm.name].set_title(arm.name)
        axes[arm.name].set_xticks([])
        axes[arm.name].set_yticks([])
    axes[arms[-1].name].legend(markerscale=3, fontsize=7, loc="best")
    FigureCanvasAgg(canvas).print_figure(path, dpi=70)


@torch.no_grad()
def _reconstructions(setting: Setting, arms: Sequence[Arm]) -> Tensor:
    images, _ = held_out_images(setting, 20)
    tokenizers = [open_tokenizer(setting.root / arm.folder) for arm in arms]
    decoded = [tokenizer.decode(tokenizer.encode(images)) for tokenizer in tokenizers]
    return grid(torch.cat([images, *decoded]), columns=20)


def _samples(setting: Setting, arms: Sequence[Arm]) -> Tensor:
    made = []
    for arm in arms:
        folder = flow_folder(setting, arm) / "model"
        decoder = load_continuous_tokenizer(folder)
        sampler = FlowSampler(steps=setting.sampler_steps, guidance=1.5, guidance_interval=(0.0, 0.7))
        source = flow_latents(SiT.from_pretrained(folder), sampler, decoder)
        made.append(generate(source, decoder, balanced_labels(40, num_classes=10), seed=0).images)
    return grid(torch.cat(made), columns=20)


@torch.no_grad()
def _scattered(setting: Setting, arm: Arm) -> tuple[Any, Any]:
    """Latents in two dimensions, (n, 2), and their labels."""
    from sklearn.manifold import TSNE

    images, labels = held_out_images(setting, _SCATTERED)
    flat = open_tokenizer(setting.root / arm.folder).encode(images).flatten(1)
    flat = (flat - flat.mean(dim=0)) / flat.std(dim=0).clamp(min=1e-8)
    points = TSNE(init="pca", random_state=0, n_iter_without_progress=100).fit_transform(flat.numpy())
    return points, labels.numpy()
