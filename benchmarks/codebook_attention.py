"""What SNCE and the soft embedding cost over large codebooks: dense against fused, time and peak memory, on a CPU.

    python benchmarks/codebook_attention.py

Forward and backward, float32, with gradients to the hidden states and the head. Writes
benchmarks/results/codebook_attention.json and .md.
"""

import ctypes
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.cli import run_command
from softgen.evaluate import write_json
from softgen.relaxation import NeighbourTable, neighbour_cross_entropy, soft_embedding

RESULTS = Path(__file__).parent / "results"
NEIGHBOURS = 64
# Codes have a squared norm of about 1 here, and latents lie 0.3 away from theirs.
NOISE, TWO_TAU_SQUARED = 0.3, 0.3
# Cases of more codes than this take `large_rounds`: a dense round of 2^28 scores or more takes 10 to 25 s.
LARGE = 100_000
AGREEMENT = 1e-3
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Case:
    """Sizes and what is computed: SNCE or the soft embedding. Latents and embeddings are as wide as hidden states."""

    operator: Literal["SNCE", "soft embedding"]
    tokens: int
    codes: int
    width: int = 256

    @property
    def title(self) -> str:
        """Operator and sizes in words."""
        return f"{self.operator}, {self.tokens:,} tokens, {self.codes:,} codes"


CASES = (
    Case("SNCE", 2048, 16_384),
    Case("SNCE", 2048, 131_072),
    Case("SNCE", 1024, 262_144),
    Case("soft embedding", 2048, 16_384),
)


@dataclass(frozen=True)
class Inputs:
    """What exists before a row is measured. Shapes: N tokens, K codes, d width.

    Attributes:
        hidden: (N, d), with gradient.
        weight: The head, (K, d), with gradient.
        codebook: Code vectors, or frozen embeddings, (K, d).
        codes: Of the tokens, (N,) int64.
        latents: Near the vectors of `codes`, (N, d).
        upstream: Gradient of a soft embedding, (N, d).
        table: Of neighbours, for the row that uses one.
    """

    hidden: Tensor
    weight: Tensor
    codebook: Tensor
    codes: Tensor
    latents: Tensor
    upstream: Tensor
    table: NeighbourTable | None


