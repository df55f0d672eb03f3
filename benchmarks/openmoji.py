"""OpenMoji at CPU scale: emoji drawn from their names in one pass, before and after a CLIP reward.

    python benchmarks/openmoji.py

A tokenizer, a teacher, a one-step generator, the same with a CLIP reward or trained as much longer without, that CLIP,
and another one that judges: how often the judge finds the name of a picture among 100, and the picture of a name.
Writes openmoji.json, openmoji.md and openmoji.png, 64 emoji with their names, to benchmarks/results. What is in the
folder of runs is not run again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from prompt_runs import objectives_with_clip, open_clip, retrieval, train, train_clips
from torch import Tensor

from softgen import load_generator, load_model, load_tokenizer
from softgen.cli import run_command
from softgen.data import OpenMoji
from softgen.data.openmoji import OpenMojiSource
from softgen.files import write_json
from softgen.generation import generate, one_step_tokens, teacher_tokens
from softgen.images import to_uint8
from softgen.metrics import FeatureStatistics, frechet_distance
from softgen.metrics.clip_features import CLIPFeatures
from softgen.metrics.features import extract_features
from softgen.sampling import MaskGITSampler

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parents[1] / "configs" / "openmoji"
SAMPLER = MaskGITSampler(steps=16, guidance=2.0)
ROWS = ("real", "reconstructed", "teacher", "dimo", "longer", "reward")


def benchmark(
    *,
    seed: int = 0,
    n: int = 1500,
    out: str = "runs/benchmarks/openmoji",
    processes: int = 2,
    note: str = "",
) -> None:
    """Train what is missing, measure, and write the table.

    Args:
        seed: Of every stage.
        n: Names of the training side, at most; a multiple of 100.
        out: Where the runs are kept.
        processes: Trainings side by side.
        note: What else a reader must know of these runs; goes into the table.
    """
    root = Path(out)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(processes) as pool:
        generators = pool.submit(train_generators, root, seed)
        for run in (generators, *train_clips(pool, root, CONFIGS / "clip.yaml")):
            run.result()
        for run in [pool.submit(train_on, root, seed, rewarded=rewarded) for rewarded in (True, False)]:
            run.result()
    data = OpenMoji()
    sides = {"seen": _names(data.train_source(), n), "held-out": _names(data.val_source(), n)}
    rows = [measure(root, name, sides, seed) for name in ROWS]
    folders = ("tokenizer", "teacher", "dimo", "longer", "reward", "clip", "judge")
    content: dict[str, Any] = {
        "command": f"python benchmarks/openmoji.py --seed {seed} --n {n}",
        "note": note,
        "n": {side: len(batch["prompt"]) for side, batch in sides.items()},
        "rows": rows,
        "minutes": {name: json.loads((root / name / "time.json").read_text())["minutes"] for name in folders},
    }
    write_json(RESULTS / "openmoji.json", content)
    (RESULTS / "openmoji.md").write_text(markdown(content))
    picture(root, seed)
    print((RESULTS / "openmoji.md").read_text())


def train_generators(root: Path, seed: int) -> None:
    """Tokenizer, teacher, and Di[M]O."""
    tokenizer = f"--model.init_args.tokenizer={root}/tokenizer/model"
    train(root / "tokenizer", CONFIGS / "1_tokenizer.yaml", f"--seed={seed}")
    train(root / "teacher", CONFIGS / "2_teacher.yaml", f"--seed={seed}", tokenizer)
    train(root / "dimo", CONFIGS / "3_dimo.yaml", f"--seed={seed}", _teacher(root))


def train_on(root: Path, seed: int, *, rewarded: bool) -> None:
    """Go on with Di[M]O and the reward; or, to compare with, as many steps with Di[M]O alone."""
    dimo, reward = objectives_with_clip(CONFIGS / "4_reward.yaml", root / "clip", root / "dimo" / "auxiliary")
    student = f"--model.init_args.student={root}/dimo/model"
    objectives = f"--model.init_args.objectives={json.dumps([dimo, reward] if rewarded else [dimo])}"
    folder = root / ("reward" if rewarded else "longer")
    train(folder, CONFIGS / "4_reward.yaml", f"--seed={seed}", _teacher(root), student, objectives)


def _teacher(root: Path) -> str:
    return f"--model.init_args.teacher={root}/teacher/model"


def _names(source: Any, n: int) -> dict[str, Any]:
    """The pictures of a side in a fixed random order, as many hundreds as there are, at most n."""
    assert isinstance(source, OpenMojiSource)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    return source.fetch(order[: min(n, len(source) // 100 * 100)].tolist())


def make(root: Path, name: str, batch: Mapping[str, Any], seed: int) -> Tensor:
    """Pictures of one row for the names of a batch."""
    tokenizer = load_tokenizer(root / "tokenizer" / "model")
    if name == "real":
        return torch.as_tensor(batch["image"])
    if name == "reconstructed":
        with torch.no_grad():
            return torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in torch.split(batch["image"], 250)])
    if name == "teacher":
        source = teacher_tokens(load_model(root / "teacher" / "model"), SAMPLER)
    else:
        source = one_step_tokens(load_generator(root / name / "model"))
    return generate(source, tokenizer, batch["prompt"], seed=seed, batch_size=250).images


def measure(root: Path, name: str, sides: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Retrieval by both CLIPs of both sides, and the Frechet distance of the seen side to its real pictures."""
    clips = {clip: open_clip(root / clip) for clip in ("clip", "judge")}
    extractor = CLIPFeatures(clips["judge"], name="openmoji_judge")

    def statistics_of(images: Tensor) -> FeatureStatistics:
        return FeatureStatistics.from_features(extract_features(images, extractor=extractor).features)

    row: dict[str, Any] = {"name": name}
    for side, batch in sides.items():
        images = make(root, name, batch, seed)
        row[side] = {clip: retrieval(model, images, batch["prompt"]) for clip, model in clips.items()}
        if side == "seen":
            row["frechet"] = frechet_distance(statistics_of(images), statistics_of(batch["image"]))
    return row


