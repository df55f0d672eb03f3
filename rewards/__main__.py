"""Commands: `python -m rewards list`, `score IMAGE... --reward NAME --prompt TEXT`, and `env NAME`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rewards.errors import one_line
from rewards.registry import FACTS, Facts, available
from rewards.table import print_scores, print_table

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
            elif parsed.command == "env":
                print_environment(parsed.name, path=parsed.path, python=parsed.python)
            else:
                print_scores(
                    parsed.images,
                    rewards=_with_options(parsed.rewards),
                    prompts=parsed.prompt,
                    paired=parsed.paired,
                    device=parsed.device,
                    tabs=parsed.tsv,
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


def print_environment(name: str, *, path: Path | None = None, python: Path | None = None) -> None:
    """Make the environment of an official package, unless it is there, and print where and how to use it."""
    from rewards.environments import make_environment

    made = make_environment(name, path=path, python=python)
    print(f"environment of {name}: {made.folder}{'' if made.fresh else ' (it was there)'}")
    where = "" if path is None else f" python={made.python}"
    print(f"use it: python -m rewards score IMAGE --prompt TEXT --reward {name} --options backend=official{where}")


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


def read_rewards(word: str) -> list[tuple[str, dict[str, Any]]]:
    """One reward without options; or those of a YAML file that maps names to options."""
    if not word.endswith((".yaml", ".yml")):
        return [(word, {})]
    given = {name: options or {} for name, options in read_options(word).items()}
    for name, options in given.items():
        if not isinstance(options, dict):
            got = f"a {type(options).__name__} for {name!r}"
            raise argparse.ArgumentTypeError(f"expected {word!r} to map names to options, got {got}")
    return list(given.items())


class _InOrder(argparse.Action):
    """Keeps rewards and options in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add what was given."""
        namespace.rewards = [*(namespace.rewards or []), *((self.const, value) for value in values)]


def _with_options(words: Sequence[tuple[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Rewards and their options: those of the reward before them; those before any reward are for all."""
    for_all: dict[str, Any] = {}
    rewards: list[tuple[str, dict[str, Any]]] = []
    for kind, value in words:
        if kind == "reward":
            rewards += value
        elif rewards:
            rewards[-1][1].update(value)
        else:
            for_all.update(value)
    return [(name, {**for_all, **options}) for name, options in rewards]


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Reward models: list them, score images, make environments for them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,score,env}")
    commands.add_parser("list", help="Print the rewards that are installed.")
    _add_score(commands.add_parser("score", help="Print the scores of images under prompts, higher is better."))
    environment = commands.add_parser("env", help="Make the environment that an official package runs in.")
    environment.add_argument("name", metavar="NAME", help="imagereward or hpsv3.")
    environment.add_argument("--path", type=Path, help="Folder (default: in the user's cache).")
    environment.add_argument("--python", type=Path, help="Interpreter to make it with (default: this one).")
    return parser


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="Image files of any size.")
    score.add_argument(
        "--reward",
        action=_InOrder,
        nargs=1,
        const="reward",
        type=read_rewards,
        required=True,
        dest="rewards",
        metavar="REWARD",
        help="A name from `list`, the dotted path of a class, or a YAML file that maps names to options; repeatable.",
    )
    score.add_argument(
        "--prompt",
        "--label",
        action="append",
        required=True,
        help="Prompt, class name or label; repeatable: each image is scored under each.",
    )
    score.add_argument("--paired", action="store_true", help="The first prompt for the first image, and so on.")
    score.add_argument(
        "--options",
        nargs="+",
        action=_InOrder,
        const="options",
        type=read_options,
        dest="rewards",
        metavar="KEY=VALUE",
        help="Arguments of the --reward before it: key=value words, or a YAML file.",
    )
    score.add_argument("--device", default="cpu", help="Where to compute (default: cpu).")
    score.add_argument("--tsv", action="store_true", help="Columns separated by tabs.")


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
