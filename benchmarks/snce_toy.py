"""SNCE's toy experiment: two Gaussians, 2,500 codes on a grid, 100 samples, an MLP with a constant input.

    python benchmarks/snce_toy.py

Trains by l2 regression, cross-entropy, label smoothing and SNCE over several tau, and compares with the truth in closed
form. Writes benchmarks/results/snce_toy.json, .md and .png (the paper's Figure 2).
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.cli import run_command
from softgen.files import write_json
from softgen.relaxation import neighbour_distribution

RESULTS = Path(__file__).parent / "results"
SIDE, BOUND = 50, 5.0
CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
STD = 0.5
TAUS = (0.10, 0.20, 0.25, 0.30, 0.35, 0.50, 0.71, 1.00, 1.41)
SMOOTHINGS = (0.05, 0.1, 0.5)


@dataclass(frozen=True)
class Data:
    """One seed's samples: continuous (n, 2), their codes (n,), and held-out ones."""

    points: Tensor
    codes: Tensor
    held_out_codes: Tensor


@dataclass(frozen=True)
class Outcome:
    """A model against the truth: KL(truth || model) and held-out NLL in nats, total variation in [0, 1]."""

    kl: float
    total_variation: float
    nll: float


def grid() -> Tensor:
    """The codebook: 50 x 50 points on [-5, 5]^2, (2500, 2)."""
    axis = torch.linspace(-BOUND, BOUND, SIDE, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def truth() -> Tensor:
    """Mass of the mixture in the cell of each code, (2500,), by exact integrals, renormalised to the square."""
    axis = torch.linspace(-BOUND, BOUND, SIDE, dtype=torch.float64)
    half = BOUND / (SIDE - 1)

    def mass(centre: float) -> Tensor:
        def cdf(x: Tensor) -> Tensor:
            return torch.special.ndtr((x - centre) / STD)

        return cdf(axis + half) - cdf(axis - half)

    cells = torch.stack([torch.outer(mass(float(x)), mass(float(y))) for x, y in CENTRES]).sum(dim=0).flatten()
    return cells / cells.sum()


def draw(n: int, *, generator: torch.Generator) -> Tensor:
    """Points of the mixture, (n, 2)."""
    which = torch.randint(2, (n,), generator=generator)
    return CENTRES[which] + STD * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def make_data(seed: int) -> Data:
    """100 samples to learn from and 10,000 to judge by."""
    generator = torch.Generator().manual_seed(seed)
    points, held_out = draw(100, generator=generator), draw(10_000, generator=generator)

    def nearest(x: Tensor) -> Tensor:
        return torch.cdist(x, grid()).argmin(dim=1)

    return Data(points=points, codes=nearest(points), held_out_codes=nearest(held_out))


class ConstantMLP(nn.Module):
    """Ten linear layers of width 64 on a constant input.

    Args:
        outputs: Numbers that come out.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        widths = [1, *[64] * 9]
        hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(64, outputs))

    def forward(self) -> Tensor:
        """The outputs, (outputs,)."""
        out: Tensor = self.layers(torch.ones(1, 1))
        return out[0]


def train(
    loss_of: Callable[[Tensor], Tensor],
    *,
    outputs: int,
    seed: int,
    steps: int,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Adam at 1e-3 on the full set; returns the outputs at the end. `watch` sees them every 10 steps."""
    torch.manual_seed(seed)
    model = ConstantMLP(outputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        out = model()
        if watch is not None and step % 10 == 0:
            watch(out.detach())
        optimizer.zero_grad()
        loss_of(out).backward()
        optimizer.step()
    return model().detach()


def judge(log_probs: Tensor, data: Data) -> Outcome:
    """Compare log-probabilities (2500,) with the truth."""
    expected, got = truth(), log_probs.double()
    return Outcome(
        kl=float((torch.special.xlogy(expected, expected) - expected * got).sum()),
        total_variation=float(0.5 * (expected - got.exp()).abs().sum()),
        nll=float(-got[data.held_out_codes].mean()),
    )


def run_seed(seed: int, *, steps: int) -> dict[str, dict[str, float | None]]:
    """Every objective on one seed's data."""
    data, codebook = make_data(seed), grid()
    rows: dict[str, dict[str, float | None]] = {}

    def record(name: str, log_probs: Tensor, **more: float) -> None:
        values = {**asdict(judge(log_probs, data)), **more}
        # JSON knows no infinity.
        rows[name] = {key: value if math.isfinite(value) else None for key, value in values.items()}

    point = train(lambda out: (out - data.points.float()).square().sum(dim=1).mean(), outputs=2, seed=seed, steps=steps)
    cell = torch.cdist(point[None].double(), codebook).argmin()
    away = float(torch.cdist(point[None].double(), CENTRES).min())
    one_cell = torch.full((len(codebook),), -math.inf).index_fill(0, cell, 0.0)
    record("l2", one_cell, distance_to_nearest_mode=away)

    oracle = [math.inf]

    def best(out: Tensor) -> None:
        oracle[0] = min(oracle[0], judge(out.log_softmax(dim=0), data).kl)

    ce = train(
        lambda out: F.cross_entropy(out.expand(len(data.codes), -1), data.codes),
        outputs=len(codebook),
        seed=seed,
        steps=steps,
        watch=best,
    )
    record("ce", ce.log_softmax(dim=0))
    rows["ce, stopped by an oracle"] = {"kl": oracle[0]}
    for smoothing in SMOOTHINGS:
        target = F.one_hot(data.codes, len(codebook)).double().mean(dim=0) * (1 - smoothing) + smoothing / len(codebook)
        record(f"label smoothing {smoothing:g}", _fit(target, seed=seed, steps=steps), exact_kl=_exact(target, data))
    for tau in TAUS:
        target = neighbour_distribution(data.points, codebook, two_tau_squared=2 * tau**2, distance="l2").mean(dim=0)
        record(f"snce {tau:.2f}", _fit(target, seed=seed, steps=steps), exact_kl=_exact(target, data))
    return rows


def _fit(target: Tensor, *, seed: int, steps: int) -> Tensor:
    """Train towards the mean target: with a constant input the mean of the losses is the loss of the mean target."""
    wanted = target.float()
    out = train(lambda out: -(wanted * out.log_softmax(dim=0)).sum(), outputs=len(target), seed=seed, steps=steps)
    return out.log_softmax(dim=0)


def _exact(target: Tensor, data: Data) -> float:
    """KL of the closed-form optimum, which is the mean target itself."""
    return judge(target.double().log(), data).kl


def snce_toy(*, seeds: list[int] = [0, 1, 2, 3, 4], steps: int = 2000) -> None:  # noqa: B006 - never changed
    """Run every objective for every seed, and write the table and the picture.

    Args:
        seeds: Of data and weights.
        steps: Of training.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    runs = {seed: run_seed(seed, steps=steps) for seed in seeds}
    content = {
        "command": f"python benchmarks/snce_toy.py --steps {steps}",
        "seeds": seeds,
        "seconds": round(time.perf_counter() - begin, 1),
        "entropy_of_truth": float(torch.special.entr(truth()).sum()),
        "runs": runs,
        "claims": claims(runs),
    }
    write_json(RESULTS / "snce_toy.json", content)
    (RESULTS / "snce_toy.md").write_text(_markdown(content))
    _picture(seeds[0], steps=steps)
    print((RESULTS / "snce_toy.md").read_text())


def claims(runs: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Ratios of KL, each seed's own; the demand is on the worst seed."""
    demands = (
        ("CE / SNCE(.30)", "ce", "snce 0.30", 30),
        ("CE stopped by an oracle / SNCE(.30)", "ce, stopped by an oracle", "snce 0.30", 6),
        ("label smoothing .1 / SNCE(.30)", "label smoothing 0.1", "snce 0.30", 8),
        ("CE / SNCE(.71)", "ce", "snce 0.71", 10),
    )
    rows = []
    for title, worse, better, bound in demands:
        ratios = [run[worse]["kl"] / run[better]["kl"] for run in runs.values()]
        rows.append({"claim": title, "ratios": ratios, "at_least": bound, "holds": min(ratios) >= bound})
    off = max(
        abs(row["kl"] / row["exact_kl"] - 1)
        for run in runs.values()
        for name, row in run.items()
        if name.startswith("snce") and float(name.split()[1]) >= 0.2
    )
    rows.append(
        {"claim": "trained against closed form, tau >= 0.2", "worst": off, "at_most": 0.03, "holds": off <= 0.03}
    )
    return rows


def _markdown(content: Mapping[str, Any]) -> str:
    runs = content["runs"]
    lines = [
        "# SNCE's toy experiment",
        "",
        f"`{content['command']}`: two Gaussians at (-2, 0) and (2, 0) of variance 0.25, 2,500 codes on a grid over "
        f"[-5, 5]^2, 100 samples, a 10-layer MLP with a constant input; seeds {', '.join(map(str, content['seeds']))}, "
        f"{content['seconds']:.0f} s on one thread. KL(truth || model) in nats, against exact integrals of the cells "
        f"(entropy of the truth {content['entropy_of_truth']:.3f}); NLL of 10,000 held-out samples.",
        "",
        "| objective | KL, mean | KL by seed | total variation | held-out NLL |",
        "|---|---|---|---|---|",
    ]
    for name in next(iter(runs.values())):
        rows = [run[name] for run in runs.values()]
        mean = {key: _mean([row.get(key, math.nan) for row in rows]) for key in ("kl", "total_variation", "nll")}
        by_seed = ", ".join(_mean([row["kl"]]) for row in rows)
        lines.append(f"| {name} | **{mean['kl']}** | {by_seed} | {mean['total_variation']} | {mean['nll']} |")
    lines += ["", "| claim | by seed | asked | holds |", "|---|---|---|---|"]
    for row in content["claims"]:
        if "ratios" in row:
            shown, asked = ", ".join(f"{ratio:.1f}" for ratio in row["ratios"]), f"each at least {row['at_least']}"
        else:
            shown, asked = f"worst {row['worst']:.1%}", f"at most {row['at_most']:.0%}"
        lines.append(f"| {row['claim']} | {shown} | {asked} | {'yes' if row['holds'] else 'no'} |")
    lines += [
        "",
        "l2 regression ends in one cell between the modes: its KL is infinite. Cross-entropy never converges: its KL "
        "still rises, so that its figure goes with the number of steps.",
        "",
        "![Figure 2](snce_toy.png)",
        "",
    ]
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> str:
    """The mean in three digits; None stands for infinity, NaN for what was not measured."""
    if None in values:
        return "infinite"
    mean = statistics.mean(value for value in values if value is not None)
    return "" if math.isnan(mean) else f"{mean:.3f}"


def _picture(seed: int, *, steps: int) -> None:
    """The paper's Figure 2: truth, samples, codes, and what l2, CE and SNCE make of them."""
    from matplotlib.figure import Figure

    data, codebook = make_data(seed), grid()
    count = len(codebook)
    point = train(lambda out: (out - data.points.float()).square().sum(dim=1).mean(), outputs=2, seed=seed, steps=steps)
    hard = F.one_hot(data.codes, count).double().mean(dim=0)
    soft = neighbour_distribution(data.points, codebook, two_tau_squared=2 * 0.3**2, distance="l2").mean(dim=0)
    cell = int(torch.cdist(point[None].double(), codebook).argmin())
    panels: list[tuple[str, Tensor]] = [
        ("(a) truth", truth()),
        ("(b) 100 samples", data.points),
        ("(c) as codes", hard),
        ("(d) l2 regression", torch.zeros(count).index_fill(0, torch.tensor(cell), 1.0)),
        ("(e) cross-entropy", _fit(hard, seed=seed, steps=steps).exp()),
        ("(f) SNCE, tau 0.30", _fit(soft, seed=seed, steps=steps).exp()),
    ]
    figure = Figure(figsize=(12, 2.4), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 6), panels, strict=True):
        if values.ndim == 2:
            axes.scatter(values[:, 0], values[:, 1], s=3)
        else:
            axes.imshow(values.view(SIDE, SIDE).T.sqrt(), origin="lower", extent=(-BOUND, BOUND, -BOUND, BOUND))
        axes.set(title=title, xlim=(-BOUND, BOUND), ylim=(-BOUND, BOUND), aspect="equal")
    figure.savefig(RESULTS / "snce_toy.png", dpi=110)


if __name__ == "__main__":
    run_command(snce_toy, program="benchmarks/snce_toy.py", args=None)
