"""Di[M]O at CPU scale: the whole pipeline with several seeds, all-mask initialisation beside it, and throughput.

    python benchmarks/dimo.py --data digits
    python benchmarks/dimo.py --data fashion_mnist

Writes benchmarks/results/dimo_<data>.json, .md and .png. Seeds run side by side, one thread each. A seed whose
folder holds a finished run is not run again.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softgen import load_generator, load_model, load_tokenizer
from softgen.class_evaluation import named_protocol
from softgen.cli import run_command
from softgen.files import write_json
from softgen.generation import balanced_labels, generate, one_step_tokens
from softgen.guidance import guided_logits
from softgen.images import save_grid
from softgen.quickstart import TEACHER_STEPS
from softgen.random import SampleRandom
from softgen.recipes import Recipe, find_recipe
from softgen.sampling import MaskGITSampler

RESULTS = Path(__file__).parent / "results"
Data = Literal["digits", "fashion_mnist"]


def benchmark(
    *,
    data: Data = "digits",
    data_root: str = "data/fashion_mnist",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    out: str = "runs/benchmarks",
    processes: int = 2,
    ablation_steps: int = 500,
    throughput_batch: int = 256,
    note: str = "",
) -> None:
    """Run the pipeline for each seed, the initialisation ablation and the throughput, and write the tables.

    Args:
        data: Data set.
        data_root: Folder of Fashion-MNIST's files.
        seeds: One pipeline each.
        out: Where the runs are kept.
        processes: Pipelines side by side.
        ablation_steps: Steps of both arms of the ablation of r_init; 0 leaves it out.
        throughput_batch: Images a pass in the comparison of speeds.
        note: What else a reader must know of these runs; goes into the table.
    """
    recipe, root = find_recipe(data), Path(out) / data
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda seed: run_pipeline(data, data_root, root / f"seed_{seed}", seed=seed), seeds))
        arms = [(seed, r_init) for seed in seeds for r_init in (0.6, 1.0) if ablation_steps]
        list(pool.map(lambda arm: _ablation_run(recipe, root, *arm, steps=ablation_steps), arms))
    runs = [json.loads((root / f"seed_{seed}" / "metrics.json").read_text()) for seed in seeds]
    torch.set_num_threads(1)
    protocol = named_protocol(data, data_root=data_root, folder=str(root / f"seed_{seeds[0]}" / "extractor"))
    labels = balanced_labels(recipe.samples, num_classes=recipe.num_classes)

    def score(folder: Path, seed: int) -> float:
        generator, tokenizer = load_generator(folder), load_tokenizer(folder)
        made = generate(one_step_tokens(generator), tokenizer, labels, seed=seed)
        return protocol.score(made.images, labels).fd

    ablation = [
        {"seed": seed, "r_init": r_init, "steps": ablation_steps, "fd": score(_arm(root, seed, r_init) / "model", seed)}
        for seed, r_init in arms
    ]
    content = {
        "command": _command(data, ablation_steps),
        "data": data,
        "note": note,
        "seeds": seeds,
        "protocol": runs[0]["protocol"],
        "guidance": runs[0]["guidance"],
        "real_accuracy": runs[0]["real_accuracy"],
        "runs": runs,
        "ratios": _ratios(runs),
        "ablation": ablation,
        "codes_used": [_codes_used(data, data_root, root / f"seed_{seed}") for seed in seeds],
        "throughput": _throughput(root / f"seed_{seeds[0]}", runs[0]["guidance"], batch=throughput_batch),
    }
    write_json(RESULTS / f"dimo_{data}.json", content)
    (RESULTS / f"dimo_{data}.md").write_text(_markdown(content))
    _picture(root / f"seed_{seeds[0]}", data, guidance=runs[0]["guidance"])
    print((RESULTS / f"dimo_{data}.md").read_text())


def _run(words: Sequence[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=file, stderr=subprocess.STDOUT)


def run_pipeline(data: Data, data_root: str, folder: Path, *, seed: int) -> None:
    """Tokenizer, teacher and Di[M]O of a seed, scored; nothing if the folder holds a finished run."""
    if (folder / "metrics.json").is_file():
        return
    words = ["softgen.quickstart", f"--data={data}", f"--data_root={data_root}", f"--out={folder}"]
    _run([*words, f"--seed={seed}", "--resume=true", "--refine=false"], folder / "log.txt")


def _arm(root: Path, seed: int, r_init: float) -> Path:
    return root / "ablation" / f"r_init_{r_init}_seed_{seed}"


def _ablation_run(recipe: Recipe, root: Path, seed: int, r_init: float, *, steps: int) -> None:
    folder = _arm(root, seed, r_init)
    if (folder / "model" / "config.json").is_file():
        return
    words = [
        "softgen.fit",
        f"--config={recipe.config('3_dimo')}",
        f"--run_dir={folder}",
        f"--seed={seed}",
        f"--model.init_args.teacher={root / f'seed_{seed}' / '2_teacher' / 'model'}",
        f"--model.init_args.r_init={r_init}",
        f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0",
    ]
    _run(words, folder / "log.txt")


def _ratios(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ratios of the means over seeds."""

    def mean(name: str) -> float:
        return statistics.mean(row["fd"] for run in runs for row in run["rows"] if row["name"] == name)

    best = min(mean(f"teacher_{steps}") for steps in TEACHER_STEPS if steps > 1)
    return {"dimo / teacher_1": mean("dimo") / mean("teacher_1"), "dimo / best teacher": mean("dimo") / best}


