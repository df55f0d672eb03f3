"""Tables and pictures of benchmarks/sftok.py."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sftok_runs import (
    SFVR,
    SFVR_COLD,
    STEPS,
    VANILLA,
    Setting,
    chain_folder,
    held_out,
    open_sftok,
    proxies_of,
    tokens_of,
)
from torch import Tensor

from softgen.generation import balanced_labels, generate
from softgen.images import grid

PAPER = {
    "vanilla, no warm-up": "6.47",
    "SFVR, no warm-up": "4.40",
    "ratio 0.5": "4.96",
    "ratio 0.8": "4.59",
    "SFVR": "4.33",
}
SHOWN = {
    "warm-up alone": "warm-up alone, as long",
    "vanilla, no warm-up": "vanilla (true proxies shown), no warm-up",
    "SFVR, no warm-up": "SFVR, no warm-up",
    "vanilla": "warm-up, vanilla",
    "ratio 0.5": "warm-up, SFVR, ratio 0.5",
    "ratio 0.8": "warm-up, SFVR, ratio 0.8",
    "SFVR": "warm-up, SFVR (ratio 1)",
    "fine_tuned": "warm-up, SFVR, fine-tuning",
}
GENERATED = {
    "teacher_1": "teacher, 1 step",
    "teacher_8": "teacher, 8 steps",
    "dimo": "one-step generator",
    "dimo_decoded_once": "one-step generator, decoded in 1 step",
}

Content = Mapping[str, Any]


def claims(content: Content) -> dict[str, dict[str, Any]]:
    """What the paper says, next to what was measured: the figures, and whether it holds here."""

    def at(name: str, steps: int = 8) -> list[float]:
        return _values(content, name, steps, "fd")

    def below(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
        common = min(len(better), len(worse))
        better, worse = better[:common], worse[:common]
        gap, spread = statistics.mean(worse) - statistics.mean(better), max(_deviation(better), _deviation(worse))
        pairs = [one - other for one, other in zip(better, worse, strict=True)]
        return {
            "measured": f"{_spread(better)} against {_spread(worse)}",
            "within_a_seed": _spread(pairs),
            "holds": gap > 0,
            "beyond_spread": gap > spread if common > 1 else None,
        }

    used = [run["codebook_used"] for name in SHOWN for run in content["runs"][name]]
    rows = [row for name in ("teacher", "dimo") for run in content["runs"][name] for row in run["rows"].items()]
    scores = {name: [row["fd"] for key, row in rows if key == name] for name in GENERATED}
    return {
        "SFVR beats vanilla replacement at 8 steps": below(at("SFVR"), at("vanilla")),
        "the same without warm-up": below(at("SFVR, no warm-up"), at("vanilla, no warm-up")),
        "8 steps beat 1 step": below(at("SFVR"), at("SFVR", 1)),
        "8 steps beat a decoder that is trained for 1 step alone": below(at("SFVR"), at("warm-up alone", 1)),
        "warm-up helps SFVR": below(at("SFVR"), at("SFVR, no warm-up")),
        "replacement ratio 1 beats 0.8": below(at("SFVR"), at("ratio 0.8")),
        "replacement ratio 0.8 beats 0.5": below(at("ratio 0.8"), at("ratio 0.5")),
        "a one-step generator beats its teacher's one step": below(scores["dimo"], scores["teacher_1"]),
        "at least 60 % of the codes are in use, in every run": {
            "measured": f"{min(used):.0%} in the worst",
            "within_a_seed": "-",
            "holds": min(used) >= 0.6,
            "beyond_spread": None,
        },
    }


def markdown(content: Content) -> str:
    """The page."""
    settings, proxies = content["settings"], content["proxies"]
    lines = [
        "# SFTok on Fashion-MNIST",
        "",
        f"`{content['command']}`. 28x28 images to 16 codes of 256; the decoder predicts 49 proxies of 128 codes. "
        f"Warm-up {settings['warm_up_steps']:,} steps and alignment {settings['alignment_steps']:,}, or alignment for "
        f"both, of 32 images; fine-tuning {settings['fine_tuning_steps']:,}. Distance: Frechet, on the features of a "
        f"small classifier, between {proxies['n']:,} held-out images and what becomes of them; that of the proxies "
        f"themselves is {proxies['fd']:.2f}. Top-1: the share of the proxies that are right. Decoder temperature 1. "
        f"Seeds {', '.join(map(str, content['seeds']))}, of the ratios below 1 the first alone; "
        "+- is the standard deviation over them, and the "
        "spread that a gap is held against is the larger one of the two.",
        "",
        "| the paper's claim | measured | difference within a seed | holds here | by more than the spread |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {claim['measured']} | {claim['within_a_seed']} | {_yes(claim['holds'])} | "
            f"{_yes(claim['beyond_spread'])} |"
            for name, claim in content["claims"].items()
        ),
        "",
        "## Training",
        "",
        "| training | paper's rFID, ImageNet | distance, 8 steps | 1 step | squared error, 8 steps | top-1, 8 steps | "
        "1 step | codes used | perplexity | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(content, name) for name in SHOWN),
        "",
        "## Steps",
        "",
        f"| distance by number of steps | {' | '.join(map(str, STEPS))} |",
        "|---" * (len(STEPS) + 1) + "|",
        *(
            f"| {SHOWN[name]} | {' | '.join(_spread(_values(content, name, steps, 'fd')) for steps in STEPS)} |"
            for name in ("vanilla", "SFVR", "fine_tuned")
        ),
        "",
        *_trace_table(content),
        "",
        "## A generator on the fine-tuned tokens",
        "",
        f"{settings['samples']:,} samples against all training images; guidance 1.5 for the teacher, as in the "
        "distillation; tokens are decoded in 8 steps where nothing else is said.",
        "",
        "| | distance | accuracy | precision | recall | s of training |",
        "|---|---|---|---|---|---|",
        *(_generated_row(content, name) for name in GENERATED),
        "",
        _seconds(content),
        *([content["note"]] if content["note"] else []),
        "",
        "![curves and pictures](sftok.png)",
        "",
        "Curves: KL and top-1 of the decoder's steps (the paper's Figure 4a), held-out squared error in training "
        "with and without warm-up (Figure 4b), distance by steps (Figure 8); means over seeds. Pictures: held-out "
        "images, their proxies, and reconstructions in 1 and 8 steps by vanilla, SFVR and the fine-tuned tokenizer; "
        "samples of the teacher in 8 steps and of the one-step generator, a class a column.",
        "",
    ]
    return "\n".join(lines)


def _row(content: Content, name: str) -> str:
    runs = content["runs"][name]
    mean = {key: statistics.mean(run[key] for run in runs) for key in ("codebook_used", "perplexity", "seconds")}
    error, top = (statistics.mean(_values(content, name, 8, key)) for key in ("mse", "top_1"))
    return (
        f"| {SHOWN[name]} | {PAPER.get(name, '-')} | {_spread(_values(content, name, 8, 'fd'))} | "
        f"{_spread(_values(content, name, 1, 'fd'))} | {error:.4f} | {top:.1%} | "
        f"{statistics.mean(_values(content, name, 1, 'top_1')):.1%} | {mean['codebook_used']:.0%} | "
        f"{mean['perplexity']:.0f} | {mean['seconds']:.0f} |"
    )


def _trace_table(content: Content) -> list[str]:
    keys = {
        "kl_truth": "KL from the truth",
        "kl_last": "KL from the last step",
        "top_1_truth": "top-1, the truth",
        "top_1_last": "top-1, the last step",
    }
    count = len(content["runs"]["SFVR"][0]["trace"])
    lines = [
        f"What each of {count} steps predicts of all proxies, mean over seeds and {content['settings']['traced']:,} "
        "held-out images; KL in nats, that from the truth is cross-entropy:",
        "",
        f"| | {' | '.join(f'step {step}' for step in range(1, count + 1))} |",
        "|---" * (count + 1) + "|",
    ]
    for name in ("vanilla", "SFVR"):
        for key, word in keys.items():
            values = " | ".join(f"{value:.3f}" for value in _trace(content, name, key))
            lines.append(f"| {SHOWN[name]}: {word} | {values} |")
    return lines


def _trace(content: Content, name: str, key: str) -> list[float]:
    columns = zip(*([row[key] for row in run["trace"]] for run in content["runs"][name]), strict=True)
    return [statistics.mean(column) for column in columns]


def _generated_row(content: Content, name: str) -> str:
    runs = content["runs"]["teacher" if name.startswith("teacher") else "dimo"]
    rows = [run["rows"][name] for run in runs]
    others = " | ".join(
        f"{statistics.mean(row[key] for row in rows):.3f}" for key in ("accuracy", "precision", "recall")
    )
    seconds = statistics.mean(run["seconds"] for run in runs)
    return f"| {GENERATED[name]} | {_spread([row['fd'] for row in rows])} | {others} | {seconds:.0f} |"


def _seconds(content: Content) -> str:
    runs = [run for same in content["runs"].values() for run in same] + [content["proxies"]]
    trained = sum(run["seconds"] for run in runs)
    return (
        f"{len(runs)} runs, {trained / 60:.0f} minutes of training in all, each on one thread, two side by side; s is "
        "the mean wall time of a run."
    )


def _values(content: Content, name: str, steps: int, key: str) -> list[float]:
    """One number a seed."""
    return [row[key] for run in content["runs"][name] for row in run["by_steps"] if row["steps"] == steps]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} +- {_deviation(values):.2f}" if len(values) > 1 else mean


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[value]


def picture(setting: Setting, content: Content, path: Path) -> None:
    """Curves over seeds, and pictures of the first seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(18, 13), layout="constrained")
    names = [["kl", "top", "loss", "steps"], ["rec"] * 4, ["made"] * 4]
    axes = canvas.subplot_mosaic(names, height_ratios=[4, 7, 3.6])
    for name, colour in (("vanilla", "C1"), ("SFVR", "C0")):
        for key, style in (("truth", "-"), ("last", "--")):
            label = f"{name}, {'true proxies' if key == 'truth' else 'last step'}"
            for axis, kind in (("kl", "kl"), ("top", "top_1")):
                values = _trace(content, name, f"{kind}_{key}")
                axes[axis].plot(range(1, len(values) + 1), values, style, color=colour, label=label)
    for name, label, colour in (
        ("vanilla", "vanilla", "C1"),
        ("SFVR", "SFVR", "C0"),
        ("fine_tuned", "fine-tuned", "C2"),
    ):
        means = [statistics.mean(_values(content, name, steps, "fd")) for steps in STEPS]
        axes["steps"].plot(STEPS, means, "o-", color=colour, label=label)
    for runs, first, label in (
        (content["runs"]["warm_up"], 0, "warm-up"),
        (content["runs"][SFVR.name], setting.warm_up_steps, "SFVR after it"),
        (content["runs"][SFVR_COLD.name], 0, "SFVR, no warm-up"),
    ):
        points = [(first + row["step"], row["mse"]) for row in runs[0]["curve"]]
        means = [statistics.mean(run["curve"][place]["mse"] for run in runs) for place in range(len(points))]
        axes["loss"].plot([step for step, _ in points], means, label=label)
    for name, title in (
        ("kl", "KL to each step"),
        ("top", "top-1 of each step"),
        ("loss", "held-out squared error by training steps"),
        ("steps", "distance by steps"),
    ):
        axes[name].set_title(title)
        axes[name].legend(fontsize=8)
    seed = content["seeds"][0]
    for name, image in (("rec", _reconstructions(setting, seed)), ("made", _samples(setting, seed))):
        axes[name].imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[name].set_axis_off()
    axes["rec"].set_title("originals; proxies; 1 and 8 steps of vanilla, of SFVR, of SFVR fine-tuned")
    axes["made"].set_title("two rows each: teacher in 8 steps; one-step generator")
    FigureCanvasAgg(canvas).print_figure(path, dpi=70)


@torch.no_grad()
def _reconstructions(setting: Setting, seed: int) -> Tensor:
    real, decoder = held_out(setting), proxies_of(setting)
    images = real.images[:20]
    rows = [images, decoder.decode(real.proxies[:20])]
    folders = [VANILLA.folder(setting, seed), SFVR.folder(setting, seed), chain_folder(setting, "fine_tuned", seed)]
    for folder in folders:
        tokenizer = open_sftok(folder)
        codes = tokenizer.codebook[tokenizer.encode(images)]
        for steps in (1, 8):
            refined = tokenizer.refine(codes, steps=steps)
            tuned = tokenizer.config["pixel_decoder"] is not None
            rows.append(tokenizer.pixels(refined.logits).clamp(0, 1) if tuned else decoder.decode(refined.tokens))
    return grid(torch.cat(rows), columns=20)


def _samples(setting: Setting, seed: int) -> Tensor:
    labels, made = balanced_labels(40, num_classes=10), []
    for name, steps in (("teacher", 8), ("dimo", None)):
        folder = chain_folder(setting, name, seed)
        made.append(generate(tokens_of(folder, steps=steps), open_sftok(folder), labels, seed=0).images)
    return grid(torch.cat(made), columns=20)
