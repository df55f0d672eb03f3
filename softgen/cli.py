"""What the commands share: one line for a user's mistake, and exit code 2."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from softgen.messages import locate_unknown_key, one_line

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
TRACEBACK = "SOFTGEN_TRACEBACK"
"""Set this environment variable to see where an error or a warning came from."""


def fail(message: object, *, program: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print(f"{program}: error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


class OneLineErrors:
    """Mixin of argument parsers: an error is one line, without the usage."""

    program: str
    words: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        fail(locate_unknown_key(one_line(message), self.words), program=self.program)


class CommandParser(OneLineErrors, ArgumentParser):
    """The argument parser of the small commands."""

    def __init__(self, *args: Any, program: str = "softgen", **kwargs: Any) -> None:
        # jsonargparse makes parsers of this class itself, for the arguments of nested classes.
        super().__init__(*args, **kwargs)
        self.program = program


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """Turn a user's mistake, raised anywhere within, into one line and exit code 2, and our warnings into one line."""
    shown = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
        if category is not UserWarning or os.environ.get(TRACEBACK):
            return shown(message, category, *where, **line)
        return f"{program}: warning: {one_line(message)}\n"

    warnings.formatwarning = formatted
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK):
            raise
        fail(error, program=program)
    finally:
        warnings.formatwarning = shown


def command_parser(function: Callable[..., Any], *, program: str) -> CommandParser:
    """A parser of the function's keyword arguments."""
    summary = (function.__doc__ or "").splitlines()[0]
    parser = CommandParser(program=program, prog=f"python -m {program}", description=summary)
    parser.add_argument("--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(function)
    return parser


def run_command(function: Callable[..., Any], *, program: str, args: list[str] | None) -> None:
    """Parse the function's keyword arguments from the command line and call it.

    Args:
        function: Its signature gives the options, its docstring their help.
        program: Shown in help and errors.
        args: Command-line words; by default those of the process.
    """
    parser = command_parser(function, program=program)
    parsed = parser.parse_args(args)
    with user_errors(program):
        options = parser.instantiate_classes(parsed).as_dict()
        options.pop("config", None)
        function(**options)


def quiet_lightning() -> None:
    """Leave out Lightning's notes on hardware and its advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        r".*does not have many workers.*",
        r".*number of training batches.*smaller than the logging interval.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*GPU available but not used.*",
        r".*module\(s\) in eval mode at the start of training.*",  # a text encoder that is frozen
        r".*`_pytree\..*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