def make_inputs(case: Case, *, seed: int, table: bool) -> Inputs:
    """Random inputs: scores of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, std: float) -> Tensor:
        return torch.randn(rows, case.width, generator=generator).mul_(std)

    hidden = normal(case.tokens, 1.0).requires_grad_()
    weight = normal(case.codes, case.width**-0.5).requires_grad_()
    codebook = normal(case.codes, case.width**-0.5)
    codes = torch.randint(case.codes, (case.tokens,), generator=generator)
    latents = normal(case.tokens, NOISE * case.width**-0.5).add_(codebook[codes])
    upstream = normal(case.tokens, 1.0)
    made = random_table(case.codes, generator=generator) if table else None
    return Inputs(hidden, weight, codebook, codes, latents, upstream, made)


def random_table(codes: int, *, generator: torch.Generator) -> NeighbourTable:
    """A table of random neighbours and weights: it costs what a true one costs, without codes x codes distances."""
    weights = torch.rand(codes, NEIGHBOURS, generator=generator)
    return NeighbourTable(
        codes=torch.randint(codes, (codes, NEIGHBOURS), generator=generator, dtype=torch.int32),
        weights=weights.div_(weights.sum(dim=-1, keepdim=True)),
        kept_mass=torch.ones(codes),
        two_tau_squared=TWO_TAU_SQUARED,
        distance="l2",
        codebook_hash="random",
    )


def snce_naive(inputs: Inputs) -> Tensor:
    """SNCE as one writes it down: all distances, both softmaxes, their product."""
    with torch.no_grad():
        q = (-torch.cdist(inputs.latents, inputs.codebook).square() / TWO_TAU_SQUARED).softmax(dim=-1)
    log_p = (inputs.hidden @ inputs.weight.T).log_softmax(dim=-1)
    return -(q * log_p).sum(dim=-1).mean()


def snce(inputs: Inputs, *, impl: Literal["dense", "fused"]) -> Tensor:
    """SNCE by the library."""
    return neighbour_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.latents,
        inputs.codebook,
        two_tau_squared=TWO_TAU_SQUARED,
        impl=impl,
    )


def snce_table(inputs: Inputs) -> Tensor:
    """SNCE from codes, with a table of their neighbours."""
    assert inputs.table is not None
    return inputs.table.cross_entropy(inputs.hidden, inputs.weight, inputs.codes, impl="fused")


def hard_cross_entropy(inputs: Inputs) -> Tensor:
    """The loss that SNCE takes the place of."""
    return F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.codes)


def embed_naive(inputs: Inputs) -> Tensor:
    """The soft embedding as one writes it down."""
    return (inputs.hidden @ inputs.weight.T).softmax(dim=-1) @ inputs.codebook


def embed_fused(inputs: Inputs) -> Tensor:
    """The soft embedding by the library."""
    return soft_embedding(inputs.hidden, inputs.weight, inputs.codebook, impl="fused")


NAIVE, DENSE, FUSED, TABLE, HARD = (
    "SNCE naive dense",
    "SNCE dense",
    "SNCE fused",
    "SNCE with a neighbour table",
    "hard cross-entropy dense",
)
EMBED_DENSE, EMBED_FUSED = "dense softmax(hW')E", "fused soft_embedding"
ROWS: Mapping[str, Mapping[str, Callable[[Inputs], Tensor]]] = {
    "SNCE": {
        NAIVE: snce_naive,
        DENSE: lambda inputs: snce(inputs, impl="dense"),
        FUSED: lambda inputs: snce(inputs, impl="fused"),
        TABLE: snce_table,
        HARD: hard_cross_entropy,
    },
    "soft embedding": {EMBED_DENSE: embed_naive, EMBED_FUSED: embed_fused},
}
SAME = (NAIVE, DENSE, FUSED, EMBED_DENSE, EMBED_FUSED)
"""Rows that compute the same thing as the first of their operator."""


@dataclass(frozen=True)
class Demand:
    """A bound on a ratio of two rows of `CASES[case]`.

    Attributes:
        quantity: `memory` is `against` over `row`, at least the bound; `time` is `row` over `against`, at most.
        case: Index.
        row: What is judged.
        against: What it is compared with.
        bound: None shows the ratio and asks nothing.
    """

    quantity: Literal["memory", "time"]
    case: int
    row: str
    against: str
    bound: float | None


DEMANDS = (
    Demand("memory", 0, FUSED, NAIVE, 8),
    Demand("memory", 1, FUSED, NAIVE, 8),
    Demand("memory", 2, FUSED, NAIVE, 6),
    Demand("time", 0, FUSED, NAIVE, 0.85),
    Demand("time", 1, FUSED, NAIVE, None),
    Demand("time", 2, FUSED, NAIVE, None),
    Demand("time", 0, FUSED, HARD, 1.5),
    Demand("time", 1, FUSED, HARD, None),
    Demand("time", 2, FUSED, HARD, None),
    Demand("time", 0, TABLE, HARD, 1.1),
    Demand("time", 1, TABLE, HARD, None),
    Demand("time", 2, TABLE, HARD, None),
    Demand("memory", 3, EMBED_FUSED, EMBED_DENSE, 5),
    Demand("time", 3, EMBED_FUSED, EMBED_DENSE, 1.2),
)


def forward_backward(case: Case, name: str, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The row's output, and the gradients of hidden states and head."""
    out = ROWS[case.operator][name](inputs)
    upstream = inputs.upstream if out.ndim else None
    of_hidden, of_weight = torch.autograd.grad(out, (inputs.hidden, inputs.weight), upstream)
    return out.detach(), of_hidden, of_weight


def measure_peak(case: Case, name: str, seed: int) -> float | None:
    """Most memory that the row takes above its inputs, MiB; None where no process can reset its peak.

    Call it in a process of its own. Freed memory goes back to the system first, so that none of it is used again
    unseen.
    """
    torch.set_num_threads(1)
    small = Case(case.operator, tokens=64, codes=1024)
    forward_backward(small, name, make_inputs(small, seed=seed, table=name == TABLE))
    inputs = make_inputs(case, seed=seed, table=name == TABLE)
    gc.collect()
    try:
        CLEAR_REFS.write_text("5")  # proc_pid_clear_refs(5): the peak is now what is resident
    except OSError:
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    CLEAR_REFS.write_text("5")
    before = _status_mib("VmRSS")
    forward_backward(case, name, inputs)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@dataclass(frozen=True)
