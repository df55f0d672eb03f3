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
# Cases of more codes than this take `large_rounds`: a dense round takes 10 to 25 s there.
LARGE = 100_000
PEAKS = 3
AGREEMENT = 1e-3
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3  # of mallopt(3)


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
    """What exists before a row is measured: N tokens, K codes, d width.

    Hidden states (N, d) and head (K, d) with gradient, code vectors or frozen embeddings (K, d), tokens (N,) and
    latents (N, d) near their vectors, the gradient of a soft embedding (N, d), a table of neighbours.
    """

    hidden: Tensor
    weight: Tensor
    codebook: Tensor
    tokens: Tensor
    latents: Tensor
    upstream: Tensor
    table: NeighbourTable


def make_inputs(case: Case, *, seed: int) -> Inputs:
    """Random inputs: scores of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, std: float) -> Tensor:
        return torch.randn(rows, case.width, generator=generator).mul_(std)

    hidden = normal(case.tokens, 1.0).requires_grad_()
    weight = normal(case.codes, case.width**-0.5).requires_grad_()
    codebook = normal(case.codes, case.width**-0.5)
    tokens = torch.randint(case.codes, (case.tokens,), generator=generator)
    latents = normal(case.tokens, NOISE * case.width**-0.5).add_(codebook[tokens])
    upstream = normal(case.tokens, 1.0)
    table = random_table(case.codes, generator=generator)
    return Inputs(hidden, weight, codebook, tokens, latents, upstream, table)


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
    tensors = (inputs.hidden, inputs.weight, inputs.latents, inputs.codebook)
    return neighbour_cross_entropy(*tensors, two_tau_squared=TWO_TAU_SQUARED, impl=impl)


NAIVE, DENSE, FUSED = "SNCE naive dense", "SNCE dense", "SNCE fused"
TABLE, HARD = "SNCE with a neighbour table", "hard cross-entropy dense"
EMBED_DENSE, EMBED_FUSED = "dense softmax(hW')E", "fused soft embedding"
ROWS: Mapping[str, Mapping[str, Callable[[Inputs], Tensor]]] = {
    "SNCE": {
        NAIVE: snce_naive,
        DENSE: lambda x: snce(x, impl="dense"),
        FUSED: lambda x: snce(x, impl="fused"),
        TABLE: lambda x: x.table.cross_entropy(x.hidden, x.weight, x.tokens, impl="fused"),
        HARD: lambda x: F.cross_entropy(x.hidden @ x.weight.T, x.tokens),
    },
    "soft embedding": {
        EMBED_DENSE: lambda x: (x.hidden @ x.weight.T).softmax(dim=-1) @ x.codebook,
        EMBED_FUSED: lambda x: soft_embedding(x.hidden, x.weight, x.codebook, impl="fused"),
    },
}
OTHER_LOSSES = (TABLE, HARD)
"""Rows whose values are not those of the first row of their operator."""


@dataclass(frozen=True)
class Demand:
    """Bounds on a ratio, by index of the case; None shows the ratio and asks nothing.

    The ratio is `against` over `row` for memory, at least the bound, and `row` over `against` for time, at most.
    """

    quantity: Literal["memory", "time"]
    row: str
    against: str
    bounds: Mapping[int, float | None]


DEMANDS = (
    Demand("memory", FUSED, NAIVE, {0: 8, 1: 8, 2: 6}),
    Demand("time", FUSED, NAIVE, {0: 0.85, 1: None, 2: None}),
    Demand("time", FUSED, HARD, {0: 1.5, 1: None, 2: None}),
    Demand("time", TABLE, HARD, {0: 1.1, 1: None, 2: None}),
    Demand("memory", EMBED_FUSED, EMBED_DENSE, {3: 5}),
    Demand("time", EMBED_FUSED, EMBED_DENSE, {3: 1.2}),
)


def forward_backward(case: Case, name: str, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The row's output, and the gradients of hidden states and head."""
    out = ROWS[case.operator][name](inputs)
    upstream = inputs.upstream if out.ndim else None
    of_hidden, of_weight = torch.autograd.grad(out, (inputs.hidden, inputs.weight), upstream)
    return out.detach(), of_hidden, of_weight


def measure_peak(case: Case, name: str, seed: int, keep_freed: bool) -> float | None:
    """Most memory that the row takes above its inputs, MiB; None where it cannot be measured. For a new process.

    Args:
        case: Sizes.
        name: Of the row.
        seed: Of the inputs.
        keep_freed: Whether the allocator may keep freed blocks of up to 32 MiB, as it does by itself. What it kept
            before is handed back first, or else it would be used again unseen.
    """
    torch.set_num_threads(1)
    small = Case(case.operator, tokens=64, codes=1024)
    forward_backward(small, name, make_inputs(small, seed=seed))
    inputs = make_inputs(case, seed=seed)
    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        if not keep_freed:
            libc.mallopt(M_MMAP_THRESHOLD, 2**17)
        libc.malloc_trim(0)
        CLEAR_REFS.write_text("5")  # the peak is now what is resident
    except (OSError, TypeError, AttributeError):
        return None
    before = _status_mib("VmRSS")
    forward_backward(case, name, inputs)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@dataclass(frozen=True)
class Timing:
    """CPU seconds by row and round, losses, and relative differences from the operator's first row."""

    seconds: dict[str, list[float]]
    losses: dict[str, float]
    differences: dict[str, dict[str, float]]


