"""The fixtures of the original implementations, where they are at hand."""

import os
from pathlib import Path

import pytest

from tests.parity.families import find_family, names
from tests.parity.fixture import Fixture, compare

GOLDEN = Path(os.environ.get("SOFTGEN_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


@pytest.mark.parametrize("family", names())
def test_a_family_agrees_with_its_original(family: str) -> None:
    folders = sorted(GOLDEN.glob(f"{family}_*")) if GOLDEN.is_dir() else []
    folders = [folder for folder in folders if Fixture.read(folder).config["family"] == family]
    if not folders:
        pytest.skip(f"no fixtures of {family} in {GOLDEN}; set SOFTGEN_GOLDEN to their folder")
    for folder in folders:
        report = compare(Fixture.read(folder), find_family(family))
        assert not report.failed, "\n".join(report.lines)
