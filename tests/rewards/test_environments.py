"""`python -m rewards env`: made once, whole or not at all."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from rewards.__main__ import main
from rewards.environments import NAMES, find_interpreter, make
from rewards.environments.make import make_environment

FOLDER = Path(make.__file__).parent


def _wheel(folder: Path, name: str, *, requires: str = "") -> Path:
    """A package of one empty module."""
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        needed = f"Requires-Dist: {requires}\n" if requires else ""
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the real ones: two small packages, one of which asks for something that is not there."""
    folder = tmp_path / "requirements"
    folder.mkdir()
    (folder / "imagereward.txt").write_text(f"--no-index\n{_wheel(tmp_path, 'plain_one')}\n")
    (folder / "imagereward.no-deps.txt").write_text(
        f"--no-index\n{_wheel(tmp_path, 'greedy_one', requires='not-anywhere==3')}\n"
    )
    monkeypatch.setattr(make, "_HERE", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_every_requirement_is_pinned_and_no_host_is_named() -> None:
    for name in NAMES:
        assert (FOLDER / f"{name}.txt").is_file()
    for path in FOLDER.glob("*.txt"):
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        assert all("==" in line for line in lines if line)
        assert not any(word in path.read_text() for word in ("://", "--index", "--extra"))


def test_made_once_where_the_cache_is(requirements: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache" / "softgen" / "environments" / "imagereward"
    main(["env", "imagereward"])
    assert capsys.readouterr().out.splitlines() == [
        f"environment of imagereward: {folder}",
        "use it: python -m rewards score IMAGE --prompt TEXT --reward imagereward --options backend=official",
    ]
    python = find_interpreter("imagereward")
    assert python == folder / "bin" / "python"
    subprocess.run([str(python), "-c", "import plain_one, greedy_one"], check=True)
    kept = (folder / "pyvenv.cfg").stat().st_mtime_ns
    main(["env", "imagereward"])
    assert "(it was there)" in capsys.readouterr().out
    assert (folder / "pyvenv.cfg").stat().st_mtime_ns == kept
    # Another release of this package may want other packages.
    (requirements / "imagereward.txt").write_text("--no-index\n")
    with pytest.raises(ValueError, match=rf"^--path: expected an environment of this release, got .* {folder}$"):
        make_environment("imagereward")


def test_nothing_is_left_of_one_that_fails(
    requirements: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (requirements / "imagereward.txt").write_text("--no-index\nnot-anywhere==3\n")
    folder = tmp_path / "mine"
    with pytest.raises(SystemExit) as stop:
        main(["env", "imagereward", "--path", str(folder)])
    assert stop.value.code == 2
    message = "python -m rewards: error: env: expected pip to install imagereward.txt, got exit code 1"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert not folder.exists()


def test_one_that_was_cut_off_is_made_again(
    requirements: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "softgen-environment.json").write_text(json.dumps({"complete": None}))
    (folder / "half").write_text("")
    main(["env", "imagereward", "--path", str(folder)])
    assert not (folder / "half").exists()
    assert f"--options backend=official python={folder}/bin/python" in capsys.readouterr().out


def test_mistakes_are_one_line(requirements: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^env: expected one of imagereward, hpsv3, got 'hpsv9'$"):
        make_environment("hpsv9")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").write_text("")
    with pytest.raises(ValueError, match=rf"^--path: expected a new or empty folder, got {tmp_path}/photos$"):
        make_environment("imagereward", path=tmp_path / "photos")
    assert (tmp_path / "photos" / "one.png").is_file()
    with pytest.raises(ValueError, match=r"^--python: expected /a/python to make an environment, got an error"):
        make_environment("imagereward", path=tmp_path / "new", python=Path("/a/python"))
    assert not (tmp_path / "new").exists()
