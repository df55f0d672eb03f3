"""What benchmarks/soft_dimo.py compares: the arms, and the config of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from softgen import load_generator
from softgen.models.generator import OneStepGenerator
from softgen.recipes import find_recipe

DATA: Literal["fashion_mnist"] = "fashion_mnist"


@dataclass(frozen=True)
class Arm:
    """One way to go on from the Di[M]O student.

    Attributes:
        name: In the table, and of its folder.
        objectives: The terms: `dimo`, `gan`, `reward`, `sharpen` -> options that differ from the recipe's; with none
            the checkpoint is scored as it is.
        cost: Steps in all, as a multiple of those of the other arms.
        sharpen: Divides the student's logits before the start.
        rates: Multiplies the learning rates of student and auxiliary model.
        early: Whether it goes on from a student that Di[M]O has just begun, still blunt, instead of the finished one.
    """

    name: str
    objectives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: float = 1.0
    sharpen: float = 1.0
    rates: float = 1.0
    early: bool = False

    @property
    def start(self) -> "Arm":
        """The checkpoint that the arm goes on from, as an arm of no steps."""
        return EARLY if self.early else START


START = Arm("start")
EARLY = Arm("early_start", early=True)


def gan(**options: Any) -> dict[str, Any]:
    """Di[M]O + GAN, with options of the GAN that differ from the recipe's."""
    return {"dimo": {}, "gan": options}


def _relaxed(**relaxation: Any) -> dict[str, Any]:
    return gan(relaxation=relaxation)


def arms(*, equal_compute: float, steps: int, guidance: float) -> list[Arm]:
    """All arms.

    Args:
        equal_compute: Steps of Di[M]O alone that take the time of one step with the GAN.
        steps: Steps of an arm in all, which the annealed temperature falls over.
        guidance: What the students were distilled under; where it is not the recipe's, an arm of Di[M]O returns to it.
    """
    annealed = {"kind": "annealed", "temperature": 1.0, "final_temperature": 0.3, "anneal_steps": steps}
    central = [
        Arm("control", {"dimo": {}}),
        Arm("gan_soft", gan()),
        Arm("entropy_only", {"dimo": {}, "sharpen": {}}),
    ]
    others = [
        Arm("control_equal_compute", {"dimo": {}}, cost=equal_compute),
        Arm("gan_st", _relaxed(kind="st")),
        Arm("gan_alone", {"gan": {"weight": 1.0}}),
    ]
    less_guided = Arm("control_less_guided", {"dimo": {"guidance": recipe_guidance()}})
    return [
        START,
        *central,
        *others,
        *([less_guided] if guidance != recipe_guidance() else []),
        Arm("gan_gumbel_st", _relaxed(kind="gumbel_st")),
        Arm("reward", {"dimo": {}, "reward": {}}),
        Arm("reward_alone", {"reward": {"weight": 1.0}}),
        Arm("gan_soft_topk", _relaxed(kind="soft_topk", top_k=8)),
        Arm("gan_annealed", _relaxed(**annealed)),
        Arm("gan_mask_0_0.95", gan(mask_ratio=[0.0, 0.95])),
        Arm("gan_mask_0", gan(mask_ratio=[0.0, 0.0])),
        Arm("sharpened_start", sharpen=0.4),
        Arm("hot_control", {"dimo": {}}, rates=4),
        Arm("hot_gan_soft", gan(), rates=4),
        Arm("hot_gan_alone", {"gan": {"weight": 1.0}}, rates=4),
        EARLY,
        *(replace(arm, name=f"early_{arm.name}", early=True) for arm in (*central, *others)),
        Arm("gan_ratio_0.3", gan(weight_ratio=0.3)),
        Arm("gan_spatial", gan(head="spatial")),
        Arm("gan_per_token", gan(head="per_token")),
        Arm("sharpened_control", {"dimo": {}}, sharpen=0.4),
        Arm("sharpened_gan_soft", gan(), sharpen=0.4),
    ]


