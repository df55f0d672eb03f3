import ast
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("softgen", "rewards", "distill", "tteo")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DEVICES = ("cuda", "mps", "xpu", "rocm")


def _import_each_first(modules: list[str], failures: Connection) -> None:
    """Import every module into a process that has not seen our packages: no order of imports is lucky."""
    compile_file = SourceFileLoader.get_code
    SourceFileLoader.get_code = cache(compile_file)  # type: ignore[method-assign]
    caught = []
    for name in modules:
        for seen in [seen for seen in sys.modules if seen.split(".")[0] in PACKAGES]:
            del sys.modules[seen]
        try:
            importlib.import_module(name)
        except Exception as error:
            caught.append(f"{name}: {error!r}")
    failures.send(caught)


def names(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_packages_import_one_way() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = python("-c", code, "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken." in done.stdout


def test_every_module_can_be_imported_first() -> None:
    modules = [names(path) for path in FILES]
    assert len(modules) > 40
    # A fork already has torch and Lightning; it keeps what the imports do to itself.
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=_import_each_first, args=(modules, sent))
    process.start()
    sent.close()
    assert received.recv() == []
    process.join()


def test_importing_softgen_is_light() -> None:
    code = "import sys, softgen; print('torch' in sys.modules, softgen.__version__)"
    assert python("-c", code).stdout.split() == ["False", "0.1.0"]


@pytest.mark.parametrize("path", FILES, ids=names)
def test_no_device_is_written_down_and_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not [text for text in literals if isinstance(text, str) and text.split(":")[0] in DEVICES]
    methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not methods & set(DEVICES)
    for call in calls(tree, "torch.load"):
        assert {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only") == "True"
    imported = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    assert not imported & {"pickle", "cloudpickle", "dill"}
