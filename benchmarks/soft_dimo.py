"""Soft-Di[M]O at CPU scale: what GAN, reward and TTEO add to a one-step student, beside the controls they must beat.

    python benchmarks/soft_dimo.py --data_root /usr/share/datasets/fashion-mnist

Every arm goes on from the same Di[M]O checkpoint of its seed (benchmarks/dimo.py trains it if it is not there), sees
the same batches and the same noise at the same step (common random numbers), and is scored on the same draws. Writes
benchmarks/results/soft_dimo.json, .md and .png. An arm whose folder holds a result is not run again.
"""

import csv
import json
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from dimo import RESULTS, run_pipeline
from soft_dimo_report import markdown, picture
from torch import Tensor

from rewards import ClassifierReward
from softgen import load_generator, load_tokenizer
from softgen.classifier import classifier, named_data
from softgen.cli import run_command
from softgen.data import write_token_cache
from softgen.evaluate import named_protocol, write_json
from softgen.generation import balanced_labels, generate, one_step_tokens
from softgen.metrics.classifier import SmallClassifier
from softgen.models.generator import OneStepGenerator
from softgen.random import SampleRandom
from softgen.recipes import find_recipe
from softgen.relaxation import decoding_gap, probabilities, sharpness
from softgen.tokenizers.base import ImageTokenizer
from tteo import TTEOSettings, optimize

DATA = "fashion_mnist"


@dataclass(frozen=True)
class Arm:
    """One way to go on from the Di[M]O student.

    Attributes:
        name: In the table, and of its folder.
        objectives: The terms: `dimo`, `gan`, `reward`, `sharpen` -> options that differ from the recipe's.
        cost: Steps in all, as a multiple of those of the other arms.
        sharpen: Divides the student's logits before the start.
        early: Whether it goes on from a student that Di[M]O has just begun, still blunt, instead of the finished one.
    """

    name: str
    objectives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: float = 1.0
    sharpen: float = 1.0
    early: bool = False

    @property
    def start(self) -> "Arm":
        """The checkpoint that the arm goes on from, as an arm of no steps."""
        return EARLY if self.early else START


START = Arm("start")
EARLY = Arm("early_start", early=True)


def _gan(**options: Any) -> dict[str, Any]:
    return {"dimo": {}, "gan": options}


def _relaxed(**relaxation: Any) -> dict[str, Any]:
    return _gan(relaxation=relaxation)


def arms(*, equal_compute: float, steps: int) -> list[Arm]:
    """All arms.

    Args:
        equal_compute: Steps of Di[M]O alone that take the time of one step with the GAN.
        steps: Steps of an arm in all, which the annealed temperature falls over.
    """
    annealed = {"kind": "annealed", "temperature": 1.0, "final_temperature": 0.3, "anneal_steps": steps}
    central = [
        Arm("control", {"dimo": {}}),
        Arm("gan_soft", _gan()),
        Arm("entropy_only", {"dimo": {}, "sharpen": {}}),
        Arm("gan_st", _relaxed(kind="st")),
    ]
    return [
        START,
        *central,
        Arm("control_equal_compute", {"dimo": {}}, cost=equal_compute),
        Arm("gan_gumbel_st", _relaxed(kind="gumbel_st")),
        Arm("gan_alone", {"gan": {"weight": 1.0}}),
        Arm("reward", {"dimo": {}, "reward": {}}),
        Arm("reward_alone", {"reward": {"weight": 1.0}}),
        Arm("gan_soft_topk", _relaxed(kind="soft_topk", top_k=8)),
        Arm("gan_annealed", _relaxed(**annealed)),
        Arm("gan_mask_0_0.95", _gan(mask_ratio=[0.0, 0.95])),
        Arm("gan_mask_0", _gan(mask_ratio=[0.0, 0.0])),
        EARLY,
        *(replace(arm, name=f"early_{arm.name}", early=True) for arm in central),
        Arm("gan_ratio_0.3", _gan(weight_ratio=0.3)),
        Arm("gan_spatial", _gan(head="spatial")),
        Arm("gan_per_token", _gan(head="per_token")),
        Arm("sharpened_control", {"dimo": {}}, sharpen=0.4),
        Arm("sharpened_gan_soft", _gan(), sharpen=0.4),
    ]


