"""What SNCE and the soft embedding cost over large codebooks: dense against fused, time and peak memory, on a CPU.

    python benchmarks/codebook_attention.py

Forward and backward, float32, with gradients to the hidden states and the head. Writes
benchmarks/results/codebook_attention.json and .md.
"""

import ctypes
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
from softgen.files import write_json
from softgen.relaxation import NeighbourTable, neighbour_cross_entropy, soft_embedding

RESULTS = Path(__file__).parent / "results"
NEIGHBOURS = 64
# Codes have a squared norm of about 1 here, and latents lie 0.3 away from theirs.
NOISE, TWO_TAU_SQUARED = 0.3, 0.3
# Cases of more codes than this take `large_rounds`: a dense round takes 10 to 25 s there.
LARGE = 100_000
AGREEMENT = 1e-3
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


TIME = "cpu_seconds"
MEMORY = {"peak_extra_mib": "memory", "peak_extra_mib_nothing_kept": "memory with nothing kept"}


@dataclass(frozen=True)
class Demand:
    """Bounds on a ratio, by index of the case; None shows the ratio and asks nothing.

    The ratio is `row` over `against` for time, at most the bound, and `against` over `row` for memory, at least.
    """

    figure: str
    row: str
    against: str
    bounds: Mapping[int, float | None]


DEMANDS = (
    *(Demand(figure, FUSED, NAIVE, {0: 8, 1: 8, 2: 6}) for figure in MEMORY),
    Demand(TIME, FUSED, NAIVE, {0: 0.85, 1: None, 2: None}),
    Demand(TIME, FUSED, HARD, {0: 1.5, 1: None, 2: None}),
    Demand(TIME, TABLE, HARD, {0: 1.1, 1: None, 2: None}),
    *(Demand(figure, EMBED_FUSED, EMBED_DENSE, {3: 5}) for figure in MEMORY),
    Demand(TIME, EMBED_FUSED, EMBED_DENSE, {3: 1.2}),
)


