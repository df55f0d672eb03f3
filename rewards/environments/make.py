"""Making and finding environments. What goes into NAME is in NAME.txt here, and in NAME.no-deps.txt.

Packages of the latter are installed without what they ask for: it is more than they import, or cannot be had.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rewards.errors import one_line

NAMES = ("imagereward", "hpsv3")
_HERE = Path(__file__).parent
_STDERR = 2
_MARK = "softgen-environment.json"


@dataclass(frozen=True)
class Environment:
    """An environment that is complete.

    Attributes:
        folder: Where it is.
        python: Its interpreter.
        fresh: It was made just now.
    """

    folder: Path
    python: Path
    fresh: bool


def make_environment(name: str, *, path: Path | None = None, python: Path | None = None) -> Environment:
    """Make an environment, unless it is there. What pip prints goes to stderr.

    Whatever ends it early, nothing half-made is left: the folder is removed then, or by the next call.

    Args:
        name: One of `NAMES`.
        path: Its folder; by default softgen/environments/NAME in the user's cache (`XDG_CACHE_HOME` or ~/.cache).
        python: Interpreter that it is made with; by default this one.

    Raises:
        ValueError: An unknown name, a folder that holds something else, or an interpreter or pip that fails.
    """
    folder = (_default_folder(name) if path is None else path).expanduser().absolute()
    requirements = _requirements(name)
    mark = _mark(folder)
    if mark.get("complete") == _fingerprint(requirements):
        return Environment(folder, _python(folder), fresh=False)
    if mark.get("complete"):
        raise ValueError(f"--path: expected an environment of this release, got another one: remove {folder}")
    if folder.is_dir() and any(folder.iterdir()):
        if not mark:
            raise ValueError(f"--path: expected a new or empty folder, got {folder}")
        shutil.rmtree(folder)
    maker = Path(sys.executable) if python is None else python
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARK).write_text(json.dumps({"complete": None}))
        _fill(folder, maker, requirements)
        (folder / _MARK).write_text(json.dumps({"complete": _fingerprint(requirements)}))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Environment(folder, _python(folder), fresh=True)


def find_interpreter(name: str) -> Path:
    """The interpreter of an environment that was made at its default place.

    Raises:
        ValueError: It was not; the message has the command that does.
    """
    folder = _default_folder(name)
    if not _mark(folder).get("complete") or not _python(folder).is_file():
        raise ValueError(
            f"python: expected the environment of {name}, got none in {folder}: python -m rewards env {name}"
        )
    return _python(folder)


def _fill(folder: Path, maker: Path, requirements: list[Path]) -> None:
    _run([str(maker), "-m", "venv", str(folder)], what=f"--python: expected {maker} to make an environment")
    for file in requirements:
        words = [str(_python(folder)), "-m", "pip", "install", "--disable-pip-version-check"]
        words += ["--no-deps"] if file.suffixes[-2:] == [".no-deps", ".txt"] else []
        _run([*words, "--requirement", str(file)], what=f"env: expected pip to install {file.name}")


def _run(words: list[str], *, what: str) -> None:
    try:
        done = subprocess.run(words, stdout=_STDERR, check=False)
    except OSError as error:
        raise ValueError(f"{what}, got an error ({one_line(error)})") from error
    if done.returncode:
        raise ValueError(f"{what}, got exit code {done.returncode}: see its messages above")


def _requirements(name: str) -> list[Path]:
    if name not in NAMES:
        raise ValueError(f"env: expected one of {', '.join(NAMES)}, got {name!r}")
    return [path for path in (_HERE / f"{name}.txt", _HERE / f"{name}.no-deps.txt") if path.is_file()]


def _fingerprint(requirements: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in requirements)).hexdigest()


def _default_folder(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "softgen" / "environments" / name


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _mark(folder: Path) -> dict[str, str | None]:
    """What the folder says of itself; empty where it is none of ours."""
    try:
        mark = json.loads((folder / _MARK).read_text())
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}
