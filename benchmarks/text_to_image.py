"""Text to image at CPU scale: does a CLIP reward, and then TTEO, raise what a one-step generator gets right?

    python benchmarks/text_to_image.py
    python benchmarks/text_to_image.py --seeds '[0]' --only '[teacher_8, dimo]'

Shapes: a tokenizer, a teacher, a CLIP that is the reward and another one that is the judge, shared by the seeds; for
each seed Di[M]O, Di[M]O with the reward, the reward without Di[M]O, TTEO and, where it is asked for, as many steps of
Di[M]O alone; the teacher's rows are drawn anew. Every row is scored on the same unseen prompts by a program that looks
at the hard-decoded pictures. Writes benchmarks/results/text_to_image.json, .md and .png. What is finished in the folder
of runs is not run again.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prompt_runs import (
    clip_name,
    elapsed,
    elapsed_minutes,
    objectives_with_clip,
    open_clip,
    retrieval,
    run_timed,
    train,
    train_clips,
)
from torch import Tensor

from rewards import CLIPReward
from softgen import load_generator, load_model, load_tokenizer
from softgen.cli import run_command
from softgen.data import Shapes
from softgen.data.scenes import TASKS, shapes_prompts
from softgen.files import write_json
from softgen.generation import generate, one_step_tokens, teacher_tokens
from softgen.images import save_grid
from softgen.metrics import FeatureStatistics, ShapesGenEval, frechet_distance
from softgen.metrics.clip_features import CLIPFeatures
from softgen.metrics.features import extract_features
from softgen.sampling import MaskGITSampler
from tteo import TTEOSettings, optimize

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parents[1] / "configs" / "shapes"
TEACHER_STEPS = (1, 4, 8, 16)
GUIDANCE = 2.0
TTEO = TTEOSettings(steps=20, lr=1.0, relaxation_temperature=8.0, batch_size=125)
REFERENCE = 5000
DIVERSITY = 250  # prompts of which a second picture is made
PICTURED = 16  # prompts, a column of pictures each
CONTROL = "dimo_longer"
ROWS = (*(f"teacher_{steps}" for steps in TEACHER_STEPS), "dimo", CONTROL, "reward", "tteo", "reward_alone")


@dataclass(frozen=True)
class Runs:
    """Where everything is."""

    root: Path

    def shared(self, name: str) -> Path:
        """A run of all seeds: tokenizer, teacher, clip, judge."""
        return self.root / name

    def seed(self, seed: int, name: str) -> Path:
        """A run of one seed."""
        return self.root / f"seed_{seed}" / name


def benchmark(
    *,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    only: list[str] = [name for name in ROWS if name != CONTROL],  # noqa: B006 - never changed
    n: int = 1000,
    out: str = "runs/benchmarks/shapes",
    processes: int = 2,
    note: str = "",
) -> None:
    """Train what is missing, score every row, and write the table.

    Args:
        seeds: One pipeline each.
        only: Rows; the default is all but `dimo_longer`, a control.
        n: Prompts.
        out: Where the runs are kept.
        processes: Trainings side by side.
        note: What else a reader must know of these runs; goes into the table.
    """
    runs = Runs(Path(out))
    with elapsed(runs.root / "elapsed.json"):
        with ThreadPoolExecutor(processes) as pool:
            teacher = pool.submit(train_teacher, runs)
            clips = train_clips(pool, runs.root, CONFIGS / "clip.yaml")
            teacher.result()
            run_seeds(pool, clips, runs, seeds, only, n)
        bounds = _bounds(runs, n)
    content = {
        "command": f"python benchmarks/text_to_image.py --seeds '{seeds}' --n {n} --only '{json.dumps(only)}'",
        "note": note,
        "seeds": seeds,
        "n": n,
        "guidance": GUIDANCE,
        "clips": {name: _retrieval(runs.shared(name)) for name in ("clip", "judge")},
        "bounds": bounds,
        "rows": [_row(runs, seeds, name) for name in only],
        "minutes": _minutes(runs, seeds),
        "elapsed_minutes": elapsed_minutes(runs.root / "elapsed.json"),  # 0 where the stages were run by hand
    }
    content["demands"] = _demands(content["rows"])
    write_json(RESULTS / "text_to_image.json", content)
    (RESULTS / "text_to_image.md").write_text(_markdown(content))
    _picture(runs, seeds[0], only)
    print((RESULTS / "text_to_image.md").read_text())


def train_teacher(runs: Runs) -> None:
    """The tokenizer and the teacher."""
    train(runs.shared("tokenizer"), CONFIGS / "1_tokenizer.yaml")
    tokenizer = f"--model.init_args.tokenizer={runs.shared('tokenizer')}/model"
    train(runs.shared("teacher"), CONFIGS / "2_teacher.yaml", "--seed=0", tokenizer)


def run_seeds(
    pool: Executor, clips: Sequence[Future[None]], runs: Runs, seeds: Sequence[int], only: Sequence[str], n: int
) -> None:
    """Train and score the seeds side by side, each as far as it can go; the teacher's rows fill a gap."""
    students = [name for name in only if not name.startswith("teacher")]
    trained = [pool.submit(train_dimo, runs, seed) for seed in seeds] if students else []
    for run in clips:
        run.result()
    names = [name for name in only if name not in students]
    scored = [pool.submit(score_apart, runs, seed, "teacher_scores", names, n) for seed in seeds] if names else []
    with ThreadPoolExecutor(len(seeds)) as waiting:
        list(waiting.map(lambda seed, dimo: _refine(pool, dimo, runs, seed, students, n), seeds, trained))
    for run in scored:
        run.result()


