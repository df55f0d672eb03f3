"""What a reward in a process of its own costs beside the same reward in this process, on a CPU.

    python benchmarks/isolated.py

Score and gradient of a batch, forward and backward, float32. Writes benchmarks/results/isolated.json and .md.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rewards import CLIPReward, Reward
from rewards.isolated import Isolated

RESULTS = Path(__file__).parent / "results"
SHAPES = ((1, 3, 512, 512), (4, 3, 1024, 1024))
CHEAP, CLIP = "mean of squares", "CLIP"
ROWS = ("in process", "isolated")
# A vision tower of 22 M weights, as ViT-S/16 has; the text tower plays no part, since prompts are encoded once.
ARCHITECTURE = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 384, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


class MeanOfSquares(Reward):
    """As cheap as a reward of every pixel can be."""

    def forward(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (B,)."""
        return images.square().mean(dim=(1, 2, 3))


def small_clip(folder: str) -> CLIPReward:
    """A CLIP of random weights, the same in every process that opens this folder."""
    import open_clip

    open_clip.add_model_config(Path(folder) / "softgen-isolated.json")
    return CLIPReward("softgen-isolated", pretrained=Path(folder) / "weights.pt")


def isolated(*, rounds: int = 30, clip_rounds: int = 8, seed: int = 0) -> None:
    """Measure, and write the results.

    Args:
        rounds: Of the cheap reward at each shape, after two that are not counted.
        clip_rounds: Of the CLIP.
        seed: Of the images and the weights.
    """
    import open_clip

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "softgen-isolated.json").write_text(json.dumps(ARCHITECTURE))
        open_clip.add_model_config(Path(folder) / "softgen-isolated.json")
        torch.save(open_clip.create_model("softgen-isolated").state_dict(), Path(folder) / "weights.pt")
        here = str(Path(__file__).resolve().parent)
        pairs = {
            CHEAP: (MeanOfSquares(), _worker("MeanOfSquares", here), rounds),
            CLIP: (small_clip(folder), _worker("small_clip", here, folder=folder), clip_rounds),
        }
        cases = [
            _measure(name, shape, rewards=(local, remote), rounds=count, seed=seed)
            for name, (local, remote, count) in pairs.items()
            for shape in SHAPES
        ]
        for _, remote, _ in pairs.values():
            remote.close()
    content = {
        "command": f"python benchmarks/isolated.py --rounds {rounds} --clip_rounds {clip_rounds} --seed {seed}",
        "seed": seed,
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "system": f"{platform.system()} {platform.machine()}",
        "cases": cases,
    }
    from softgen.files import write_json

    write_json(RESULTS / "isolated.json", content)
    (RESULTS / "isolated.md").write_text(report(content))
    print(report(content))


def _worker(name: str, here: str, **options: str) -> Isolated:
    """The reward of this file under this interpreter, whose worker has this folder on its path."""
    os.environ["PYTHONPATH"] = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
    return Isolated(f"isolated.{name}", options=options)


def _measure(
    name: str, shape: tuple[int, ...], *, rewards: tuple[Reward, Isolated], rounds: int, seed: int
) -> dict[str, Any]:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    prompts = ["a cat"] * len(images)
    runs: dict[str, list[float]] = {row: [] for row in ROWS}
    results: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for number in range(rounds + 2):
        # In turn, and each first in half of the rounds.
        order = list(zip(ROWS, rewards, strict=True))[:: 1 if number % 2 else -1]
        for row, reward in order:
            leaf = images.clone().requires_grad_()
            begun = time.perf_counter()
            scores = reward(leaf, prompts)
            scores.sum().backward()
            taken = time.perf_counter() - begun
            assert leaf.grad is not None
            results[row] = scores.detach(), leaf.grad
            if number >= 2:
                runs[row].append(1000 * taken)
    for one, other in zip(results[ROWS[0]], results[ROWS[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    local, remote = (statistics.median(runs[row]) for row in ROWS)
    overheads = [there - here for here, there in zip(runs[ROWS[0]], runs[ROWS[1]], strict=True)]
    return {
        "reward": name,
        "shape": list(shape),
        "rounds": rounds,
        "milliseconds": runs,
        "median": {ROWS[0]: local, ROWS[1]: remote},
        "overhead_milliseconds": overheads,
        "ratio": remote / local,
    }


def report(content: Mapping[str, Any]) -> str:
    """The results in words and tables."""
    versions = content["versions"]
    lines = [
        "# A reward in a process of its own",
        "",
        f"`{content['command']}`: score and gradient of a batch by `rewards.Isolated` and by the same reward in this "
        f"process, float32, random images. torch {versions['torch']}, Python {versions['python']}, "
        f"{content['system']}, {content['threads']} thread in each process. These are figures of a CPU; a GPU is not "
        "measured.",
        "",
        "Wall time of forward and backward in milliseconds: medians over rounds (least to most beside them). In a "
        "round both run in turn, each first in half of the rounds, after two rounds that are not counted. The "
        "overhead is the difference within a round. The machine had other work at the time, which shows in the most.",
        "",
        "| reward | images | rounds | in process, ms | isolated, ms | overhead, ms | ratio of medians |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in content["cases"]:
        shape = "x".join(map(str, case["shape"]))
        cells = [case["reward"], shape, str(case["rounds"])]
        cells += [_spread(case["milliseconds"][row]) for row in ROWS]
        cells += [_spread(case["overhead_milliseconds"]), f"{case['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    vision = ARCHITECTURE["vision_cfg"]
    assert isinstance(vision, dict)
    lines += [
        "",
        f"The CLIP has random weights and a vision tower of {vision['layers']} layers, {vision['width']} wide, at "
        f"{vision['image_size']} pixels in patches of {vision['patch_size']}. Scores and gradients of both sides agree "
        "(relative 1e-5 is asserted).",
        "",
    ]
    return "\n".join(lines)


def _spread(runs: Sequence[float]) -> str:
    return f"**{statistics.median(runs):.1f}** ({min(runs):.1f} to {max(runs):.1f})"


if __name__ == "__main__":
    # The worker imports this file too, and starts sooner without Lightning.
    from softgen.cli import run_command

    run_command(isolated, program="benchmarks/isolated.py", args=None)