@torch.inference_mode()
def _codes_used(data: Data, data_root: str, folder: Path) -> float:
    from softgen.data import Digits, FashionMNIST

    source = (Digits(train_on_all=True) if data == "digits" else FashionMNIST(root=data_root)).train_source()
    tokenizer = load_tokenizer(folder / "1_tokenizer" / "model")
    images = source.fetch(range(min(len(source), 10_000)))["image"]
    tokens = torch.cat([tokenizer.encode(part) for part in torch.split(images, 256)])
    return tokens.unique().numel() / tokenizer.num_codes


@torch.inference_mode()
def _throughput(folder: Path, guidance: float, *, batch: int, rounds: int = 7) -> list[dict[str, float]]:
    """Seconds a batch, interleaved, median of `rounds`: one-step student, and the guided teacher at k steps."""
    generator, teacher = load_generator(folder / "3_dimo" / "model"), load_model(folder / "2_teacher" / "model")
    condition = teacher.encode(balanced_labels(batch, num_classes=teacher.num_classes))
    device = condition.dropped.device

    def noise(round_: int) -> SampleRandom:
        return SampleRandom(round_, range(batch), device=device)

    cases: dict[str, Callable[[int], Tensor]] = {"student": lambda i: generator.sample(condition, noise(i))}
    masked = torch.full((batch, teacher.num_sites), teacher.mask_id)
    cases["pass"] = lambda i: guided_logits(teacher, teacher.embed(masked), condition, scale=1)
    for steps in TEACHER_STEPS:
        sampler = MaskGITSampler(steps=steps, guidance=guidance)
        cases[str(steps)] = lambda i, sampler=sampler: sampler(teacher, condition, noise(i))  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 1):
        for name, case in cases.items():
            start = time.process_time()
            case(round_)
            if round_:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    passes = 1 if guidance == 1 else 2
    return [
        {
            "teacher_steps": steps,
            "network_passes": passes * steps,
            "teacher_ms": 1e3 * median[str(steps)],
            "student_ms": 1e3 * median["student"],
            "one_pass_ms": 1e3 * median["pass"],
            "speed_up": median[str(steps)] / median["student"],
            "speed_up_by_pass_saved": median[str(steps)] / median["student"] / (passes * steps),
        }
        for steps in TEACHER_STEPS
    ]


