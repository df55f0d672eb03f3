"""Test-time embedding optimisation (TTEO) of one-step generators."""

from tteo.optimize import TTEOSettings, optimize
from tteo.result import TTEOResult

__all__ = ["TTEOResult", "TTEOSettings", "optimize"]