@dataclass(frozen=True)
class Setting:
    """Where one seed's models are, and how long every arm runs.

    Under another guidance than the recipe's, students are distilled anew from the same teachers, for `start_steps`.
    """

    seed: int
    root: Path
    data_root: str
    guidance: float
    start_steps: int
    steps: int
    critic_steps: int
    early_steps: int
    n: int

    @property
    def pipeline(self) -> Path:
        """The folder that benchmarks/dimo.py leaves."""
        return self.root / f"seed_{self.seed}"

    @property
    def name(self) -> str:
        """Of the folder of arms, and of the results."""
        return "soft_dimo" if self.guidance == recipe_guidance() else f"soft_dimo_guidance_{self.guidance:g}"

    @property
    def figures(self) -> dict[str, int]:
        """What a result depends on, besides its arm and seed."""
        return {
            **({} if self.guidance == recipe_guidance() else {"start_steps": self.start_steps}),
            "steps": self.steps,
            "critic_steps": self.critic_steps,
            "early_steps": self.early_steps,
            "n": self.n,
        }

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
        if early:
            return self.folder("early_dimo")
        return self.pipeline / "3_dimo" if self.guidance == recipe_guidance() else self.folder("dimo")

    def folder(self, arm: str) -> Path:
        """The run folder of an arm."""
        return self.arms / f"seed_{self.seed}" / arm

    @property
    def arms(self) -> Path:
        """The run folders of all seeds."""
        return self.root / self.name


@cache
def recipe_guidance() -> float:
    """The teacher's guidance in the recipe of Di[M]O."""
    config = yaml.safe_load(find_recipe(DATA).config("3_dimo").read_text())
    (dimo,) = config["model"]["init_args"]["objectives"]
    return float(dimo["init_args"]["guidance"])


def config_of_start(setting: Setting, *, early: bool) -> dict[str, Any]:
    """The recipe of Di[M]O under the setting's guidance, or stopped early for a blunt student."""
    config: dict[str, Any] = yaml.safe_load(find_recipe(DATA).write_config("3_dimo", setting.pipeline).read_text())
    (dimo,) = config["model"]["init_args"]["objectives"]
    dimo["init_args"]["guidance"] = setting.guidance
    config["run_dir"], config["seed"] = str(setting.checkpoint(early=early)), setting.seed
    steps = setting.early_steps if early else setting.start_steps
    config["trainer"] |= {"max_steps": steps, "limit_val_batches": 0}
    config["ema"] = {"decay": 0.99}
    return config


def open_student(setting: Setting, arm: Arm) -> OneStepGenerator:
    """An arm's student; that of an arm without terms is the checkpoint's, sharpened if the arm says so."""
    if arm.objectives:
        return load_generator(setting.folder(arm.name) / "model")
    student = load_generator(setting.checkpoint(early=arm.early) / "model")
    student.scale_logits(1 / arm.sharpen)
    return student


def config_of(setting: Setting, arm: Arm) -> dict[str, Any]:
    """The recipe of the GAN stage, with the arm's terms."""
    recipe = find_recipe(DATA)
    folder = setting.folder(arm.name)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = yaml.safe_load(recipe.write_config("4_gan", setting.pipeline).read_text())
    dimo, adversary = (objective["init_args"] for objective in config["model"]["init_args"]["objectives"])
    checkpoint = setting.checkpoint(early=arm.early)
    config["model"]["init_args"]["student"] = str(checkpoint / "model")
    dimo |= {"auxiliary": str(checkpoint / "auxiliary"), "guidance": setting.guidance}
    for optimizer in (config["model"]["init_args"]["optimizer"], dimo["auxiliary_optimizer"]):
        optimizer["lr"] *= arm.rates
    judge = {"class_path": "rewards.ClassifierReward", "init_args": {"classifier": str(setting.judge)}}
    defaults: dict[str, tuple[str, dict[str, Any]]] = {
        "dimo": ("distill.DiMO", {**dimo, "critic_only_steps": setting.critic_steps}),
        "gan": ("distill.GAN", {**adversary, "critic_only_steps": setting.critic_steps}),
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
