"""MaskGIT-256 at its full size, 174 million random weights: opening a checkpoint, and a step of distillation on a CPU.

    python benchmarks/maskgit_256.py

Compares `MaskGIT.from_checkpoint` with a plain `torch.load` of the same file, and a step of `distill.SoftDiMO` with the
operations that it counts and the speed of a matrix product. Writes benchmarks/results/maskgit_256.json and .md.
"""

import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# Nothing else up here: a process that opens the checkpoint imports torch and softgen alone.
from softgen.models import MaskGIT

RESULTS = Path(__file__).parent / "results"
NAME = "MaskGIT_ImageNet_256.pth"
DEMAND = 1.3
SIDE = 1024  # of the matrices that the machine's speed is measured with
PRODUCTS = 15
MIB = 2**20


def write_checkpoint(folder: str) -> int:
    """A file in the published layout, without the optimiser's state, which no opening needs; returns its bytes."""
    torch.manual_seed(0)
    content = {"iter": 1, "global_epoch": 1, "model_state_dict": MaskGIT().state_dict()}
    torch.save(content, Path(folder, NAME))
    return Path(folder, NAME).stat().st_size


def open_nothing(folder: str) -> dict[str, float]:
    """What a process holds that has only imported what the others import."""
    return {"peak": _peak_mib()}


def open_plainly(folder: str) -> dict[str, float]:
    """`torch.load` without mapping: a dictionary of tensors, which no module holds yet."""
    return _timed(lambda: torch.load(Path(folder, NAME), weights_only=True))


def open_model(folder: str) -> dict[str, float]:
    """The library's way, and then a look at every number, since it maps the file and reads a page when it is used."""

    def work() -> None:
        model = MaskGIT.from_checkpoint(Path(folder, NAME))
        for parameter in model.parameters():
            assert parameter.detach().sum().isfinite()

    return _timed(work)


OPENINGS: Mapping[str, Callable[[str], dict[str, float]]] = {
    "nothing, the imports alone": open_nothing,
    "torch.load": open_plainly,
    "MaskGIT.from_checkpoint, every parameter summed": open_model,
}
BARE, PLAIN, OURS = OPENINGS


def _timed(work: Callable[[], Any]) -> dict[str, float]:
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    kept = work()
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    del kept
    return {**seconds, "peak": _peak_mib()}


def _peak_mib() -> float:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _counter() -> Any:
    """Counts operations as torch does, and those of CPUs too, by the formulas that torch has for GPUs."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def native(query: Sequence[int], *_: Any, **__: Any) -> int:
        """Attention with its four projections, which a frozen layer in eval mode runs as one operation."""
        batch, length, width = query
        return 2 * batch * length * width * 4 * width + 2 * 2 * batch * length * length * width

    cpu = {
        torch.ops.aten._native_multi_head_attention: native,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=cpu)


class Watch:
    """Times every training step, from its batch to the moved weights; with a counter, counts its operations too."""

    def __init__(self, counter: Any | None) -> None:
        self.counter = counter
        self.steps: list[dict[str, float]] = []
        self._start = self._cpu = 0.0

    def start(self, *_: Any) -> None:
        """The batch is there."""
        if self.counter is not None:
            self.counter.__enter__()
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, *_: Any) -> None:
        """The optimiser is done."""
        times = {"wall": time.perf_counter() - self._start, "cpu": time.process_time() - self._cpu}
        self.steps.append({**times, "peak": _peak_mib()})
        if self.counter is not None:
            self.counter.__exit__(None, None, None)


def take_steps(checkpoint_activations: bool, counts: bool, steps: int, threads: int) -> dict[str, Any]:
    """Steps of the recipe configs/imagenet256/maskgit/1_dimo.yaml, but for a batch of 1 and no average."""
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import LambdaCallback

    from distill import DiMO, SoftDiMO
    from softgen.callbacks import memory_plan
    from softgen.cli import quiet_lightning
    from softgen.data import Labels
    from softgen.training import OptimizerConfig

    imported = _peak_mib()
    torch.set_num_threads(threads)
    quiet_lightning()
    seed_everything(0, verbose=False)
    stage = SoftDiMO(
        teacher=MaskGIT(),
        objectives=[DiMO(guidance=2.0)],
        optimizer=OptimizerConfig(lr=1e-5, eps=1e-6, warmup_steps=100),
        frozen_dtype="bfloat16",
        checkpoint_activations=checkpoint_activations,
    )
    watch = Watch(_counter() if counts else None)
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[LambdaCallback(on_train_batch_start=watch.start, on_train_batch_end=watch.stop)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, datamodule=Labels(num_classes=1000, batch_size=1))
    assert trainer.global_step == steps
    assert all(bool(loss.isfinite()) for loss in stage.latest_losses.values())
    return {
        "steps": [{**step, "peak": step["peak"] - imported} for step in watch.steps],
        "planned_mib": sum(part.total - part.average for part in memory_plan(stage)) / MIB,
        "gflop": None if watch.counter is None else watch.counter.get_total_flops() / 1e9,
    }


def matrix_speed(threads: int) -> dict[str, float]:
    """GFLOP a CPU second of a product of two matrices of `SIDE`, by the median of `PRODUCTS` runs."""
    torch.set_num_threads(threads)
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, other = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
        times = []
        for _ in range(PRODUCTS + 2):
            start = time.process_time()
            one @ other
            times.append(time.process_time() - start)
        speeds[str(dtype).removeprefix("torch.")] = 2 * SIDE**3 / statistics.median(times[2:]) / 1e9
    return speeds


def forward_gflop() -> float:
    """Operations of a pass of the default MaskGIT over one sequence, written out: products of matrices alone."""
    config = MaskGIT.__init__.__kwdefaults__
    width, inner, codes = config["hidden_dim"], config["mlp_dim"], config["codebook_size"]
    sites = (config["img_size"] // 16) ** 2
    length = sites + 1
    block = 2 * length * (4 * width**2 + 2 * width * inner) + 4 * length**2 * width
    ends = 2 * length * 2 * width**2 + 2 * sites * (width**2 + width * codes)
    return (config["depth"] * block + ends) / 1e9


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure_openings(rounds: int) -> dict[str, Any]:
    """Every way in turn, each time in a new process, `rounds` times after a round that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        size = _apart(write_checkpoint, folder)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in OPENINGS}
        for _ in range(rounds + 1):
            for name, function in OPENINGS.items():
                runs[name].append(_apart(function, folder))
    counted = {name: found[1:] for name, found in runs.items()}
    return {"file_mib": size / MIB, "rounds": rounds, "runs": counted, "medians": _medians(counted)}