def markdown(content: Mapping[str, Any]) -> str:
    """The table."""
    count = content["n"]
    lines = [
        "# Emoji from their names",
        "",
        f"One seed. {count['seen']} names of the training side and {count['held-out']} held-out ones; retrieval among "
        "100 pairs by the judge, a CLIP that was no reward (in brackets by the rewarded one): the share of pictures "
        "whose own name is nearest, and of names whose own picture is. Frechet distance of the training side to its "
        f"real pictures on the judge's features. Teacher: {SAMPLER.steps} steps, guidance {SAMPLER.guidance:g}. "
        "`longer`: Di[M]O alone for the steps that `reward` has had beyond `dimo`.",
        "",
        f"Command: `{content['command']}`.",
        "",
        content["note"],
        "",
        "| row | image to name, seen | name to image, seen | image to name, held out | name to image, held out "
        "| Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = [
            f"{row[side]['judge'][key]:.3f} ({row[side]['clip'][key]:.3f})"
            for side in ("seen", "held-out")
            for key in ("image_to_text", "text_to_image")
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['frechet']:.3f} |")
    minutes = content["minutes"]
    lines += [
        "",
        "![64 names of the training side, drawn in one pass by `reward`](openmoji.png)",
        "",
        "Minutes of CPU of the trainings, one thread each, two side by side: "
        + ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
        + f"; in all {sum(minutes.values()):.0f}.",
    ]
    return "\n".join(lines) + "\n"


def picture(root: Path, seed: int) -> None:
    """64 names of the training side, drawn by the generator after the reward."""
    batch = _names(OpenMoji().train_source(), 100)
    images = make(root, "reward", batch, seed)[:64]
    _captioned_grid(images, batch["prompt"][:64], RESULTS / "openmoji.png")


def _captioned_grid(images: Tensor, prompts: Sequence[str], path: Path, *, columns: int = 8, side: int = 128) -> None:
    from PIL import Image, ImageDraw, ImageFont

    cell, text = side + 8, 26
    page = Image.new("RGB", (columns * cell, math.ceil(len(images) / columns) * (cell + text)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left, top = index % columns * cell + 4, index // columns * (cell + text) + 4
        shown = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(shown, (left, top))
        draw.multiline_text((left, top + side), _wrapped(prompt), fill="black", font=font, spacing=1)
    page.save(path)


def _wrapped(prompt: str, width: int = 22) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(prompt, width)[:2])


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/openmoji.py", args=None)
