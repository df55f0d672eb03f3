"""Soft-Di[M]O at CPU scale: what GAN, reward and TTEO add to a one-step student, beside the controls they must beat.

    python benchmarks/soft_dimo.py
    python benchmarks/soft_dimo.py --guidance 3

Every arm goes on from the same Di[M]O checkpoint of its seed (benchmarks/dimo.py trains it if it is not there), sees
the same batches and the same noise at the same step (common random numbers), and is scored on the same draws. Writes
benchmarks/results/soft_dimo.json, .md and .png, or for another guidance soft_dimo_guidance_3 and so on. An arm whose
folder holds a result is not run again.
"""

import csv
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from dimo import RESULTS, run_pipeline
from soft_dimo_arms import (
    DATA,
    EARLY,
    START,
    Arm,
    Setting,
    arms,
    config_of,
    config_of_start,
    gan,
    open_student,
    recipe_guidance,
)
from soft_dimo_report import markdown, picture
from soft_dimo_tteo import measure_tteo

from rewards import ClassifierReward
from softgen import load_model, load_tokenizer
from softgen.categorical import sample_categorical
from softgen.class_evaluation import named_protocol
from softgen.classifier import classifier, named_data
from softgen.cli import run_command
from softgen.data import write_token_cache
from softgen.files import write_json
from softgen.generation import balanced_labels, generate, one_step_tokens, teacher_tokens
from softgen.metrics import SmallClassifier, class_log_probability
from softgen.metrics.protocol import Protocol
from softgen.models.generator import OneStepGenerator
from softgen.random import SampleRandom
from softgen.relaxation import decoding_gap, probabilities, sharpness
from softgen.sampling import MaskGITSampler
from softgen.tokenizers.base import ImageTokenizer

GUIDED_STEPS = (1, 8)
"""Passes of the teacher that are scored under another guidance than the recipe's."""


def benchmark(
    *,
    data_root: str = "data/fashion_mnist",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    only: list[str] | None = None,
    out: str = "runs/benchmarks",
    processes: int = 2,
    guidance: float | None = None,
    start_steps: int = 1000,
    steps: int = 160,
    critic_steps: int = 60,
    early_steps: int = 300,
    n: int = 10_000,
    tteo_n: int = 300,
    note: str = "",
) -> None:
    """Run every arm for every seed, score them, and write the tables.

    Args:
        data_root: Folder of Fashion-MNIST's files.
        seeds: One Di[M]O checkpoint each.
        only: Names of the arms to run; by default all.
        out: Where the runs are kept.
        processes: Arms side by side, one thread each.
        guidance: Of the teacher that Di[M]O distils, in every arm and before it; by default the recipe's.
        start_steps: Steps of Di[M]O under that guidance before the arms; the recipe's is in the pipeline, finished.
        steps: Steps of the student in every arm.
        critic_steps: Steps before them in which only critics learn, in every arm.
        early_steps: Steps of Di[M]O that make the blunt student.
        n: Images that each figure is measured on.
        tteo_n: Images that TTEO optimises.
        note: What else a reader must know of these runs; goes into the table.
    """
    root, scale = Path(out) / DATA, recipe_guidance() if guidance is None else guidance
    settings = [
        Setting(seed, root, data_root, scale, start_steps, steps, critic_steps, early_steps, n) for seed in seeds
    ]
    for setting in settings:
        _prepare(setting)
    cost = _step_cost(settings[0])
    known = arms(equal_compute=cost["ratio"], steps=critic_steps + steps, guidance=scale)
    wanted = [arm for arm in known if only is None or arm.name in only]
    starts = [start for start in (START, EARLY) if any(arm.start is start for arm in wanted)]
    chosen = [arm for arm in known if arm in wanted or arm in starts]
    jobs = [(setting, arm) for arm in chosen for setting in settings]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        missing = [(setting, start is EARLY) for setting in settings for start in starts]
        for future in [pool.submit(_train_start, setting, early=early) for setting, early in missing]:
            future.result()
        started = [pool.submit(_run_arm, setting, arm) for setting, arm in jobs]
        started += [pool.submit(_run_teacher, setting) for setting in settings]
        optimised = [START] if tteo_n else []
        started += [pool.submit(_run_tteo, setting, arm, tteo_n) for setting in settings for arm in optimised]
        try:
            for future in as_completed(started):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    names = [arm.name for arm in chosen]
    guided = scale != recipe_guidance()
    options = [f"--guidance {scale:g}", f"--start_steps {start_steps}"] if guided else []
    options += [f"--steps {steps}", f"--critic_steps {critic_steps}"]
    options += [] if tteo_n else ["--tteo_n 0"]
    options += [] if only is None else [f"--only '{json.dumps(only)}'"]
    content = {
        "command": " ".join(["python benchmarks/soft_dimo.py --data_root FOLDER", *options]),
        "protocol": named_protocol(DATA, data_root=data_root, folder=str(settings[0].pipeline / "extractor")).name(n),
        "note": note,
        "seeds": seeds,
        "guidance": scale,
        **({"start_steps": start_steps} if guided else {}),
        "steps": steps,
        "critic_steps": critic_steps,
        "early_steps": early_steps,
        "step_cost": cost,
        "teacher": [_teacher_rows(setting) for setting in settings],
        "arms": {name: [_result(setting, name) for setting in settings] for name in names},
        "tteo": {arm.name: [_result(setting, f"tteo_{arm.name}") for setting in settings] for arm in optimised},
    }
    name = settings[0].name
    write_json(RESULTS / f"{name}.json", content)
    (RESULTS / f"{name}.md").write_text(markdown(content, samples=f"{name}.png"))
    tokenizer = load_tokenizer(settings[0].pipeline / "2_teacher" / "model")
    picture(RESULTS / f"{name}.png", [open_student(settings[0], arm) for arm in chosen], tokenizer, seed=seeds[0])
    print((RESULTS / f"{name}.md").read_text())