class Timing:
    """Of one case.

    Attributes:
        seconds: CPU seconds of the process, by row and round.
        losses: Values of the rows that are scalars.
        differences: Relative differences of value and gradients from the operator's first row, for those in `SAME`.
    """

    seconds: dict[str, list[float]]
    losses: dict[str, float]
    differences: dict[str, dict[str, float]]


def measure_time(case: Case, rounds: int, seed: int) -> Timing:
    """Time the rows in turn, `rounds` times after a first round that warms up and compares their results."""
    torch.set_num_threads(1)
    names = list(ROWS[case.operator])
    inputs = make_inputs(case, seed=seed, table=TABLE in names)
    losses: dict[str, float] = {}
    differences: dict[str, dict[str, float]] = {}
    first = forward_backward(case, names[0], inputs)
    for name in names:
        results = forward_backward(case, name, inputs)
        if results[0].ndim == 0:
            losses[name] = results[0].item()
        if name in SAME[1:] and name != names[0]:
            pairs = zip(("value", "hidden", "weight"), results, first, strict=True)
            differences[name] = {key: float((got - wanted).norm() / wanted.norm()) for key, got, wanted in pairs}
            assert max(differences[name].values()) < AGREEMENT, (name, differences[name])
        del results
    del first
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.process_time()
            forward_backward(case, name, inputs)
            seconds[name].append(time.process_time() - start)
    return Timing(seconds, losses, differences)


def measure(index: int, *, rounds: int, seed: int) -> dict[str, Any]:
    """Everything of `CASES[index]`, each measurement in a new process."""
    case = CASES[index]
    timing: Timing = _apart(measure_time, case, rounds, seed)
    rows = [
        {
            "name": name,
            "cpu_seconds": statistics.median(seconds),
            "cpu_seconds_by_round": seconds,
            "peak_extra_mib": _apart(measure_peak, case, name, seed),
            "loss": timing.losses.get(name),
            "relative_difference": timing.differences.get(name),
        }
        for name, seconds in timing.seconds.items()
    ]
    return {"index": index, "title": case.title, **asdict(case), "rounds": rounds, "rows": rows}


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def codebook_attention(
    *,
    shapes: list[int] = [0, 1, 2, 3],  # noqa: B006 - never changed
    rounds: int = 5,
    large_rounds: int = 3,
    seed: int = 0,
    out: str = str(RESULTS),
) -> None:
    """Measure every row of the chosen shapes, and write the tables.

    Args:
        shapes: 0 to 2 are SNCE at 16,384, 131,072 and 262,144 codes, 3 is the soft embedding; all by default.
        rounds: Timed runs of a row.
        large_rounds: The same for more than 100,000 codes.
        seed: Of the inputs.
        out: Folder of codebook_attention.json and .md.
    """
    if not shapes or not set(shapes) <= set(range(len(CASES))):
        raise ValueError(f"shapes: expected some of 0 to {len(CASES) - 1}, got {shapes}")
    for key, value in (("rounds", rounds), ("large_rounds", large_rounds)):
        if value < 1:
            raise ValueError(f"{key}: expected at least 1, got {value}")
    cases = [
        measure(index, rounds=large_rounds if CASES[index].codes > LARGE else rounds, seed=seed)
        for index in sorted(set(shapes))
    ]
    chosen = "" if len(cases) == len(CASES) else f" --shapes [{','.join(str(case['index']) for case in cases)}]"
    content = {
        "command": f"python benchmarks/codebook_attention.py{chosen} --rounds {rounds} --large_rounds {large_rounds}",
        "seed": seed,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}",
        "neighbours": NEIGHBOURS,
        "cases": cases,
        "claims": claims(cases),
    }
    write_json(Path(out) / "codebook_attention.json", content)
    (Path(out) / "codebook_attention.md").write_text(_markdown(content))
    print((Path(out) / "codebook_attention.md").read_text())


