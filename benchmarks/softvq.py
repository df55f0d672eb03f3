"""SoftVQ-VAE at CPU scale: against hard codes and a plain autoencoder in the same network, with a generator on each.

    python benchmarks/softvq.py

Fashion-MNIST. Reconstruction at 32, 16 and 8 tokens, temperatures, codebook sizes, the variants of the paper,
alignment, linear probes, and a SiT on the latents; OpenMoji: the quantisers at 8 tokens. Every tokenizer is trained for
equal steps on the same batches. Writes softvq.json, .md and .png to benchmarks/results. A run whose folder holds a
result is not run again.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from recipe_runs import result, run_all, train_classifiers
from softvq_report import claims, markdown, picture
from softvq_runs import (
    COMPARED,
    GENERATED,
    Arm,
    Setting,
    aligned_arms,
    codebook_arms,
    codes_averaged,
    flow_folder,
    kind_arms,
    open_tokenizer,
    openmoji_arms,
    run_flow,
    run_tokenizer,
    tau_arms,
    variant_arms,
)

from softgen.cli import run_command
from softgen.files import write_json


def benchmark(
    *,
    data_root: str = "data/fashion_mnist",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    length_seeds: list[int] = [0],  # noqa: B006 - never changed
    sweep_seeds: list[int] = [0],  # noqa: B006 - never changed
    out: str = "runs/benchmarks/softvq",
    results: str = str(Path(__file__).parent / "results"),
    processes: int = 2,
    tokenizer_steps: int = 1800,
    flow_steps: int = 1800,
    sampler_steps: int = 10,
    n: int = 10_000,
    samples: int = 5000,
    note: str = "",
) -> None:
    """Train every tokenizer and generator, measure them, and write the tables.

    Args:
        data_root: Folder of Fashion-MNIST's files.
        seeds: At the highest compression: of the quantisers, of alignment and of the generators on SoftVQ.
        length_seeds: Of the quantisers at 16 and 32 tokens.
        sweep_seeds: Of the other rows.
        out: Where the runs are kept.
        results: Where the tables are written.
        processes: Runs side by side, one thread each.
        tokenizer_steps: Of every tokenizer.
        flow_steps: Of every generator.
        sampler_steps: Heun steps of every sample.
        n: Held-out images of each figure, and training images of the probe.
        samples: Of a generation distance.
        note: What else a reader must know of these runs; goes into the table.
    """
    setting = Setting(Path(out), data_root, tokenizer_steps, flow_steps, sampler_steps, n, samples)
    kinds, aligned = kind_arms(seeds, length_seeds), aligned_arms(seeds)
    emoji = openmoji_arms(sweep_seeds)
    taus = tau_arms(sweep_seeds)
    arms = [*kinds, *aligned, *taus, *codebook_arms(sweep_seeds), *variant_arms(sweep_seeds)]
    generators = [arm for arm in [*kinds, *aligned, *taus] if _has_generator(arm, sweep_seeds)]
    train_classifiers(setting.root, data_root)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        run_all(pool, [(run_tokenizer, setting, arm) for arm in [*arms, *emoji]])
        run_all(pool, [(run_flow, setting, arm) for arm in generators])
    content: dict[str, Any] = {
        "command": f"python benchmarks/softvq.py --data_root FOLDER --tokenizer_steps {tokenizer_steps} "
        f"--flow_steps {flow_steps}",
        "note": note,
        "seeds": seeds,
        "settings": setting.figures("flow"),
        "tokenizers": [_row(setting, arm) for arm in arms],
        "openmoji": [{**asdict(arm), **result(setting.root / arm.folder)} for arm in emoji],
        "generators": [{**asdict(arm), **result(flow_folder(setting, arm))} for arm in generators],
    }
    content["claims"] = claims(content)
    target = Path(results)
    write_json(target / "softvq.json", content)
    (target / "softvq.md").write_text(markdown(content))
    picture(setting, target / "softvq.png", seed=seeds[0])
    print((target / "softvq.md").read_text())


def _has_generator(arm: Arm, sweep_seeds: list[int]) -> bool:
    has_seed = arm.name.startswith("SoftVQ") or arm.seed in sweep_seeds
    return arm.tokens == COMPARED and arm.name in GENERATED and has_seed


def _row(setting: Setting, arm: Arm) -> dict[str, Any]:
    folder = setting.root / arm.folder
    return {**asdict(arm), **result(folder), "averaged": codes_averaged(setting, open_tokenizer(folder))}


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/softvq.py", args=None)