@dataclass(frozen=True)
class Setting:
    """Where one seed's models are, and how long every arm runs."""

    seed: int
    root: Path
    data_root: str
    steps: int
    critic_steps: int
    early_steps: int
    n: int

    @property
    def pipeline(self) -> Path:
        """The folder that benchmarks/dimo.py leaves."""
        return self.root / f"seed_{self.seed}"

    @property
    def tokens(self) -> Path:
        """The training images as tokens."""
        return self.pipeline / "tokens"

    @property
    def judge(self) -> Path:
        """The reward's classifier."""
        return self.root / "judge"

    def checkpoint(self, *, early: bool) -> Path:
        """The Di[M]O run that arms go on from."""
        return self.folder("early_dimo") if early else self.pipeline / "3_dimo"

    def folder(self, arm: str) -> Path:
        """The run folder of an arm."""
        return self.root / "soft_dimo" / f"seed_{self.seed}" / arm


def benchmark(
    *,
    data_root: str = "data/fashion_mnist",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    only: list[str] | None = None,
    out: str = "runs/benchmarks",
    processes: int = 2,
    steps: int = 200,
    critic_steps: int = 100,
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
        steps: Steps of the student in every arm.
        critic_steps: Steps before them in which only critics learn, in every arm.
        early_steps: Steps of Di[M]O that make the blunt student.
        n: Images that each figure is measured on.
        tteo_n: Images that TTEO optimises.
        note: What else a reader must know of these runs; goes into the table.
    """
    root = Path(out) / DATA
    settings = [Setting(seed, root, data_root, steps, critic_steps, early_steps, n) for seed in seeds]
    for setting in settings:
        _prepare(setting)
    cost = _step_cost(settings[0])
    known = arms(equal_compute=cost["ratio"], steps=critic_steps + steps)
    chosen = [arm for arm in known if only is None or arm.name in only or arm in (START, EARLY)]
    jobs = [(setting, arm) for arm in chosen for setting in settings]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_train_early, setting) for setting in settings]:
            future.result()
        started = [pool.submit(_run_arm, setting, arm) for setting, arm in jobs]
        started += [
            pool.submit(_run_tteo, setting, arm, tteo_n) for setting in settings for arm in ("start", "gan_soft")
        ]
        try:
            for future in as_completed(started):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    names = [arm.name for arm in chosen]
    content = {
        "command": f"python benchmarks/soft_dimo.py --data_root FOLDER --steps {steps} --critic_steps {critic_steps}",
        "protocol": named_protocol(DATA, data_root=data_root, folder=str(settings[0].pipeline / "extractor")).name(n),
        "note": note,
        "seeds": seeds,
        "steps": steps,
        "critic_steps": critic_steps,
        "early_steps": early_steps,
        "step_cost": cost,
        "teacher": [json.loads((setting.pipeline / "metrics.json").read_text())["rows"] for setting in settings],
        "arms": {name: [_result(setting, name) for setting in settings] for name in names},
        "tteo": {name: [_result(setting, f"tteo_{name}") for setting in settings] for name in ("start", "gan_soft")},
    }
    write_json(RESULTS / "soft_dimo.json", content)
    (RESULTS / "soft_dimo.md").write_text(markdown(content))
    picture(RESULTS / "soft_dimo.png", [_model(settings[0], arm) for arm in chosen], seed=seeds[0])
    print((RESULTS / "soft_dimo.md").read_text())


def _prepare(setting: Setting) -> None:
    """Train what is missing: the pipeline up to Di[M]O, the judge; encode the images once."""
    torch.set_num_threads(1)
    run_pipeline(DATA, setting.data_root, setting.pipeline, seed=setting.seed)
    if not (setting.judge / "config.json").is_file():
        classifier(data_name=DATA, data_root=setting.data_root, out=str(setting.judge), progress=False)
    if not setting.tokens.is_dir():
        tokenizer = load_tokenizer(setting.pipeline / "3_dimo" / "model")
        write_token_cache(setting.tokens, tokenizer, named_data(DATA, data_root=setting.data_root), progress=False)


def _train_early(setting: Setting) -> None:
    """Di[M]O from the teacher, stopped early: a blunt student."""
    from softgen.fit import main as fit

    folder = setting.checkpoint(early=True)
    if (folder / "model" / "config.json").is_file():
        return
    config = find_recipe(DATA).write_config("3_dimo", setting.pipeline)
    options = [f"--run_dir={folder}", f"--seed={setting.seed}", f"--trainer.max_steps={setting.early_steps}"]
    fit([f"--config={config}", *options, "--trainer.limit_val_batches=0", "--ema.decay=0.99"])


def _model(setting: Setting, arm: Arm) -> Path:
    """The folder of an arm's student."""
    run = setting.checkpoint(early=arm.early) if arm in (START, EARLY) else setting.folder(arm.name)
    return run / "model"


def _config(setting: Setting, arm: Arm) -> dict[str, Any]:
    """The recipe of the GAN stage, with the arm's terms."""
    recipe = find_recipe(DATA)
    folder = setting.folder(arm.name)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = yaml.safe_load(recipe.write_config("4_gan", setting.pipeline).read_text())
    dimo, gan = (objective["init_args"] for objective in config["model"]["init_args"]["objectives"])
    checkpoint = setting.checkpoint(early=arm.early)
    config["model"]["init_args"]["student"] = str(checkpoint / "model")
    dimo["auxiliary"] = str(checkpoint / "auxiliary")
    judge = {"class_path": "rewards.ClassifierReward", "init_args": {"classifier": str(setting.judge)}}
    defaults: dict[str, tuple[str, dict[str, Any]]] = {
        "dimo": ("distill.DiMO", {**dimo, "critic_only_steps": setting.critic_steps}),
        "gan": ("distill.GAN", {**gan, "critic_only_steps": setting.critic_steps}),
        "sharpen": ("distill.Sharpen", {"weight": "auto", "weight_ratio": 0.5}),
        "reward": ("distill.Reward", {"rewards": [judge], "weight": "auto", "weight_ratio": 0.5}),
    }
    config["model"]["init_args"]["objectives"] = [
        {"class_path": defaults[name][0], "init_args": {**defaults[name][1], **options}}
        for name, options in arm.objectives.items()
    ]
    config["model"]["init_args"]["sharpen"] = arm.sharpen
    config["data"] = {
        "class_path": "softgen.data.TokenCache",
        "init_args": {"batch_size": 64, "root": str(setting.tokens)},
    }
    critic_steps = setting.critic_steps if arm.objectives.keys() & {"dimo", "gan"} else 0
    total = round(arm.cost * (critic_steps + setting.steps))
    config["run_dir"] = str(folder)
    config["seed"] = setting.seed
    config["trainer"] |= {"max_steps": total, "limit_val_batches": 0}
    config["accuracy_watch"]["classifier"] = str(setting.pipeline / "extractor")
    return config


def _run_arm(setting: Setting, arm: Arm) -> None:
    """Train and score an arm; a start is scored alone."""
    folder = setting.folder(arm.name)
    if (folder / "result.json").is_file():
        return
    torch.set_num_threads(1)
    seconds, logs = 0.0, {}
    if arm not in (START, EARLY):
        from softgen.fit import main as fit

        config = _config(setting, arm)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        begin = time.perf_counter()
        fit([f"--config={folder / 'config.yaml'}"])
        seconds, logs = time.perf_counter() - begin, _logs(folder)
    content = _score(setting, _model(setting, arm))
    write_json(folder / "result.json", {**content, "seconds": seconds, "logs": logs, "arm": asdict(arm)})


def _logs(folder: Path) -> dict[str, float]:
    """Means over the last quarter of the run of what was logged."""
    newest = max(folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-max(1, len(rows) // 4) :]
    names = [name for name in rows[0] if name.startswith("train/")]
    return {name: statistics.mean(float(row[name]) for row in last if row[name]) for name in names}


def _score(setting: Setting, folder: Path) -> dict[str, float | None]:
    """Quality on n draws that are the same for every arm of the seed, and how sharp the student is."""
    generator, tokenizer = load_generator(folder), load_tokenizer(setting.pipeline / "3_dimo" / "model")
    path = str(setting.pipeline / "extractor")
    protocol = named_protocol(DATA, data_root=setting.data_root, folder=path, progress=False)
    labels = balanced_labels(setting.n, num_classes=10)
    made = generate(one_step_tokens(generator), tokenizer, labels, seed=setting.seed)
    quality = protocol.score(made.images, labels)
    judge = SmallClassifier.load(setting.judge)
    return {
        **asdict(quality),
        "reward": _log_probability(judge, made.images, labels).mean().item(),
        **_sharpness(generator, tokenizer),
    }


@torch.inference_mode()
def _log_probability(judge: SmallClassifier, images: Tensor, labels: Tensor) -> Tensor:
    parts = [judge.logits(part).log_softmax(dim=1) for part in torch.split(images, 512)]
    return torch.cat(parts).gather(1, labels[:, None])[:, 0]


@torch.inference_mode()
def _sharpness(generator: OneStepGenerator, tokenizer: ImageTokenizer, *, count: int = 500) -> dict[str, float]:
    noise = SampleRandom(0, range(count), device=tokenizer.codebook.device)
    condition = generator.model.encode(balanced_labels(count, num_classes=10))
    logits = generator.logits(generator.init(noise), condition)
    measured = sharpness(logits, tokenizer.codebook)
    gap = decoding_gap(
        probabilities(logits),
        torch.distributions.Categorical(logits=logits.float()).sample(),
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
    kept = setting.root / "soft_dimo" / "step_cost.json"
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
    for name, objectives in (("dimo", {"dimo": {}}), ("gan", _gan())):
        config = _config(setting, Arm(f"cost_{name}", objectives))
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


def _run_tteo(setting: Setting, arm: str, count: int) -> None:
    """TTEO of an arm's student, by SGD as in the paper and by Adam, judged by the protocol's classifier."""
    target = setting.folder(f"tteo_{arm}") / "result.json"
    if target.is_file():
        return
    torch.set_num_threads(1)
    model = setting.pipeline / "3_dimo" / "model" if arm == "start" else setting.folder(arm) / "model"
    generator, tokenizer = load_generator(model), load_tokenizer(setting.pipeline / "3_dimo" / "model")
    reward = ClassifierReward(str(setting.judge))
    held_out = SmallClassifier.load(setting.pipeline / "extractor")
    labels = balanced_labels(count, num_classes=10)
    rows = {}
    for name, settings in (
        ("sgd", TTEOSettings(steps=30, lr=0.2, batch_size=100)),
        ("adam", TTEOSettings(steps=30, lr=0.02, optimizer="adam", batch_size=100)),
    ):
        begin = time.process_time()
        result = optimize(generator, tokenizer, reward, labels, settings=settings, seed=setting.seed)
        seconds = time.process_time() - begin
        rows[name] = {
            "n": count,
            "steps": settings.steps,
            "before": result.before.mean().item(),
            "after": result.after.mean().item(),
            "last": result.hard_scores[-1].mean().item(),
            "raised": (result.after > result.before).float().mean().item(),
            "raised_at_last_step": (result.hard_scores[-1] > result.before).float().mean().item(),
            "accuracy_before": _accuracy(held_out, result.start_images, labels),
            "accuracy_after": _accuracy(held_out, result.images, labels),
            "seconds": seconds,
        }
    write_json(target, {**rows, "step_over_forward": _tteo_cost(generator, tokenizer, reward)})


@torch.inference_mode()
def _accuracy(held_out: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    return (held_out.logits(images).argmax(dim=1) == labels).float().mean().item()


def _tteo_cost(generator: OneStepGenerator, tokenizer: ImageTokenizer, reward: ClassifierReward) -> float:
    """Process time of a step over that of generator + decoder + reward forward, interleaved, medians of 9."""
    labels = balanced_labels(100, num_classes=10)
    noise = SampleRandom(0, range(100), device=tokenizer.codebook.device)
    e_in = generator.init(noise)
    condition = generator.model.encode(labels)

    @torch.inference_mode()
    def forward() -> None:
        soft = tokenizer.embed_soft(probabilities(generator.logits(e_in, condition)))
        reward(tokenizer.decode_embeddings(soft), labels)

    def run(steps: int) -> float:
        begin = time.process_time()
        optimize(generator, tokenizer, reward, labels, settings=TTEOSettings(steps=steps))
        return time.process_time() - begin

    ratios = []
    for _ in range(9):
        begin = time.process_time()
        forward()
        one = time.process_time() - begin
        ratios.append((run(6) - run(1)) / 5 / one)
    return statistics.median(ratios)


if __name__ == "__main__":
    run_command(benchmark, program="benchmarks/soft_dimo.py", args=None)
