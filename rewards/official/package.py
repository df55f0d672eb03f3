"""Importing an official package."""

import importlib
import sys
from typing import Any


def import_package(module: str, *, package: str, environment: str) -> Any:
    """The package.

    Args:
        module: What it is imported as.
        package: What it is installed as.
        environment: Which environment has it.

    Raises:
        ImportError: This interpreter has none; the message has the command that makes one.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        command = f"python -m rewards env {environment}"
        raise ImportError(f"expected the package {package} in {sys.prefix}, got none: {command}") from error