def _markdown(content: dict[str, Any]) -> str:
    runs, seeds = content["runs"], content["seeds"]
    n = runs[0]["rows"][-1]["n"]
    lines = [
        f"# Di[M]O on {content['data']}",
        "",
        f"`{content['command']}`. {content['protocol']}: Frechet distance on {n:,} images; guidance "
        f"{content['guidance']:g} for the teacher, as in the distillation; seeds {', '.join(map(str, seeds))}, each "
        "with a pipeline of its own. Lower is better.",
        "",
        "| row | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | accuracy | precision | recall |",
        "|---|" + "---|" * (len(seeds) + 4),
    ]
    for row in runs[0]["rows"]:
        same = [other for run in runs for other in run["rows"] if other["name"] == row["name"]]
        mean = {key: statistics.mean(other[key] for other in same) for key in ("fd", "accuracy", "precision", "recall")}
        values = " | ".join(f"{other['fd']:.2f}" for other in same)
        lines.append(
            f"| {row['name']} | {values} | **{mean['fd']:.2f}** | {mean['accuracy']:.3f} | {mean['precision']:.3f} | "
            f"{mean['recall']:.3f} |"
        )
    lines += ["", "| ratio of means | |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in content["ratios"].items()]
    lines += _ablation_lines(content["ablation"])
    lines += [
        f"Codes in use: {', '.join(f'{used:.1%}' for used in content['codes_used'])}. Real held-out images are "
        f"classified rightly in {content['real_accuracy']:.1%}.",
        "",
        "| teacher | network passes | teacher, ms a batch | student, ms a batch | faster | faster / passes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['teacher_steps']} steps | {row['network_passes']} | {row['teacher_ms']:.0f} | "
        f"{row['student_ms']:.0f} | {row['speed_up']:.1f} x | {row['speed_up_by_pass_saved']:.2f} |"
        for row in content["throughput"]
    ]
    lines += ["", _times(runs), *([content["note"]] if content["note"] else []), ""]
    lines += [
        f"![samples](dimo_{content['data']}.png)",
        "",
        "Rows of the picture: one-step student (3 rows), teacher in one pass (3 rows), teacher in 8 passes (3 rows).",
        "",
    ]
    return "\n".join(lines)


def _command(data: Data, ablation_steps: int) -> str:
    root = "" if data == "digits" else " --data_root FOLDER"
    return f"python benchmarks/dimo.py --data {data}{root} --ablation_steps {ablation_steps}"


def _times(runs: Sequence[dict[str, Any]]) -> str:
    """Wall times of what was run without a break; a stage that was resumed has none."""
    parts = []
    for run in runs:
        resumed = run.get("resumed", [])
        stages = [f"{name} {value:.0f} s" for name, value in run["stage_seconds"].items() if name not in resumed]
        whole = "" if resumed else f", {run['wall_seconds']:.0f} s with sampling and scoring"
        parts.append(f"seed {run['seed']}: {', '.join(stages)}{whole}")
    return f"Wall time on one thread, beside other work on 2 cores: {'; '.join(parts)}."


def _ablation_lines(arms: Sequence[dict[str, Any]]) -> list[str]:
    if not arms:
        return [""]
    by_start = {start: [arm["fd"] for arm in arms if arm["r_init"] == start] for start in (0.6, 1.0)}
    listed = {start: ", ".join(f"{fd:.2f}" for fd in values) for start, values in by_start.items()}
    gain = statistics.mean(by_start[1.0]) / statistics.mean(by_start[0.6])
    return [
        "",
        f"Initial tokens, {arms[0]['steps']} steps each, same teacher and seed: r_init 0.6 gives {listed[0.6]}; all "
        f"masks (r_init 1) give {listed[1.0]}: {gain:.2f} x worse in the mean.",
        "",
    ]


def _picture(folder: Path, data: Data, *, guidance: float) -> None:
    from softgen.generation import teacher_tokens

    generator, teacher = load_generator(folder / "3_dimo" / "model"), load_model(folder / "2_teacher" / "model")
    tokenizer = load_tokenizer(folder / "2_teacher" / "model")
    labels = balanced_labels(60, num_classes=teacher.num_classes)
    sources = [one_step_tokens(generator)]
    sources += [teacher_tokens(teacher, MaskGITSampler(steps=steps, guidance=guidance)) for steps in (1, 8)]
    images = torch.cat([generate(source, tokenizer, labels, seed=0).images for source in sources])
    save_grid(images, RESULTS / f"dimo_{data}.png", columns=20)


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/dimo.py", args=None)