def measure_time(case: Case, rounds: int, seed: int) -> Timing:
    """Time the rows in turn, `rounds` times after a first round that warms up and compares their results."""
    torch.set_num_threads(1)
    names = list(ROWS[case.operator])
    inputs = make_inputs(case, seed=seed)
    losses: dict[str, float] = {}
    differences: dict[str, dict[str, float]] = {}
    first = None
    for name in names:
        results = forward_backward(case, name, inputs)
        if results[0].ndim == 0:
            losses[name] = results[0].item()
        if first is None:
            first = results
        elif name not in OTHER_LOSSES:
            pairs = zip(("value", "hidden", "weight"), results, first, strict=True)
            differences[name] = {key: float((got - wanted).norm() / wanted.norm()) for key, got, wanted in pairs}
            assert max(differences[name].values()) < AGREEMENT, (name, differences[name])
    del first, results
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
    rows = []
    for name, seconds in timing.seconds.items():
        peaks = [_apart(measure_peak, case, name, seed, True) for _ in range(PEAKS)]
        known = [peak for peak in peaks if peak is not None]
        row = {
            "name": name,
            "cpu_seconds": statistics.median(seconds),
            "cpu_seconds_by_round": seconds,
            "peak_extra_mib": statistics.median(known) if known else None,
            "peak_extra_mib_by_process": peaks,
            "peak_extra_mib_nothing_kept": _apart(measure_peak, case, name, seed, False),
            "loss": timing.losses.get(name),
            "relative_difference": timing.differences.get(name),
        }
        rows.append(row)
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
    chosen = sorted(set(shapes))
    cases = [measure(i, rounds=large_rounds if CASES[i].codes > LARGE else rounds, seed=seed) for i in chosen]
    options = f"--shapes [{','.join(map(str, chosen))}] --rounds {rounds} --large_rounds {large_rounds} --seed {seed}"
    content = {
        "command": f"python benchmarks/codebook_attention.py {options}",
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
    """The ratios of `DEMANDS` whose case was measured; `holds` is None where nothing is asked or measured."""
    by_index = {case["index"]: case for case in cases}
    rows = []
    for demand in DEMANDS:
        memory = demand.quantity == "memory"
        above, below = (demand.against, demand.row) if memory else (demand.row, demand.against)
        for index, bound in demand.bounds.items():
            if index not in by_index:
                continue
            key = "peak_extra_mib" if memory else "cpu_seconds"
            figures = {row["name"]: row[key] for row in by_index[index]["rows"]}
            ratio = _ratio(figures[above], figures[below])
            holds = None
            if ratio is not None and bound is not None:
                holds = ratio >= bound if memory else ratio <= bound
            row = {"claim": f"{demand.quantity}, {above} / {below}", "case": by_index[index]["title"], "ratio": ratio}
            rows.append({**row, "at_least" if memory else "at_most": bound, "holds": holds})
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
        f"states, latents and embeddings {CASES[0].width} wide, random inputs. torch "
        f"{versions['torch']}, Python {versions['python']}, {content['system']}, {content['threads']} thread. These "
        "are figures of a CPU; a GPU is not measured.",
        "",
        "Time is CPU seconds of the process, the median over rounds (least to most beside it); in a round all rows of "
        "a table run in turn in one process, after a round that is not counted. Ratios are of medians.",
        "",
        "Peak memory was not measured: that takes Linux with glibc."
        if None in peaks
        else "Peak memory is the most that the process holds above its inputs, gradients of hidden states and head "
        f"included: VmHWM, reset before, less VmRSS before; the median of {PEAKS} processes of their own. The "
        "allocator keeps freed blocks of up to 32 MiB, and they count. The last column is without: there each block "
        "above 128 KiB goes back at once. Claims go by the former.",
    ]
    for case in content["cases"]:
        lines += ["", f"## {case['title']}", "", *_table(case)]
    lines += ["", "## Claims", "", "| claim | at | ratio | asked | holds |", "|---|---|---|---|---|"]
    lines += [_claim(row) for row in content["claims"]]
    differences = [row["relative_difference"] for case in content["cases"] for row in case["rows"]]
    value, hidden, weight = (
        max(found[key] for found in differences if found is not None) for key in ("value", "hidden", "weight")
    )
    lines += [
        "",
        "Rows that compute the same thing agree: relative differences from the first row are at most "
        f"{value:.0e} for the value and {max(hidden, weight):.0e} for the gradients "
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
    head += ["peak extra, MiB", f"memory, {first['name']} / row", "peak with nothing kept, MiB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        seconds, rounds = row["cpu_seconds"], row["cpu_seconds_by_round"]
        cells = [name, f"**{seconds:.2f}** ({min(rounds):.2f} to {max(rounds):.2f})", str(case["rounds"])]
        cells += [_shown(_ratio(seconds, other["cpu_seconds"])) for other in (first, hard) if other]
        cells += [_shown(row["peak_extra_mib"], digits=0)]
        cells += [_shown(_ratio(first["peak_extra_mib"], row["peak_extra_mib"]), digits=1)]
        cells += [_shown(row["peak_extra_mib_nothing_kept"], digits=0)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _claim(row: Mapping[str, Any]) -> str:
    memory = "at_least" in row
    bound = row["at_least"] if memory else row["at_most"]
    asked = "" if bound is None else f"at {'least' if memory else 'most'} {bound:g}"
    holds = {True: "yes", False: "no", None: ""}[row["holds"]]
    ratio = _shown(row["ratio"], digits=1 if memory else 2)
    return f"| {row['claim']} | {row['case']} | {ratio} | {asked} | {holds} |"


def _shown(figure: float | None, *, digits: int = 2) -> str:
    return "not measured" if figure is None else f"{figure:.{digits}f}"


if __name__ == "__main__":
    run_command(codebook_attention, program="benchmarks/codebook_attention.py", args=None)