def _refine(pool: Executor, dimo: Future[None], runs: Runs, seed: int, only: Sequence[str], n: int) -> None:
    """Hand the pool what goes on from Di[M]O, and then the scores, and wait for them."""
    refinements: list[Callable[[Runs, int], None]] = [
        *([train_reward] if {"reward", "tteo"} & set(only) else []),
        *([train_longer] if CONTROL in only else []),
        *([train_reward_alone] if "reward_alone" in only else []),
    ]
    dimo.result()
    for run in [pool.submit(train_more, runs, seed) for train_more in refinements]:
        run.result()
    pool.submit(score_apart, runs, seed, "scores", only, n).result()


def train_dimo(runs: Runs, seed: int) -> None:
    """The one-step generator."""
    train(runs.seed(seed, "dimo"), CONFIGS / "3_dimo.yaml", f"--seed={seed}", _teacher(runs))


def train_reward(runs: Runs, seed: int) -> None:
    """The one-step generator under the reward, held by Di[M]O."""
    _train_on(runs, seed, "reward", _objectives(runs, seed))


def train_longer(runs: Runs, seed: int) -> None:
    """To compare with the reward: as many steps, with its settings, of Di[M]O alone."""
    dimo, _ = _objectives(runs, seed)
    _train_on(runs, seed, "dimo_longer", [dimo])


def train_reward_alone(runs: Runs, seed: int) -> None:
    """The one-step generator under the reward, held by nothing."""
    _, reward = _objectives(runs, seed)
    alone = {**reward, "init_args": {**reward["init_args"], "weight": 1.0}}  # nothing to be weighed against
    _train_on(runs, seed, "reward_alone", [alone])


def _teacher(runs: Runs) -> str:
    return f"--model.init_args.teacher={runs.shared('teacher')}/model"


def _objectives(runs: Runs, seed: int) -> list[dict[str, Any]]:
    return objectives_with_clip(CONFIGS / "4_reward.yaml", runs.shared("clip"), runs.seed(seed, "dimo") / "auxiliary")


def _train_on(runs: Runs, seed: int, name: str, objectives: Sequence[Mapping[str, Any]]) -> None:
    student = f"--model.init_args.student={runs.seed(seed, 'dimo')}/model"
    given = f"--model.init_args.objectives={json.dumps(objectives)}"
    train(runs.seed(seed, name), CONFIGS / "4_reward.yaml", f"--seed={seed}", _teacher(runs), student, given)


def score_apart(runs: Runs, seed: int, folder: str, names: Sequence[str], n: int) -> None:
    """Score some rows of one seed in a process of its own."""
    if not all(runs.seed(seed, f"score_{name}.json").is_file() for name in names):
        words = [sys.executable, __file__, "--worker", str(runs.root), str(seed), str(n), *names]
        run_timed(runs.seed(seed, folder), words)


def score_seed(runs: Runs, seed: int, n: int, only: Sequence[str]) -> None:
    """Score the rows of one seed that have no score yet; one thread."""
    torch.set_num_threads(1)
    judge = Judge(runs)
    prompts = [asked.prompt for asked in shapes_prompts(n)]
    tokenizer = load_tokenizer(runs.shared("teacher") / "model")
    for name in only:
        path = runs.seed(seed, f"score_{name}.json")
        if path.is_file():
            continue
        first = make(runs, seed, name, prompts, tokenizer, seed)
        again, _ = make(runs, seed, name, prompts[:DIVERSITY], tokenizer, seed + 1000)
        tasks = ShapesGenEval()
        tasks.update(first[0], prompts)
        write_json(
            path,
            {
                "tasks": {task: float(value) for task, value in tasks.compute().items()},
                **judge.score(first[0], again, prompts),
                "seconds": first[1],
            },
        )
        save_grid(first[0][:60], path.with_suffix(".png"), columns=12)


