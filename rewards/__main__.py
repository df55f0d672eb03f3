"""Commands: `python -m rewards list`, and `python -m rewards score IMAGE... --reward NAME --prompt TEXT`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rewards.errors import one_line
from rewards.registry import FACTS, Facts, available, build

if TYPE_CHECKING:
    from torch import Tensor

PROGRAM = "python -m rewards"
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Its words; by default those of the process.
    """
    parser = _parser()
    parsed = parser.parse_args(args)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if parsed.command == "list":
                print_rewards()
            else:
                options = {key: value for given in parsed.options for key, value in given.items()}
                print_scores(
                    parsed.images, reward=parsed.reward, prompts=parsed.prompt, options=options, device=parsed.device
                )
        except USER_ERRORS as error:
            parser.error(one_line(error, limit=1000))


def print_rewards() -> None:
    """Print a table of every reward: name, range, checkpoint, memory, licence, and where it comes from."""
    head = ("name", "range", "checkpoint", "memory", "licence", "source")
    rows = [head]
    for name, source in sorted(available().items()):
        facts = FACTS.get(name, Facts())
        rows.append((name, facts.range, facts.checkpoint, facts.memory, facts.licence, source))
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def print_scores(
    images: Sequence[Path], *, reward: str, prompts: Sequence[str], options: dict[str, Any], device: str = "cpu"
) -> None:
    """Print one line an image: the score, a tab, the file.

    Args:
        images: Image files, each scored at its own size.
        reward: A name of `rewards.available()`, or the dotted path of a class.
        prompts: One for all images, or one each; for a reward that takes labels, class names or numbers.
        options: Arguments of the reward.
        device: Where to compute.

    Raises:
        ValueError: A file is not an image, or the reward or its arguments do not fit.
    """
    if len(prompts) not in (1, len(images)):
        raise ValueError(f"--prompt: expected one, or one for each of the {len(images)} images, got {len(prompts)}")
    if missing := [str(path) for path in images if not path.is_file()]:
        raise ValueError(f"images: expected files, got {', '.join(missing)}")
    import torch

    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device: expected a device of torch, got {device!r}") from error
    judge = build(reward, **options).to(target).eval()
    pairs = zip(images, prompts if len(prompts) > 1 else list(prompts) * len(images), strict=True)
    with torch.no_grad():
        for path, prompt in pairs:
            score = judge(read_image(path)[None].to(target), [prompt])
            print(f"{float(score):.6f}\t{path}")


def read_image(path: Path) -> "Tensor":
    """Read an image file as (3, H, W) float32 in [0, 1], turned as its EXIF says; grey is repeated to 3 channels.

    Raises:
        ValueError: The file cannot be read.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            pixels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # PIL reports a broken png by SyntaxError
        raise ValueError(f"images: expected an image, got '{path}', which cannot be read ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_options(word: str) -> dict[str, Any]:
    """One `key=value`, the value in YAML, or the path of a YAML file that maps keys to values."""
    import yaml

    key, is_pair, value = word.partition("=")
    try:
        if is_pair:
            return {key: yaml.safe_load(value)}
        loaded = yaml.safe_load(Path(word).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(
            f"expected key=value or a YAML file, got {word!r} ({one_line(error)})"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise argparse.ArgumentTypeError(f"expected {word!r} to map keys to values, got a {type(loaded).__name__}")
    return loaded


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Reward models: list them, or score images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,score}")
    commands.add_parser("list", help="Print the rewards that are installed.")
    score = commands.add_parser("score", help="Print the score of each image, higher is better.")
    score.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="Image files of any size.")
    score.add_argument("--reward", required=True, help="A name from `list`, or the dotted path of a class.")
    score.add_argument(
        "--prompt",
        "--label",
        action="append",
        required=True,
        help="Prompt, class name or label: once for all images, or once for each.",
    )
    score.add_argument(
        "--options",
        nargs="+",
        action="extend",
        type=read_options,
        default=[],
        metavar="KEY=VALUE",
        help="Arguments of the reward: key=value words, or a YAML file.",
    )
    score.add_argument("--device", default="cpu", help="Where to compute (default: cpu).")
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
