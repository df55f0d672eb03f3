"""The memory of the text-to-image recipes at full size, by arithmetic: nothing is downloaded, no weight is allocated.

    python benchmarks/memory_plan.py

Builds what configs/text_to_image/{meissonic,maskgen}/{1_dimo,2_reward}.yaml ask for in the published sizes, on tensors
that have a shape alone, and runs one step (softgen.activation_memory). Every recipe is also planned without its saving
options. Writes benchmarks/results/memory_plan.json and .md.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn

from distill import DiMO, Reward, SoftDiMO
from rewards import CLIPReward, Compute, ImageRewardReward
from rewards import Reward as RewardModel
from rewards.heads import LinearStack
from rewards.preprocessing import OPENAI_MEAN, OPENAI_STD, Preprocessing
from softgen.activation_memory import StepMemory, shapes_alone, step_memory
from softgen.callbacks import PartMemory, memory_plan
from softgen.models import MaskedDiffusionModel, MaskGen, Meissonic
from softgen.models.conditions import TextCondition
from softgen.models.text import PromptProblems, TextEncoder
from softgen.tokenizers import DiffusersVQ, ImageTokenizer, TATiTok

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory_plan"
RECIPES = ROOT / "configs" / "text_to_image"
GIB = 2**30
GIGABYTE = 10**9
# In GB: of an accelerator's GiB, what lies between is left for the driver, workspaces of kernels, and fragments.
BOUNDS = {"meissonic": 80, "maskgen": 24}
KINDS = ("weights", "gradients", "optimizer", "average")
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


class Text(TextEncoder):
    """Of a published size; its states are zeros. As in a published encoder, copies share the tower."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.length, self.width, self.pooled_width = 77, sizes["hidden_size"], sizes["hidden_size"]
        config = transformers.CLIPTextConfig(**sizes, projection_dim=sizes["hidden_size"])
        self._shelf = [transformers.CLIPTextModelWithProjection(config)]

    def tower(self) -> nn.Module:
        """Of random weights."""
        return self._shelf[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Text":
        self._shelf[0]._apply(fn)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Text":
        copied = copy.copy(self)
        memo[id(self)] = copied
        return copied

    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """Zeros."""
        count = len(prompts)
        states, pooled = torch.zeros(count, self.length, self.width), torch.zeros(count, self.width)
        return TextCondition.of(states, torch.ones(count, self.length, dtype=torch.bool), pooled)

    def problems(self, prompts: Sequence[str]) -> PromptProblems:
        """None."""
        return PromptProblems()


class Elsewhere(RewardModel):
    """In place of a reward whose weights and activations are in the memory of another device."""

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The mean of the pixels."""
        return images.mean(dim=(1, 2, 3))


class PlannedImageReward(ImageRewardReward):
    """ImageReward in its published sizes, without checkpoint and words."""

    def _open(self, *_: Any, **__: Any) -> None:
        vision = transformers.BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
            patch_size=16,
        )
        self.vision = transformers.BlipVisionModel(vision)
        text = transformers.BlipTextConfig(
            vocab_size=30524,
            hidden_size=768,
            encoder_hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
        self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(text, add_pooling_layer=False)
        self.mlp = LinearStack(768)
        self.preprocessing = Preprocessing(size=(224, 224), mean=OPENAI_MEAN, std=OPENAI_STD)
        self.settle()

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), the prompts aside."""
        ids = torch.ones(len(images), 35, dtype=torch.long)
        return self.score(self.preprocessing(images), ids, ids)


class PlannedReward(Reward):
    """Rewards are not probed first: there are no values to look at."""

    def setup(self, teacher: MaskedDiffusionModel, tokenizer: ImageTokenizer | None) -> None:
        """Nothing."""


def family(name: str) -> tuple[MaskedDiffusionModel, ImageTokenizer]:
    """Teacher and tokenizer in the published sizes."""
    if name == "meissonic":
        return Meissonic(text_encoder=Text(CLIP_H), negative_prompt="one"), DiffusersVQ()
    return MaskGen(text_encoder=Text(CLIP_L)), TATiTok(text_encoder=Text(CLIP_L))


def reward(asked: Mapping[str, Any]) -> RewardModel:
    """A reward of a recipe, with its compute options."""
    arguments = asked["init_args"]
    compute = Compute(**arguments.get("compute", {}))
    name = asked["class_path"].removeprefix("rewards.")
    if compute.device is not None:
        return Elsewhere(name=name)
    if name == "ImageRewardReward":
        return PlannedImageReward(compute=compute)
    architecture = {"HPSv2Reward": "ViT-H-14", "CLIPReward": arguments.get("model_name")}[name]
    label = {"HPSv2Reward": "hpsv2", "CLIPReward": "clip"}[name]
    return CLIPReward(architecture, pretrained="random", compute=compute, name=label)


def objective(asked: Mapping[str, Any]) -> nn.Module:
    """An objective of a recipe; the step that also looks at the held-out rewards."""
    arguments = dict(asked["init_args"])
    if asked["class_path"] == "distill.DiMO":
        arguments.pop("auxiliary", None)
        return DiMO(**arguments)
    for key in ("rewards", "held_out"):
        arguments[key] = [reward(part) for part in arguments[key]]
    return PlannedReward(**{**arguments, "held_out_every": 1})


def plan(name: str, recipe: Mapping[str, Any]) -> tuple[list[PartMemory], StepMemory]:
    """Of a recipe at full size."""
    asked, batch_size = recipe["model"]["init_args"], recipe["data"]["init_args"]["batch_size"]
    options = {key: asked[key] for key in ("frozen_dtype", "checkpoint_activations") if key in asked}
    with shapes_alone():
        teacher, tokenizer = family(name)
        stage = SoftDiMO(
            teacher=teacher,
            tokenizer=tokenizer,
            objectives=[objective(part) for part in asked["objectives"]],
            **options,
        )
        batch = {"ordinal": list(range(batch_size)), "prompt": ["a photo"] * batch_size}
        step = step_memory(lambda: stage.training_step(batch, 0), stage.parameters(), autocast=torch.bfloat16)
        parts = memory_plan(stage, averaged="device" not in recipe["ema"])
    return parts, step


def unsaved(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without its options that save memory; the batch stays."""
    plain = copy.deepcopy(dict(recipe))
    arguments = plain["model"]["init_args"]
    for key in ("frozen_dtype", "checkpoint_activations"):
        arguments.pop(key, None)
    for part in arguments["objectives"]:
        for key in ("micro_batch", "checkpoint_decoder"):
            part["init_args"].pop(key, None)
        for watched in (*part["init_args"].get("rewards", ()), *part["init_args"].get("held_out", ())):
            watched["init_args"].pop("compute", None)
    plain["ema"].pop("device", None)
    return plain


def settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe its memory depends on."""
    asked = recipe["model"]["init_args"]
    kept = ("rewards", "held_out", "micro_batch", "checkpoint_decoder")
    return {
        "batch_size": recipe["data"]["init_args"]["batch_size"],
        "accumulate_grad_batches": recipe["trainer"]["accumulate_grad_batches"],
        "precision": recipe["trainer"]["precision"],
        "average": recipe["ema"].get("device", "beside the weights"),
        **{key: asked[key] for key in ("frozen_dtype", "checkpoint_activations") if key in asked},
        "objectives": [
            [part["class_path"], {key: part["init_args"][key] for key in kept if key in part["init_args"]}]
            for part in asked["objectives"]
        ],
    }


def row(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """One plan in numbers, GiB."""
    parts, step = plan(name, recipe)
    total = sum(part.total for part in parts) + step.peak
    return {
        "settings": settings(recipe),
        "parts": {
            part.name: {
                "millions": part.parameters / 1e6,
                **{key: getattr(part, key) / GIB for key in ("weights", "gradients", "optimizer", "average")},
            }
            for part in parts
        },
        "step": {"kept": step.kept / GIB, "forward": step.forward / GIB, "peak": step.peak / GIB},
        "total": total / GIB,
        "gigabytes": total / GIGABYTE,
        "bound": BOUNDS[name],
        "fits": total <= BOUNDS[name] * GIGABYTE,
    }


def planned(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The recipes of a family as they are shipped, and Di[M]O's without its options."""
    for stage in ("1_dimo", "2_reward"):
        recipe = yaml.safe_load((RECIPES / name / f"{stage}.yaml").read_text())
        yield f"{name}/{stage}", row(name, recipe)
        if stage == "1_dimo":
            yield f"{name}/{stage}, without options", row(name, unsaved(recipe))


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Memory of the text-to-image recipes",
        "",
        "By `python benchmarks/memory_plan.py`: arithmetic on shapes in the published sizes, GiB (2^30 bytes). Weights",
        "of all parts, text towers and rewards included; gradients and Adam's moments in float32; the student's",
        "average where it is in the same memory; the most that one step needs beside them. Attention is fused, casts",
        "are those of the CPU's autocast. Workspaces of kernels, the driver and fragmentation are not seen: they have",
        "what is between the GB (10^9 bytes) that a recipe must stay below and the GiB of an accelerator of that name.",
        "`tests/test_activation_memory.py` holds the arithmetic of a step against what the CPU's allocator counts in",
        "small models.",
        "",
        "| recipe | batch | weights | gradients | Adam | average | step | in all | in GB | of | fits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row_ in found.items():
        sums = [sum(part[key] for part in row_["parts"].values()) for key in KINDS]
        sizes = (*sums, row_["step"]["peak"], row_["total"], row_["gigabytes"])
        cells = " | ".join(f"{value:.2f}" for value in sizes)
        batch = f"{row_['settings']['batch_size']} x {row_['settings']['accumulate_grad_batches']}"
        lines.append(f"| {name} | {batch} | {cells} | {row_['bound']} | {'yes' if row_['fits'] else 'no'} |")
    for name, row_ in found.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| part | millions | weights | gradients | Adam | average |",
            "|---|---|---|---|---|---|",
        ]
        for part, numbers in row_["parts"].items():
            cells = " | ".join(f"{numbers[key]:.2f}" for key in KINDS)
            lines.append(f"| {part} | {numbers['millions']:.1f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plan them, and write the results."""
    found = {}
    for name in BOUNDS:
        for label, numbers in planned(name):
            print(f"{label}: {numbers['total']:.2f} GiB, the step {numbers['step']['peak']:.2f}", flush=True)
            found[label] = numbers
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