def measure_steps(rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """The speed of the machine and steps that keep and that recompute activations, in turn, and their operations."""
    speeds, rows = [], {}
    for name, recomputes in (("kept", False), ("recomputed", True)):
        counted = _apart(take_steps, recomputes, True, 1, threads)
        rows[name] = {"gflop": counted["gflop"], "planned_mib": counted["planned_mib"], "runs": []}
    for _ in range(rounds):
        speeds.append(_apart(matrix_speed, threads))
        for name, recomputes in (("kept", False), ("recomputed", True)):
            rows[name]["runs"].append(_apart(take_steps, recomputes, False, steps, threads)["steps"])
    return {
        "rounds": rounds,
        "threads": threads,
        "gflop_per_cpu_second": {dtype: statistics.median(run[dtype] for run in speeds) for dtype in speeds[0]},
        "speeds": speeds,
        "forward_gflop": forward_gflop(),
        "rows": {
            name: {
                **row,
                "medians": [
                    {key: statistics.median(run[step][key] for run in row["runs"]) for key in row["runs"][0][0]}
                    for step in range(steps)
                ],
            }
            for name, row in rows.items()
        },
    }


def _medians(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }


def maskgit_256(
    *, rounds: int = 7, step_rounds: int = 3, steps: int = 2, threads: int = 1, out: str = str(RESULTS)
) -> None:
    """Measure openings and steps, and write the tables.

    Args:
        rounds: Processes for each way of opening.
        step_rounds: Processes for each way of stepping.
        steps: Steps in such a process; the first also makes the optimiser's state.
        threads: Of steps and of matrix products; a checkpoint is opened on one.
        out: Folder of maskgit_256.json and .md.
    """
    for key, value in (("rounds", rounds), ("step_rounds", step_rounds), ("steps", steps), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{key}: expected at least 1, got {value}")
    from softgen.files import write_json

    opening = measure_openings(rounds)
    step = measure_steps(step_rounds, steps, threads)
    options = f"--rounds {rounds} --step_rounds {step_rounds} --steps {steps} --threads {threads}"
    content = {
        "command": f"python benchmarks/maskgit_256.py {options}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "opening": opening,
        "step": step,
        "claims": claims(opening),
    }
    write_json(Path(out) / "maskgit_256.json", content)
    (Path(out) / "maskgit_256.md").write_text(_markdown(content))
    print((Path(out) / "maskgit_256.md").read_text())


def claims(opening: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ratios of medians, and whether they stay below what is asked."""
    medians = opening["medians"]
    above_bare = medians[OURS]["peak"] - medians[BARE]["peak"]
    ratios = {
        "seconds: from_checkpoint and a look at every number / torch.load": medians[OURS]["wall"]
        / medians[PLAIN]["wall"],
        "CPU seconds: the same": medians[OURS]["cpu"] / medians[PLAIN]["cpu"],
        "peak memory of the former above the imports / size of the file": above_bare / opening["file_mib"],
    }
    return [
        {"claim": claim, "ratio": ratio, "below": DEMAND, "holds": ratio < DEMAND} for claim, ratio in ratios.items()
    ]


def _markdown(content: Mapping[str, Any]) -> str:
    opening, versions = content["opening"], content["versions"]
    lines = [
        "# MaskGIT-256 at its full size",
        "",
        f"`{content['command']}`: 174 million random weights, torch {versions['torch']}, Python {versions['python']}, "
        f"{content['system']}, no GPU. Every figure is a median over new processes, the least and the most beside it; "
        "what is compared runs in turn. Where seconds exceed CPU seconds, other processes had the core.",
        "",
        "## Opening the checkpoint",
        "",
        f"A file of {opening['file_mib']:.0f} MiB in the published layout, without the optimiser's state, in the "
        "system's page cache. `torch.load(weights_only=True)` copies it into memory and stops there. "
        "`MaskGIT.from_checkpoint` maps it and builds the model around it; every parameter is then summed, so that "
        "every page is really read. Seconds are of that work alone, after the imports; the peak is VmHWM of the "
        "process.",
        "",
        "| | seconds | CPU seconds | peak, MiB | above the imports | / file |",
        "|---|---|---|---|---|---|",
        *_opening_rows(opening),
        "",
        "| claim | ratio | asked | holds |",
        "|---|---|---|---|",
    ]
    for row in content["claims"]:
        holds = "yes" if row["holds"] else "no"
        lines.append(f"| {row['claim']} | {row['ratio']:.2f} | below {row['below']:g} | {holds} |")
    return "\n".join([*lines, "", *_step_lines(content["step"]), ""])


def _opening_rows(opening: Mapping[str, Any]) -> list[str]:
    bare = opening["medians"][BARE]["peak"]
    rows = []
    for name, runs in opening["runs"].items():
        times = [_spread([run[key] for run in runs], digits=2) if key in runs[0] else "" for key in ("wall", "cpu")]
        above = opening["medians"][name]["peak"] - bare
        share = "" if name == BARE else f"{above / opening['file_mib']:.2f}"
        peak = _spread([run["peak"] for run in runs], digits=0)
        rows.append(f"| {name} | {' | '.join(times)} | {peak} | {'' if name == BARE else f'{above:.0f}'} | {share} |")
    return rows


def _step_lines(step: Mapping[str, Any]) -> list[str]:
    speed, passes = step["gflop_per_cpu_second"], step["rows"]["kept"]["gflop"] / step["forward_gflop"]
    lines = [
        "## A step of distillation",
        "",
        "`distill.SoftDiMO` in a Trainer as in configs/imagenet256/maskgit/1_dimo.yaml, but for a batch of 1 and no "
        "average: the student forward and backward, the auxiliary model forward and backward, the teacher with "
        "guidance, clipping, Adam; bf16-mixed, the teacher in bfloat16. Seconds are from the batch to the moved "
        f"weights, on {step['threads']} thread{'s' if step['threads'] > 1 else ''}; the first step of a process also "
        "makes Adam's state.",
        "",
        "Operations are those that torch's `FlopCounterMode` sees in the step, backward included, with attention on "
        "CPUs added to what it knows: products of matrices, so neither softmax nor Adam. A pass over one sequence is "
        f"{step['forward_gflop']:.1f} GFLOP by hand; the step that keeps its activations is worth {passes:.2f} of them "
        "(1 + 2 each for student and auxiliary model, 2 for the teacher: 8).",
        "",
        f"The same machine multiplies two {SIDE} x {SIDE} matrices at {speed['float32']:.0f} GFLOP a CPU second in "
        f"float32 and at {speed['bfloat16']:.0f} in bfloat16. `/ product` is the CPU time of a step as a multiple of "
        "what its operations would take at the latter.",
        "",
        "| activations | step | seconds | CPU seconds | GFLOP | GFLOP / CPU s | / product | peak above imports, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in step["rows"].items():
        for index, median in enumerate(row["medians"]):
            wall, cpu, peak = ([run[index][key] for run in row["runs"]] for key in ("wall", "cpu", "peak"))
            rate = row["gflop"] / median["cpu"]
            lines.append(
                f"| {name} | {index + 1} | {_spread(wall, digits=1)} | {_spread(cpu, digits=1)} | {row['gflop']:.0f} | "
                f"{rate:.0f} | {speed['bfloat16'] / rate:.2f} | {_spread(peak, digits=0)} |"
            )
    planned = step["rows"]["kept"]["planned_mib"]
    return [*lines, "", f"Weights, gradients and Adam's moments alone are {planned:.0f} MiB."]


def _spread(runs: Sequence[float], *, digits: int) -> str:
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(runs), min(runs), max(runs)))
    return f"**{median}** ({least} to {most})"


if __name__ == "__main__":
    from softgen.cli import run_command

    run_command(maskgit_256, program="benchmarks/maskgit_256.py", args=None)