def _prepare(setting: Setting) -> None:
    """Train what is missing: the pipeline up to Di[M]O, the judge; encode the images once."""
    torch.set_num_threads(1)
    run_pipeline(DATA, setting.data_root, setting.pipeline, seed=setting.seed)
    if not (setting.judge / "config.json").is_file():
        classifier(data_name=DATA, data_root=setting.data_root, out=str(setting.judge), progress=False)
    if not setting.tokens.is_dir():
        tokenizer = load_tokenizer(setting.pipeline / "2_teacher" / "model")
        write_token_cache(setting.tokens, tokenizer, named_data(DATA, data_root=setting.data_root), progress=False)


def _train_start(setting: Setting, *, early: bool) -> None:
    """The Di[M]O run that arms go on from, where the pipeline has not left it."""
    from softgen.fit import main as fit

    folder = setting.checkpoint(early=early)
    if (folder / "model" / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of_start(setting, early=early)))
    fit([f"--config={folder / 'config.yaml'}"])


def _run_teacher(setting: Setting) -> None:
    """The teacher under the setting's guidance; the pipeline has scored it under the recipe's."""
    target = setting.folder("teacher") / "result.json"
    if target.is_file() or setting.guidance == recipe_guidance():
        return
    torch.set_num_threads(1)
    folder = setting.pipeline / "2_teacher" / "model"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    protocol = _protocol(setting.data_root, setting.pipeline / "extractor")
    labels = balanced_labels(setting.n, num_classes=10)
    rows = []
    for steps in GUIDED_STEPS:
        sampler = MaskGITSampler(steps=steps, guidance=setting.guidance)
        made = generate(teacher_tokens(model, sampler), tokenizer, labels, seed=setting.seed)
        rows.append({"name": f"teacher_{steps}", **asdict(protocol.score(made.images, labels))})
    write_json(target, {"rows": rows})


def _teacher_rows(setting: Setting) -> list[dict[str, Any]]:
    own = setting.folder("teacher") / "result.json"
    path = own if own.is_file() else setting.pipeline / "metrics.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def _run_arm(setting: Setting, arm: Arm) -> None:
    """Train and score an arm; a start is scored alone."""
    folder = setting.folder(arm.name)
    if (folder / "result.json").is_file():
        kept = _result(setting, arm.name).get("settings", setting.figures)
        if kept != setting.figures:
            raise ValueError(f"out: expected runs of {setting.figures} in {folder}, got runs of {kept}")
        return
    torch.set_num_threads(1)
    seconds, logs = 0.0, {}
    if arm.objectives:
        from softgen.fit import main as fit

        config = config_of(setting, arm)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        begin = time.perf_counter()
        fit([f"--config={folder / 'config.yaml'}"])
        seconds, logs = time.perf_counter() - begin, _logs(folder)
    content = _score(setting, open_student(setting, arm))
    write_json(
        folder / "result.json",
        {**content, "seconds": seconds, "logs": logs, "arm": asdict(arm), "settings": setting.figures},
    )


