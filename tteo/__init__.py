"""Test-time embedding optimisation (TTEO) of one-step generators."""
