"""Environments of their own for official packages that cannot be installed beside this one."""

from rewards.environments.make import NAMES, Environment, find_interpreter, make_environment

__all__ = ["NAMES", "Environment", "find_interpreter", "make_environment"]