def claims(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ratios of `DEMANDS` whose case was measured. `holds` is None where nothing is asked, or no figure is there."""
    by_index = {case["index"]: case for case in cases}
    rows = []
    for demand in DEMANDS:
        if demand.case not in by_index:
            continue
        case = by_index[demand.case]
        key = "peak_extra_mib" if demand.quantity == "memory" else "cpu_seconds"
        figures = {row["name"]: row[key] for row in case["rows"]}
        ratio = _ratio(figures[demand.row], figures[demand.against])
        bound, holds = demand.bound, None
        if demand.quantity == "memory":
            claim = f"memory, {demand.against} / {demand.row}"
            ratio = _ratio(figures[demand.against], figures[demand.row])
            holds = None if ratio is None or bound is None else ratio >= bound
        else:
            claim = f"time, {demand.row} / {demand.against}"
            holds = None if ratio is None or bound is None else ratio <= bound
        bounds = {"at_least": bound} if demand.quantity == "memory" else {"at_most": bound}
        rows.append({"claim": claim, "case": case["title"], "ratio": ratio, **bounds, "holds": holds})
    return rows


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _markdown(content: Mapping[str, Any]) -> str:
    versions = content["versions"]
    peaks = [row["peak_extra_mib"] for case in content["cases"] for row in case["rows"]]
    lines = [
        "# Large codebooks: SNCE and the soft embedding, dense and fused",
        "",
        f"`{content['command']}`: forward and backward with gradients to hidden states and head, float32, hidden "
        f"states, latents and embeddings {CASES[0].width} wide, random inputs of seed {content['seed']}. torch "
        f"{versions['torch']}, Python {versions['python']}, {content['system']}, {content['threads']} thread. These "
        "are figures of a CPU; a GPU is not measured.",
        "",
        "Time is CPU seconds of the process, the median over rounds (least to most beside it); in a round all rows of "
        "a table run in turn in one process, after a round that is not counted. Ratios are of medians.",
        "",
        "Peak memory was not measured: this platform does not let a process reset its peak."
        if None in peaks
        else "Peak memory is what the process holds at most above its inputs, so that gradients of hidden states and "
        "head count: VmHWM, reset before, less VmRSS before, once a row in a process of its own.",
    ]
    for case in content["cases"]:
        lines += ["", f"## {case['title']}", "", *_table(case)]
    lines += ["", "## Claims", "", "| claim | at | ratio | asked | holds |", "|---|---|---|---|---|"]
    lines += [_claim(row) for row in content["claims"]]
    found = [row["relative_difference"] for case in content["cases"] for row in case["rows"]]
    worst = {key: max(row[key] for row in found if row is not None) for key in ("value", "hidden", "weight")}
    lines += [
        "",
        f"Rows that compute the same thing agree: relative differences from the first row are at most "
        f"{worst['value']:.0e} for the value and {max(worst['hidden'], worst['weight']):.0e} for the gradients "
        f"(below {AGREEMENT:g} is asserted).",
        "",
        f"The table of {content['neighbours']} neighbours a code is filled at random and belongs to the inputs: the "
        "cost of the loss does not depend on its values, and what building a true one costs is not in these figures.",
        "",
    ]
    return "\n".join(lines)


def _table(case: Mapping[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in case["rows"]}
    first, hard = next(iter(rows.values())), rows.get(HARD)
    head = ["row", "CPU s", "rounds", f"time / {first['name']}", *([f"time / {HARD}"] if hard else [])]
    head += ["peak extra, MiB", f"memory, {first['name']} / row"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        seconds, rounds = row["cpu_seconds"], row["cpu_seconds_by_round"]
        cells = [name, f"**{seconds:.2f}** ({min(rounds):.2f} to {max(rounds):.2f})", str(case["rounds"])]
        cells += [_shown(_ratio(seconds, other["cpu_seconds"])) for other in (first, hard) if other]
        cells += ["" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.0f}"]
        cells += [_shown(_ratio(first["peak_extra_mib"], row["peak_extra_mib"]), digits=1)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _claim(row: Mapping[str, Any]) -> str:
    memory = "at_least" in row
    bound = row["at_least"] if memory else row["at_most"]
    asked = "" if bound is None else f"at {'least' if memory else 'most'} {bound:g}"
    holds = {True: "yes", False: "no", None: ""}[row["holds"]]
    ratio = _shown(row["ratio"], digits=1 if memory else 2)
    return f"| {row['claim']} | {row['case']} | {ratio} | {asked} | {holds} |"


def _shown(ratio: float | None, *, digits: int = 2) -> str:
    return "not measured" if ratio is None else f"{ratio:.{digits}f}"


if __name__ == "__main__":
    run_command(codebook_attention, program="benchmarks/codebook_attention.py", args=None)
