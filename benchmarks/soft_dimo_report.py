"""The table and the picture of benchmarks/soft_dimo.py."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from softgen.generation import balanced_labels, generate, one_step_tokens
from softgen.images import save_grid
from softgen.models.generator import OneStepGenerator
from softgen.tokenizers.base import ImageTokenizer

MEANING = {
    "start": "Di[M]O's student",
    "control": "Di[M]O alone, equal steps",
    "gan_soft": "Di[M]O + GAN on the soft embedding: the recipe",
    "control_equal_compute": "Di[M]O alone, equal compute",
    "control_less_guided": "Di[M]O alone, equal steps, under the recipe's guidance",
    "entropy_only": "Di[M]O + an entropy term, no discriminator",
    "gan_gumbel_st": "GAN, Gumbel-softmax straight-through",
    "gan_st": "GAN, sampled codes forward, gradient of the expectation",
    "gan_soft_topk": "GAN, softmax over the 8 likeliest codes",
    "gan_annealed": "GAN, temperature from 1 to 0.3",
    "gan_alone": "GAN without Di[M]O",
    "gan_mask_0_0.95": "GAN, mask ratio from [0, 0.95] (the paper's)",
    "gan_mask_0": "GAN, no masks",
    "gan_spatial": "GAN, heads that judge all tokens together",
    "gan_ratio_0.3": "GAN, its gradient held at 0.3 x Di[M]O's",
    "gan_per_token": "GAN, heads that judge each token",
    "sharpened_start": "Di[M]O's student, its logits / 0.4: no training",
    "hot_control": "Di[M]O alone, learning rates x 4",
    "hot_gan_soft": "Di[M]O + GAN, learning rates x 4",
    "hot_gan_alone": "GAN without Di[M]O, learning rates x 4",
    "sharpened_control": "logits / 0.4, then Di[M]O alone",
    "sharpened_gan_soft": "logits / 0.4, then Di[M]O + GAN",
    "reward": "Di[M]O + reward",
    "reward_alone": "reward without Di[M]O",
}

# (title, arm, control, kind, bound): the ratio of mean Frechet distances that is asked for.
CLAIMS = (
    ("Di[M]O + GAN against equal steps", "gan_soft", "control", "at most", 0.85),
    ("Di[M]O + GAN against equal compute", "gan_soft", "control_equal_compute", "at most", 0.95),
    ("Di[M]O + GAN against entropy alone", "gan_soft", "entropy_only", "at most", 0.95),
    ("Di[M]O + GAN against less guidance", "gan_soft", "control_less_guided", "at most", 0.95),
    ("GAN alone against Di[M]O + GAN", "gan_alone", "gan_soft", "at least", 1.5),
    ("the same at 4 x the learning rates", "hot_gan_alone", "hot_gan_soft", "at least", 1.5),
    ("soft against Gumbel straight-through", "gan_soft", "gan_gumbel_st", "at most", 1.0),
    ("soft against straight-through", "gan_soft", "gan_st", "at most", 1.0),
    ("the paper's mask range against the recipe's", "gan_mask_0_0.95", "gan_soft", "at most", 1.0),
    ("no masks against the recipe's mask range", "gan_mask_0", "gan_soft", "at least", 1.0),
    ("the sharpened start, GAN against control", "sharpened_gan_soft", "sharpened_control", "at most", 1.0),
)


def markdown(content: Mapping[str, Any], *, samples: str) -> str:
    """The page.

    Args:
        content: What was measured.
        samples: Name of the file of samples.
    """
    seeds, arms, cost = content["seeds"], content["arms"], content["step_cost"]
    count = arms["start"][0]["n"]
    finished = {name: runs for name, runs in arms.items() if not name.startswith("early_")}
    early = {name.removeprefix("early_"): runs for name, runs in arms.items() if name.startswith("early_")}
    lines = [
        f"# Soft-Di[M]O on Fashion-MNIST, guidance {content['guidance']:g}",
        "",
        f"`{content['command']}`. {content['protocol']}: Frechet distance on {count:,} images, lower is better; seeds "
        f"{', '.join(map(str, seeds))}. Every arm of a seed goes on from the same Di[M]O checkpoint for "
        f"{content['critic_steps']} steps in which only critics learn and {content['steps']} in which the student "
        "does too, with the same batches and the same noise at the same step, and is scored on the same draws "
        "(reward_alone has no critic to wait for: it starts at once). "
        f"A step with the GAN takes {cost['ratio']:.2f} x the process time of one without ({cost['gan_ms']:.0f} and "
        f"{cost['dimo_ms']:.0f} ms, interleaved, medians of 12): the equal-compute control has that many times the "
        "steps.",
        *([content["note"]] if content["note"] else []),
        "",
        f"## {_start(content)}",
        "",
        *_table(finished, seeds, teacher=content["teacher"]),
        "",
        *_claims(finished),
        "",
        *(_early(early, seeds, content["early_steps"]) if early else []),
        "Reward: mean log p(class) under a classifier that is not the one of the other columns. Max p: mean "
        "probability of the likeliest code. Gap: RMS difference of pixels between soft and sampled decoding. Seconds: "
        "wall time of the training on one thread, beside another.",
        "",
        *(["## TTEO", "", *_tteo(content["tteo"]), ""] if content["tteo"] else []),
        "## Samples",
        "",
        f"![samples]({samples})",
        "",
        f"A row of 20 samples an arm, seed {seeds[0]}, the same draws: {', '.join(arms)}.",
        "",
    ]
    return "\n".join(lines)


def _start(content: Mapping[str, Any]) -> str:
    if "start_steps" in content:
        return f"From a student that Di[M]O has trained for {content['start_steps']} steps under this guidance"
    return "From the finished student"


def _early(arms: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int], steps: int) -> list[str]:
    return [
        "## From a blunt student",
        "",
        f"The same, from a student that Di[M]O has trained for {steps} steps only.",
        "",
        *_table(arms, seeds),
        "",
        *_claims(arms),
        "",
    ]


def _table(
    arms: Mapping[str, Sequence[Mapping[str, Any]]],
    seeds: Sequence[int],
    *,
    teacher: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> list[str]:
    header = (
        "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | against control | accuracy | precision "
        "| recall | reward | max p | gap | seconds | what it is |"
    )
    lines = [header, "|---|" + "---|" * (len(seeds) + 10)]
    if teacher:
        names = [row["name"] for row in teacher[0] if row["name"].startswith("teacher_")]
        lines += [_teacher_line(teacher, int(name.removeprefix("teacher_"))) for name in names]
    return lines + [_arm_line(name, runs, arms.get("control")) for name, runs in arms.items()]


def _teacher_line(runs: Sequence[Sequence[Mapping[str, Any]]], steps: int) -> str:
    rows = [next(row for row in run if row["name"] == f"teacher_{steps}") for run in runs]
    values = " | ".join(f"{row['fd']:.2f}" for row in rows)
    means = " | ".join(f"{_mean(rows, key):.3f}" for key in ("accuracy", "precision", "recall"))
    return (
        f"| teacher, {steps} | {values} | **{_mean(rows, 'fd'):.2f}** | | {means} | | | | | the teacher in {steps} "
        "passes |"
    )


def _arm_line(name: str, runs: Sequence[Mapping[str, Any]], control: Sequence[Mapping[str, Any]] | None) -> str:
    values = " | ".join(f"{run['fd']:.2f}" for run in runs)
    against = f"{_mean(runs, 'fd') / _mean(control, 'fd'):.2f}" if control else ""
    means = " | ".join(
        f"{_mean(runs, key):.3f}"
        for key in ("accuracy", "precision", "recall", "reward", "max_probability", "relaxation_gap")
    )
    return (
        f"| {name} | {values} | **{_mean(runs, 'fd'):.2f}** | {against} | {means} | {_mean(runs, 'seconds'):.0f} | "
        f"{MEANING[name]} |"
    )


def _claims(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = [
        "| claim: ratio of Frechet distances | by seed | of the means | asked | holds |",
        "|---|---|---|---|---|",
    ]
    for title, arm, control, kind, bound in CLAIMS:
        if arm not in arms or control not in arms:
            continue
        ratio = _mean(arms[arm], "fd") / _mean(arms[control], "fd")
        by_seed = ", ".join(f"{a['fd'] / b['fd']:.2f}" for a, b in zip(arms[arm], arms[control], strict=True))
        holds = ratio <= bound if kind == "at most" else ratio >= bound
        lines.append(f"| {title} | {by_seed} | **{ratio:.2f}** | {kind} {bound} | {'yes' if holds else 'no'} |")
    if {"gan_soft", "control"} <= arms.keys():
        gain = _mean(arms["gan_soft"], "recall") - _mean(arms["control"], "recall")
        lines.append(f"| Di[M]O + GAN: recall above the control's | | **{gain:+.3f}** | above 0 | {_yes(gain > 0)} |")
    trained = [name for name in arms if not name.endswith("start")]
    adversarial = [name for name in trained if name.startswith("gan_")]
    if adversarial and "control" in arms:
        best = min(adversarial, key=lambda name: _mean(arms[name], "fd"))
        ratio = _mean(arms[best], "fd") / _mean(arms["control"], "fd")
        chosen = f"Best of the arms with a GAN, chosen on these figures: {best}, {ratio:.2f} x the control. "
    else:
        chosen = ""
    before = _mean(arms["start"], "accuracy")
    fallen = [name for name in trained if _mean(arms[name], "accuracy") < before - 0.02]
    return [
        *lines,
        "",
        f"{chosen}Class accuracy more than two points below the start's: {', '.join(fallen) or 'none'}.",
    ]


def _tteo(content: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = [
        "Test-time embedding optimisation of the reward, 30 steps, scored on hard-decoded images; the accuracy is that "
        "of the held-out classifier. A step's cost is in forward passes of generator, decoder and reward.",
        "",
        "| student | optimizer | n a seed | reward before | after | raised | raised at the last step | accuracy before "
        "| after | cost of a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for student, runs in content.items():
        for optimizer, label in (("sgd", "SGD, lr 0.2"), ("adam", "Adam, lr 0.02")):
            rows = [run[optimizer] for run in runs]
            cost = statistics.mean(run["step_over_forward"] for run in runs)
            lines.append(
                f"| {student} | {label} | {rows[0]['n']} | {_mean(rows, 'before'):.4f} | {_mean(rows, 'after'):.4f} | "
                f"{_mean(rows, 'raised'):.1%} | {_mean(rows, 'raised_at_last_step'):.1%} | "
                f"{_mean(rows, 'accuracy_before'):.3f} | {_mean(rows, 'accuracy_after'):.3f} | {cost:.2f} |"
            )
    adam = [run["adam"] for run in content["start"]]
    raised, change = _mean(adam, "raised"), _mean(adam, "accuracy_after") - _mean(adam, "accuracy_before")
    cost = statistics.mean(run["step_over_forward"] for run in content["start"])
    return [
        *lines,
        "",
        "| claim, Di[M]O's student, Adam | measured | asked | holds |",
        "|---|---|---|---|",
        f"| reward of hard-decoded images raised | {raised:.1%} | at least 95% | {_yes(raised >= 0.95)} |",
        f"| accuracy of the held-out classifier | {change:+.3f} | not lower | {_yes(change >= 0)} |",
        f"| cost of a step in forward passes | {cost:.2f} | at most 3.5 | {_yes(cost <= 3.5)} |",
    ]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def picture(path: Path, students: Sequence[OneStepGenerator], tokenizer: ImageTokenizer, *, seed: int) -> None:
    """A row of samples an arm, the same draws for each.

    Args:
        path: PNG.
        students: Of the arms.
        tokenizer: Decodes them.
        seed: Of the draws.
    """
    labels = balanced_labels(20, num_classes=10)
    parts = [generate(one_step_tokens(student), tokenizer, labels, seed=seed).images for student in students]
    save_grid(torch.cat(parts), path, columns=20)
