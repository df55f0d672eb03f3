"""Rewards by name: the built-in ones, those of installed packages, and any class by its path."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from rewards.errors import one_line

if TYPE_CHECKING:
    from rewards.base import Reward

GROUP = "softgen.rewards"
BUILT_IN = {
    "aesthetic": "rewards.aesthetic:AestheticReward",
    "classifier": "rewards.classifier:ClassifierReward",
    "clip": "rewards.clip:CLIPReward",
    "hpsv2": "rewards.hpsv2:HPSv2Reward",
    "hpsv3": "rewards.hpsv3:HPSv3Reward",
    "imagereward": "rewards.imagereward:ImageRewardReward",
    "pickscore": "rewards.pickscore:PickScoreReward",
}


@dataclass(frozen=True)
class Facts:
    """What one wants to know before trying a built-in reward.

    Attributes:
        range: Of its scores.
        checkpoint: Where the published weights are.
        memory: Of the weights in float32.
        licence: Of the published weights.
    """

    range: str = "-"
    checkpoint: str = "-"
    memory: str = "-"
    licence: str = "-"


FACTS = {
    "aesthetic": Facts("1 to 10", "sac+logos+ava1-l14-linearMSE.pth, CLIP ViT-L-14", "1.2 GB", "see its page"),
    "classifier": Facts("at most 0", "your own: python -m softgen.classifier"),
    "clip": Facts("-1 to 1, times its scale", "any of open_clip or transformers", "0.6 GB (ViT-B-32)", "the model's"),
    "hpsv2": Facts("0.15 to 0.35", "xswu/HPSv2: HPS_v2.1_compressed.pt", "3.9 GB", "Apache-2.0"),
    "hpsv3": Facts("-5 to 15", "MizzenAI/HPSv3, Qwen/Qwen2-VL-7B-Instruct", "29 GiB (bfloat16: 14.4)", "Apache-2.0"),
    "imagereward": Facts("-2.3 to 2", "THUDM/ImageReward", "1.8 GB", "Apache-2.0"),
    "pickscore": Facts("15 to 26", "yuvalkirstain/PickScore_v1", "3.9 GB", "see its card"),
}


def available() -> dict[str, str]:
    """Every reward that `build` knows by name, and where it comes from. Imports none of them.

    A package adds one by an entry point of the group `softgen.rewards`, whose object is a `Reward` class, or a function
    that returns a `Reward`. A name that is taken, by a built-in reward or by another package, is left out with a
    warning.
    """
    built_in = {name: f"built in, {value}" for name, value in BUILT_IN.items()}
    return built_in | {name: f"package {_package(entry)}, {entry.value}" for name, entry in _plugins().items()}


def build(name: str, /, **options: Any) -> "Reward":
    """Build a reward.

    Args:
        name: One of `available()`, or the dotted path of a class, such as "my_package.MyReward".
        options: Arguments of the reward, by keyword.

    Raises:
        ValueError: An unknown name, a plug-in that cannot be imported, arguments that do not fit, or something that is
            not a `Reward`.
        ImportError: A built-in reward needs an extra that is not installed; the message has the pip command.
    """
    from rewards.base import Reward

    factory, options = prepare(name, **options)
    reward = factory(**options)
    if not isinstance(reward, Reward):
        raise ValueError(f"reward {name}: expected a rewards.Reward, got a {type(reward).__name__}")
    return reward


def prepare(name: str, /, **options: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `build` calls and with which arguments, checked before any weights are read. Arguments and errors as there.

    The argument `compute` may be a mapping, as a YAML file or the command line has it.
    """
    factory = _factory(name)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ValueError(f"reward {name}: expected its own arguments, got an error ({one_line(error)})") from error
    if isinstance(options.get("compute"), dict):
        from rewards.compute import Compute

        try:
            options = {**options, "compute": Compute(**options["compute"])}
        except TypeError as error:
            raise ValueError(f"compute: expected the fields of Compute, got an error ({one_line(error)})") from error
    return factory, options


def _factory(name: str) -> Callable[..., Any]:
    plugins = _plugins()
    if name in BUILT_IN:
        entry = EntryPoint(name=name, value=BUILT_IN[name], group=GROUP)
    elif name in plugins:
        entry = plugins[name]
    elif "." in name or ":" in name:
        module, _, attribute = name.replace(":", ".").rpartition(".")
        entry = EntryPoint(name=name, value=f"{module}:{attribute}", group=GROUP)
    else:
        known = ", ".join(sorted({*BUILT_IN, *plugins}))
        raise ValueError(f"reward: expected one of {known}, or the dotted path of a class, got {name!r}")
    try:
        factory: Callable[..., Any] = entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward {name}: expected to import {entry.value}, got an error ({one_line(error)})"
        ) from error
    if not callable(factory):
        raise ValueError(f"reward {name}: expected a class or a function, got a {type(factory).__name__}")
    if name not in BUILT_IN and name not in plugins:
        # Any name can be given, by a file of another's making too: what is no reward is not even called.
        from rewards.base import Reward

        if not (isinstance(factory, type) and issubclass(factory, Reward)):
            raise ValueError(f"reward {name}: expected the path of a rewards.Reward class, got another object")
    return factory


def _plugins() -> dict[str, EntryPoint]:
    plugins: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in BUILT_IN or (entry.name in plugins and plugins[entry.name].value != entry.value):
            owner = "built in" if entry.name in BUILT_IN else f"of package {_package(plugins[entry.name])}"
            warnings.warn(
                f"reward {entry.name}: ignoring that of package {_package(entry)}, the name is taken by one {owner}",
                stacklevel=3,
            )
            continue
        plugins.setdefault(entry.name, entry)
    return plugins


def _package(entry: EntryPoint) -> str:
    return "unknown" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
