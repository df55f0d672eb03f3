"""Every command in the README parses, every file it shows is there, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from softgen import classifier, convert, evaluate, sample
from softgen.cli import command_parser
from softgen.fit import StageCLI, main
from tteo.__main__ import tteo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def _commands() -> list[list[str]]:
    text = "\n".join(body for language, body in BLOCKS if language == "bash").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


FIT = [words[words.index("softgen.fit") + 1 :] for words in _commands() if "softgen.fit" in words]
SMALL = {
    "softgen.sample": sample.sample,
    "softgen.evaluate": evaluate.evaluate,
    "softgen.classifier": classifier.classifier,
    "softgen.convert": convert.convert,
    "tteo": tteo,
}


class _Parsing(StageCLI):
    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("words", FIT, ids=lambda words: " ".join(words)[:70])
def test_fit_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cli = main(words, cli_class=_Parsing)
    assert cli.config["fit"].model.class_path


def test_small_commands_parse() -> None:
    seen = set()
    for words in _commands():
        for program, function in SMALL.items():
            if program in words:
                command_parser(function, program=program).parse_args(words[words.index(program) + 1 :])
                seen.add(program)
    assert seen == set(SMALL)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in _commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_every_command_is_known() -> None:
    for words in _commands():
        assert words[0] in {"make", "python", "torchrun"}
        if words[0] == "python":
            assert words[1] == "-m" or (ROOT / words[1]).is_file()