def make(runs: Runs, seed: int, name: str, prompts: Sequence[str], tokenizer: Any, noise: int) -> tuple[Tensor, float]:
    """Images of one row, and the seconds that they took."""
    start = time.perf_counter()
    if name.startswith("teacher_"):
        model = load_model(runs.shared("teacher") / "model")
        sampler = MaskGITSampler(steps=int(name.removeprefix("teacher_")), guidance=GUIDANCE)
        made = generate(teacher_tokens(model, sampler), tokenizer, prompts, seed=noise, batch_size=250)
        return made.images, time.perf_counter() - start
    generator = load_generator(runs.seed(seed, "reward" if name == "tteo" else name) / "model")
    if name == "tteo":
        reward = CLIPReward(clip_name(runs.shared("clip")))
        result = optimize(generator, tokenizer, reward, list(prompts), settings=TTEO, seed=noise)
        return result.images, time.perf_counter() - start
    made = generate(one_step_tokens(generator), tokenizer, prompts, seed=noise, batch_size=250)
    return made.images, time.perf_counter() - start


class Judge:
    """Compares with real pictures, by a CLIP that is no reward.

    Args:
        runs: Where its CLIP is.
    """

    def __init__(self, runs: Runs) -> None:
        self.clips = {name: open_clip(runs.shared(name)) for name in ("clip", "judge")}
        self.extractor = CLIPFeatures(self.clips["judge"], name="shapes_judge")
        source = Shapes(seed=10).train_source()
        images = torch.cat([source.fetch(range(first, first + 500))["image"] for first in range(0, REFERENCE, 500)])
        self.reference = FeatureStatistics.from_features(extract_features(images, extractor=self.extractor).features)

    @torch.no_grad()
    def score(self, images: Tensor, again: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Frechet distance, diversity under one prompt, and the scores of both CLIPs."""
        features, others = (extract_features(some, extractor=self.extractor).features for some in (images, again))
        return {
            "frechet": frechet_distance(FeatureStatistics.from_features(features), self.reference),
            "diversity": float((features[: len(others)] - others).norm(dim=1).mean()),
            **{
                name: float((clip.encode_images(images) * clip.encode_prompts(prompts)).sum(dim=1).mean())
                for name, clip in self.clips.items()
            },
        }


def _bounds(runs: Runs, n: int) -> dict[str, dict[str, float]]:
    """What real pictures of held-out prompts score, and their reconstructions."""
    batch = Shapes(val_samples=n).val_source().fetch(range(n))
    tokenizer, judge = load_tokenizer(runs.shared("tokenizer") / "model"), Judge(runs)
    images = batch["image"]
    with torch.no_grad():
        parts = [tokenizer.decode(tokenizer.encode(part)) for part in torch.split(images, 250)]
    bounds = {}
    for name, shown in (("real", images), ("reconstructed", torch.cat(parts))):
        tasks = ShapesGenEval()
        tasks.update(shown, batch["prompt"])
        scores = judge.score(shown, shown, batch["prompt"])
        del scores["diversity"]  # there is one picture of a prompt
        bounds[name] = {**{task: float(value) for task, value in tasks.compute().items()}, **scores}
    return bounds


def _row(runs: Runs, seeds: Sequence[int], name: str) -> dict[str, Any]:
    scores = [json.loads(runs.seed(seed, f"score_{name}.json").read_text()) for seed in seeds]

    def mean(of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.mean(map(of, scores))

    row: dict[str, Any] = {"name": name, "overall_by_seed": [score["tasks"]["overall"] for score in scores]}
    for task in (*TASKS, "overall"):
        row[task] = mean(lambda score, task=task: score["tasks"][task])  # type: ignore[misc]
    for key in ("frechet", "diversity", "clip", "judge", "seconds"):
        row[key] = mean(lambda score, key=key: score[key])  # type: ignore[misc]
    return row


def _retrieval(folder: Path) -> dict[str, float]:
    batch = Shapes(val_samples=1000).val_source().fetch(range(1000))
    return retrieval(open_clip(folder), batch["image"], batch["prompt"])


def _minutes(runs: Runs, seeds: Sequence[int]) -> dict[str, float]:
    folders = {name: runs.shared(name) for name in ("tokenizer", "teacher", "clip", "judge")}
    for name in ("dimo", "dimo_longer", "reward", "reward_alone", "teacher_scores", "scores"):
        folders.update({f"{name}_{seed}": runs.seed(seed, name) for seed in seeds})
    paths = {name: folder / "time.json" for name, folder in folders.items()}
    return {name: json.loads(path.read_text())["minutes"] for name, path in paths.items() if path.is_file()}


def _demands(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_name = {row["name"]: row for row in rows}
    if not {"dimo", "reward", "tteo"} <= by_name.keys():
        return {}
    teacher = max((row for name, row in by_name.items() if name.startswith("teacher")), key=lambda row: row["overall"])
    dimo, reward, tteo, longer = by_name["dimo"], by_name["reward"], by_name["tteo"], by_name.get(CONTROL)
    return {
        "best teacher, overall (above 0.6)": teacher["overall"],
        "dimo / teacher (at least 0.75)": dimo["overall"] / teacher["overall"],
        "reward / dimo (at least 1.15)": reward["overall"] / dimo["overall"],
        **({"reward / as many steps of dimo": reward["overall"] / longer["overall"]} if longer else {}),
        "largest fall of a task under the reward (at most 0.03)": max(dimo[task] - reward[task] for task in TASKS),
        "Frechet distance, reward / dimo (at most 1.2)": reward["frechet"] / dimo["frechet"],
        "tteo - reward, overall (above 0)": tteo["overall"] - reward["overall"],
        "tasks that TTEO raises (at least 5 of 6)": sum(tteo[task] > reward[task] for task in TASKS),
    }


def _markdown(content: Mapping[str, Any]) -> str:
    columns = ["overall", *TASKS, "frechet", "diversity", "clip", "judge"]
    lines = [
        "# Text to image in small: shapes",
        "",
        f"n = {content['n']} unseen prompts, hard-decoded pictures, means of seeds {content['seeds']}; guidance "
        f"{content['guidance']:g}. Tasks are GenEval's six, verified by a program. Frechet distance to {REFERENCE} "
        "real pictures on the features of the judge, a CLIP that was no reward. Diversity: mean distance of those "
        f"features between two pictures of one prompt, {DIVERSITY} prompts. `clip`: mean cosine of the rewarded CLIP; "
        "`judge`: the other's. `dimo_longer`: Di[M]O alone for the steps that `reward` has had beyond `dimo`. "
        "Teacher, tokenizer and CLIPs are shared by the seeds.",
        "",
        f"Command: `{content['command']}`.",
        "",
        content["note"],
        "",
        "| row | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in (*content["bounds"].items(), *((row["name"], row) for row in content["rows"])):
        shown = [f"{row[key]:.3f}" if key in row else "-" for key in columns]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    lines += ["", "| demand | measured |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in content["demands"].items()]
    lines += [
        "",
        "Overall by seed: "
        + "; ".join(
            f"{row['name']} " + " / ".join(f"{value:.3f}" for value in row["overall_by_seed"])
            for row in content["rows"]
        )
        + ".",
    ]
    prompts = "; ".join(asked.prompt for asked in shapes_prompts(PICTURED))
    names = ", ".join(row["name"] for row in content["rows"])
    lines += ["", "![pictures](text_to_image.png)", "", f"Rows from above: {names}. Columns: {prompts}."]
    clips = (
        f"{name}: image to text {value['image_to_text']:.3f}, text to image {value['text_to_image']:.3f}"
        for name, value in content["clips"].items()
    )
    lines += ["", "Retrieval among 100 held-out pairs: " + "; ".join(clips) + "."]
    minutes = content["minutes"]
    spent = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    lines += ["", f"Minutes of CPU, one thread each, two side by side: {spent}; in all {sum(minutes.values()):.0f}."]
    if content["elapsed_minutes"]:
        lines.append(f"From start to end: {content['elapsed_minutes']:.0f} minutes.")
    return "\n".join(lines) + "\n"


def _picture(runs: Runs, seed: int, only: Sequence[str]) -> None:
    """The same prompts, a row of pictures for each row of the table."""
    prompts = [asked.prompt for asked in shapes_prompts(PICTURED)]
    tokenizer = load_tokenizer(runs.shared("teacher") / "model")
    rows = [make(runs, seed, name, prompts, tokenizer, 5)[0] for name in only]
    save_grid(torch.cat(rows), RESULTS / "text_to_image.png", columns=PICTURED)


def main() -> None:
    """Run the command, or score one seed in a process of its own."""
    if sys.argv[1:2] == ["--worker"]:
        root, seed, n, *only = sys.argv[2:]
        score_seed(Runs(Path(root)), int(seed), int(n), only)
    else:
        run_command(benchmark, program="benchmarks/text_to_image.py", args=None)


if __name__ == "__main__":
    main()
