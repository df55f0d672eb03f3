"""SFTok at CPU scale: its own predictions against true proxies in training, warm-up, steps, and a generator on top.

    python benchmarks/sftok.py

Fashion-MNIST. Every tokenizer has the same network, the same proxies and equal steps. The last three stages follow
SFTok as published: fine-tuning, a masked diffusion teacher, a one-step generator. Writes sftok.json, .md and .png to
benchmarks/results. A run whose folder holds a result is not run again.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipe_runs import Job, result, run_all, train_classifiers
from sftok_report import claims, markdown, picture
from sftok_runs import (
    ARMS,
    COLD,
    RATIOS,
    VANILLA,
    Setting,
    chain_folder,
    measure_proxies,
    run_arm,
    run_chain,
    run_warm_up,
    train_proxies,
    warm_up_folder,
)

from softgen.cli import run_command
from softgen.files import write_json

CHAIN = ("fine_tuned", "teacher", "dimo")


def benchmark(
    *,
    data_root: str = "data/fashion_mnist",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    sweep_seeds: list[int] = [0],  # noqa: B006 - never changed
    out: str = "runs/benchmarks/sftok",
    results: str = str(Path(__file__).parent / "results"),
    processes: int = 2,
    proxy_steps: int = 1200,
    warm_up_steps: int = 500,
    alignment_steps: int = 1200,
    fine_tuning_steps: int = 500,
    teacher_steps: int = 1500,
    dimo_steps: int = 1000,
    n: int = 3000,
    traced: int = 1000,
    samples: int = 3000,
    note: str = "",
) -> None:
    """Train every tokenizer and generator, measure them, and write the tables.

    Args:
        data_root: Folder of Fashion-MNIST's files.
        seeds: Of every row but the next.
        sweep_seeds: Of the replacement ratios below 1.
        out: Where the runs are kept.
        results: Where the tables are written.
        processes: Runs side by side, one thread each.
        proxy_steps: Of the tokenizer of the proxy codes, which all share.
        warm_up_steps: Of warm-up.
        alignment_steps: Of alignment; runs without warm-up take both.
        fine_tuning_steps: Of fine-tuning.
        teacher_steps: Of the masked diffusion teacher.
        dimo_steps: Of the one-step generator.
        n: Held-out images of each figure.
        traced: Held-out images of the curves over the decoder's steps.
        samples: Of a generation distance.
        note: What else a reader must know of these runs; goes into the table.
    """
    setting = Setting(
        root=Path(out),
        data_root=data_root,
        proxy_steps=proxy_steps,
        warm_up_steps=warm_up_steps,
        alignment_steps=alignment_steps,
        fine_tuning_steps=fine_tuning_steps,
        teacher_steps=teacher_steps,
        dimo_steps=dimo_steps,
        n=n,
        traced=traced,
        samples=samples,
    )
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        run_all(pool, [(train_proxies, setting), (train_classifiers, setting.root, data_root)])
        starts: list[Job] = [(run_warm_up, setting, seed) for seed in seeds]
        run_all(pool, starts + [(run_arm, setting, arm, seed) for arm in COLD for seed in seeds])
        chains: list[Job] = [(run_chain, setting, seed) for seed in seeds]
        vanilla: list[Job] = [(run_arm, setting, VANILLA, seed) for seed in seeds]
        run_all(pool, [*chains, *vanilla, *((run_arm, setting, arm, seed) for arm in RATIOS for seed in sweep_seeds)])
    runs = {
        "warm_up": [result(warm_up_folder(setting, seed)) for seed in seeds],
        **{
            arm.name: [result(arm.folder(setting, seed)) for seed in (sweep_seeds if arm in RATIOS else seeds)]
            for arm in ARMS
        },
        **{name: [result(chain_folder(setting, name, seed)) for seed in seeds] for name in CHAIN},
    }
    content: dict[str, Any] = {
        "command": "python benchmarks/sftok.py --data_root FOLDER",
        "note": note,
        "seeds": seeds,
        "settings": setting.figures(),
        "arms": {arm.name: asdict(arm) for arm in ARMS},
        "proxies": {**result(setting.proxies.parent), **measure_proxies(setting)},
        "runs": runs,
    }
    content["claims"] = claims(content)
    target = Path(results)
    write_json(target / "sftok.json", content)
    (target / "sftok.md").write_text(markdown(content))
    picture(setting, content, target / "sftok.png")
    print((target / "sftok.md").read_text())


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/sftok.py", args=None)
