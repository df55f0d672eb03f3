"""Compare with the original implementations: `python -m tests.parity DIR...`.

For every folder the largest absolute difference of each expected tensor is printed. The exit code is 1 if one is above
its tolerance, or was not checked.
"""

import sys
from pathlib import Path

from tests.parity.families import find_family
from tests.parity.fixture import Fixture, compare


def main(folders: list[str]) -> int:
    """Check the folders; the exit code."""
    if not folders:
        print("usage: python -m tests.parity DIR...", file=sys.stderr)
        return 2
    failed = 0
    for folder in folders:
        try:
            fixture = Fixture.read(Path(folder))
            report = compare(fixture, find_family(fixture.config["family"]))
        except ValueError as error:
            print(f"{folder}: {error}")
            failed += 1
            continue
        print(f"{folder}: {f'{len(report.failed)} FAILED' if report.failed else f'{len(report.lines)} tensors agree'}")
        print("\n".join(report.lines))
        failed += bool(report.failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