def _logs(folder: Path) -> dict[str, float]:
    """Means over the last quarter of the run of what was logged."""
    newest = max(folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-max(1, len(rows) // 4) :]
    names = [name for name in rows[0] if name.startswith("train/")]
    return {name: statistics.mean(float(row[name]) for row in last if row[name]) for name in names}


def _score(setting: Setting, generator: OneStepGenerator) -> dict[str, float | None]:
    """Quality on n draws that are the same for every arm of the seed, and how sharp the student is."""
    tokenizer = load_tokenizer(setting.pipeline / "2_teacher" / "model")
    protocol = _protocol(setting.data_root, setting.pipeline / "extractor")
    labels = balanced_labels(setting.n, num_classes=10)
    made = generate(one_step_tokens(generator), tokenizer, labels, seed=setting.seed)
    quality = protocol.score(made.images, labels)
    judge = SmallClassifier.load(setting.judge)
    return {
        **asdict(quality),
        "reward": class_log_probability(made.images, labels, classifier=judge),
        **_sharpness(generator, tokenizer),
    }


@cache
def _protocol(data_root: str, extractor: Path) -> Protocol:
    return named_protocol(DATA, data_root=data_root, folder=str(extractor), progress=False)


@torch.inference_mode()
def _sharpness(generator: OneStepGenerator, tokenizer: ImageTokenizer, *, count: int = 500) -> dict[str, float]:
    noise = SampleRandom(0, range(count), device=tokenizer.codebook.device)
    condition = generator.model.encode(balanced_labels(count, num_classes=10))
    logits = generator.logits(generator.init(noise), condition)
    measured = sharpness(logits, tokenizer.codebook)
    gap = decoding_gap(
        probabilities(logits),
        sample_categorical(logits, noise),
        decode_soft=lambda probs: tokenizer.decode_embeddings(tokenizer.embed_soft(probs)),
        decode_hard=tokenizer.decode,
    )
    return {
        "max_probability": measured.max_probability.item(),
        "entropy": measured.entropy.item(),
        "relaxation_gap": gap.item(),
    }


def _result(setting: Setting, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((setting.folder(name) / "result.json").read_text())
    return content


def _step_cost(setting: Setting, *, rounds: int = 12) -> dict[str, float]:
    """Process time of a training step with and without the GAN, interleaved, medians; kept beside the runs."""
    kept = setting.arms / "step_cost.json"
    if not kept.is_file():
        write_json(kept, _measure_step_cost(setting, rounds=rounds))
    content: dict[str, float] = json.loads(kept.read_text())
    return content


def _measure_step_cost(setting: Setting, *, rounds: int) -> dict[str, float]:
    from softgen.fit import StageCLI
    from softgen.fit import main as fit

    class Built(StageCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    steps = {}
    for name, objectives in (("dimo", {"dimo": {}}), ("gan", gan())):
        config = config_of(setting, Arm(f"cost_{name}", objectives))
        path = setting.folder(f"cost_{name}") / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        built = fit([f"--config={path}"], cli_class=Built)
        built.trainer.strategy.connect(built.model)
        built.datamodule.setup("fit")
        steps[name] = _stepper(built.model, next(iter(built.datamodule.train_dataloader())))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            if round_:
                seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"dimo_ms": 1e3 * medians["dimo"], "gan_ms": 1e3 * medians["gan"], "ratio": medians["gan"] / medians["dimo"]}


def _stepper(module: Any, batch: Any) -> Any:
    module.report = lambda batch, losses, logs: torch.stack(list(losses.values())).sum()
    parameters = [parameter for group in module.parameter_groups() for parameter in group.parameters]
    optimizer = torch.optim.Adam([parameter for parameter in parameters if parameter.requires_grad], fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()

    return step


def _run_tteo(setting: Setting, arm: Arm, count: int) -> None:
    """TTEO on an arm's student."""
    target = setting.folder(f"tteo_{arm.name}") / "result.json"
    if target.is_file():
        return
    torch.set_num_threads(1)
    content = measure_tteo(
        open_student(setting, arm),
        load_tokenizer(setting.pipeline / "2_teacher" / "model"),
        ClassifierReward(str(setting.judge)),
        SmallClassifier.load(setting.pipeline / "extractor"),
        count=count,
        seed=setting.seed,
    )
    write_json(target, content)


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/soft_dimo.py", args=None)