def forward_backward(case: Case, name: str, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The row's output, and the gradients of hidden states and head."""
    leaves = (inputs.hidden, inputs.weight)
    out = ROWS[case.operator][name](inputs)
    out.backward(inputs.upstream if out.ndim else None)
    of_hidden, of_weight = (leaf.grad for leaf in leaves)
    assert of_hidden is not None
    assert of_weight is not None
    for leaf in leaves:
        leaf.grad = None
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
    try:
        libc = ctypes.CDLL(None)
        if not keep_freed:
            libc.mallopt(M_MMAP_THRESHOLD, 2**17)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    except (OSError, TypeError, AttributeError):
        return None
    before = _status_mib("VmRSS")
    forward_backward(case, name, inputs)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def measure_time(case: Case, rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """Time the rows in turn, `rounds` times after a first round that warms up and compares their results."""
    torch.set_num_threads(1)
    inputs, first = make_inputs(case, seed=seed), None
    rows: dict[str, dict[str, Any]] = {}
    for name in ROWS[case.operator]:
        results = forward_backward(case, name, inputs)
        row = rows[name] = {"loss": None, "relative_difference": None, "runs": {TIME: []}}
        if results[0].ndim == 0:
            row["loss"] = results[0].item()
        if first is None:
            first = results
        elif name not in OTHER_LOSSES:
            pairs = zip(("value", "hidden", "weight"), results, first, strict=True)
            found = {key: float((got - wanted).norm() / wanted.norm()) for key, got, wanted in pairs}
            assert max(found.values()) < AGREEMENT, (name, found)
            row["relative_difference"] = found
    del first, results
    for _ in range(rounds):
        for name, row in rows.items():
            start = time.process_time()
            forward_backward(case, name, inputs)
            row["runs"][TIME].append(time.process_time() - start)
    return rows


def measure(index: int, *, rounds: int, seed: int) -> dict[str, Any]:
    """Everything of `CASES[index]`: times from one new process, each peak from another."""
    case = CASES[index]
    rows = []
    for name, row in _apart(measure_time, case, rounds, seed).items():
        for figure, keep_freed in zip(MEMORY, (True, False), strict=True):
            peaks = [_apart(measure_peak, case, name, seed, keep_freed) for _ in range(rounds)]
            row["runs"][figure] = [peak for peak in peaks if peak is not None]
        medians = {figure: statistics.median(runs) if runs else None for figure, runs in row["runs"].items()}
        rows.append({"name": name, **medians, **row})
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
    note: str = "",
) -> None:
    """Measure every row of the chosen shapes, and write the tables.

    Args:
        shapes: 0 to 2 are SNCE at 16,384, 131,072 and 262,144 codes, 3 is the soft embedding; all by default.
        rounds: Timed runs of a row.
        large_rounds: The same for more than 100,000 codes.
        seed: Of the inputs.
        out: Folder of codebook_attention.json and .md.
        note: What else a reader must know of these runs; goes into the table.
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
        "note": note,
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
        memory = demand.figure in MEMORY
        above, below = (demand.against, demand.row) if memory else (demand.row, demand.against)
        for index in sorted(demand.bounds.keys() & by_index.keys()):
            bound, rows_there = demand.bounds[index], by_index[index]["rows"]
            figures = {row["name"]: row[demand.figure] for row in rows_there}
            ratio, holds = _ratio(figures[above], figures[below]), None
            if ratio is not None and bound is not None:
                holds = ratio >= bound if memory else ratio <= bound
            claim = f"{MEMORY.get(demand.figure, 'time')}: {above} / {below}"
            row = {"claim": claim, "case": by_index[index]["title"], "ratio": ratio}
            rows.append({**row, "at_least" if memory else "at_most": bound, "holds": holds})
    return rows


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _markdown(content: Mapping[str, Any]) -> str:
    versions = content["versions"]
    measured = all(row[figure] is not None for case in content["cases"] for row in case["rows"] for figure in MEMORY)
    lines = [
        "# Large codebooks: SNCE and the soft embedding, dense and fused",
        "",
        f"`{content['command']}`: forward and backward with gradients to hidden states and head, float32, hidden "
        f"states, latents and embeddings {CASES[0].width} wide, random inputs. torch "
        f"{versions['torch']}, Python {versions['python']}, {content['system']}, {content['threads']} thread. These "
        "are figures of a CPU; a GPU is not measured.",
        "",
        "Time is CPU seconds of the process; in a round all rows of a table run in turn in one process, after a round "
        "that is not counted. Figures are medians over rounds (least to most beside them), ratios are of medians.",
        "",
        "Peak memory is the most that a process holds above its inputs, gradients of hidden states and head included: "
        "VmHWM, reset before, less VmRSS before; each round in a process of its own. glibc keeps freed blocks of up to "
        "32 MiB in pieces that the next block may not fit in, so that peaks differ from process to process; with "
        "nothing kept, each block above 128 KiB goes back to the system at once (mallopt), and the peak is what the "
        "row itself holds."
        if measured
        else "Peak memory was not measured: that takes Linux with glibc.",
        *(["", content["note"]] if content.get("note") else []),
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
        f"The table of {NEIGHBOURS} neighbours a code is filled at random and belongs to the inputs: the "
        "cost of the loss does not depend on its values, and what building a true one costs is not in these figures.",
        "",
    ]
    return "\n".join(lines)


def _table(case: Mapping[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in case["rows"]}
    first, hard = next(iter(rows.values())), rows.get(HARD)
    head = ["row", "rounds", "CPU s", f"time / {first['name']}", *([f"time / {HARD}"] if hard else [])]
    for words in MEMORY.values():
        head += [f"peak {words}, MiB", f"{first['name']} / row"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        cells = [name, str(case["rounds"]), _spread(row["runs"][TIME], digits=2)]
        cells += [_shown(_ratio(row[TIME], other[TIME])) for other in (first, hard) if other]
        for figure in MEMORY:
            cells += [_spread(row["runs"][figure], digits=0), _shown(_ratio(first[figure], row[figure]), digits=1)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(runs: Sequence[float], *, digits: int) -> str:
    if not runs:
        return _shown(None)
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(runs), min(runs), max(runs)))
    return f"**{median}** ({least} to {most})"


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
