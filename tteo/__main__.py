"""Raise a reward of chosen samples: `python -m tteo --generator DIR --label 3 --reward CLASS`.

A text-conditional generator takes `--prompt "a red circle"` instead.
"""

import os
from pathlib import Path

import torch

from rewards import Reward, build, probe_reward
from softgen.cli import run_command
from softgen.files import save_tensors, write_json
from softgen.images import remove_numbered, save_grid, save_image
from softgen.loading import load_generator, load_tokenizer
from softgen.sample import check_writable, choose_device, prompts_of, wanted_conditions
from tteo.optimize import TTEOSettings, optimize
from tteo.result import TTEOResult

PROGRAM = "tteo"


def tteo(
    *,
    generator: str,
    reward: Reward | str,
    label: int | list[int] | None = None,
    prompt: str | list[str] | None = None,
    prompt_file: str | None = None,
    tokenizer: str | None = None,
    out: str = "runs/tteo",
    settings: TTEOSettings = TTEOSettings(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Optimise the input embeddings of a one-step generator; write images, before and after, a curve and scores.

    Args:
        generator: Folder or hub id of a one-step generator.
        reward: What is climbed, e.g. `rewards.ClassifierReward`; or a name that `python -m rewards list` shows, for
            one that needs no arguments.
        label: Class, or a list of classes, one image each (times `settings.candidates`).
        prompt: The same for a text-conditional generator.
        prompt_file: As `prompt`, from a .txt file, one a line, or a .jsonl or .parquet file with `prompt`.
        tokenizer: Folder or hub id; by default the one beside the generator.
        out: Folder to write to.
        settings: How the embedding is moved.
        seed: Sample i depends on (seed, i) alone.
        device: Torch device; by default the best one present.

    Raises:
        ValueError: Naming the option, what was expected and what was got.
    """
    settings.check()
    target = choose_device(device)
    check_writable(Path(out))
    model = load_generator(generator).to(target)
    decoder = load_tokenizer(tokenizer if tokenizer is not None else generator).to(target)
    labels = [label] if isinstance(label, int) else label
    prompts = prompts_of([prompt] if isinstance(prompt, str) else prompt, prompt_file)
    count = len(labels or prompts or ())
    asked = wanted_conditions(model.model, n=count, labels=labels, prompts=prompts)
    scorer = (build(reward) if isinstance(reward, str) else reward).to(target)
    if len(asked):
        probe_reward(scorer, image_size=decoder.image_size, conditions=asked[:1])
    result = optimize(model, decoder, scorer, asked, settings=settings, seed=seed)
    write_result(result, Path(out))
    before, after = result.before.mean().item(), result.after.mean().item()
    print(f"mean score {before:.4g} -> {after:.4g} on {len(result.after)} hard-decoded images: {out}/before_after.png")


def write_result(result: TTEOResult, folder: Path) -> None:
    """Write the result to a folder.

    Files: images/*.png, before_after.png (start above, best below), curve.png, scores.json, result.safetensors with the
    `tokens` and the input `embeddings` of the best images and the `start_tokens`, and with `settings.keep_every`
    trajectory.png, a row for each step that was kept.
    """
    remove_numbered(folder / "images")
    (folder / "trajectory.png").unlink(missing_ok=True)  # of an earlier run, as those
    for index, image in enumerate(result.images):
        save_image(image, folder / "images" / f"{index:05d}.png")
    shown = min(20, len(result.images))
    pairs = torch.cat([result.start_images[:shown], result.images[:shown]])
    save_grid(pairs, folder / "before_after.png", columns=shown)
    if len(result.trajectory):
        save_grid(result.trajectory[:, :shown].flatten(0, 1), folder / "trajectory.png", columns=shown)
    _write_curve(result, folder / "curve.png")
    kept = {"tokens": result.tokens, "embeddings": result.embeddings, "start_tokens": result.start_tokens}
    save_tensors(folder / "result.safetensors", kept)
    scores = {
        "before": result.before.tolist(),
        "after": result.after.tolist(),
        "best_step": result.best_step.tolist(),
        "soft": result.soft_scores.mean(dim=1).tolist(),
        "hard": result.hard_scores.mean(dim=1).tolist(),
    }
    write_json(folder / "scores.json", scores)


def _write_curve(result: TTEOResult, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(result.soft_scores.mean(dim=1).cpu().tolist(), label="soft decoding (climbed)")
    axes.plot(result.hard_scores.mean(dim=1).cpu().tolist(), label="hard decoding")
    axes.set_xlabel("step")
    axes.set_ylabel("mean score")
    axes.legend(frameon=False)
    scratch = path.with_name(f".{path.name}.partial")
    figure.savefig(scratch, format="png")
    os.replace(scratch, path)


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    run_command(tteo, program=PROGRAM, args=args)


if __name__ == "__main__":
    main()
