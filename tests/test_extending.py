"""The examples of docs/extending.md: each is one file, and every command takes it by its class path."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from rewards.testing import check_reward
from softgen import load_generator, load_model, load_tokenizer
from softgen.fit import main as fit
from softgen.sample import main as sample

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL)
FILES = {
    match[1]: body
    for language, body in BLOCKS
    if language == "python" and (match := re.match(r"# (my_\w+)\.py\n", body))
}
SHORT = [
    "--trainer.max_steps=3",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=1",
]
SHORT += ["--trainer.val_check_interval=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the page's reader works: with the four files, the tokenizer that the page saves, and the recipes."""
    home = tmp_path_factory.mktemp("home")
    for name, body in FILES.items():
        (home / f"{name}.py").write_text(body)
    (home / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.syspath_prepend(str(home))
        (script,) = (body for language, body in BLOCKS if language == "python" and not body.startswith("#"))
        exec(compile(script, "docs/extending.md", "exec"), {})
        teacher, _ = _commands()
        fit([*teacher, *SHORT])
        yield home
    for name in FILES:
        sys.modules.pop(name, None)


def _commands() -> list[list[str]]:
    text = "\n".join(body for language, body in BLOCKS if language == "bash").replace("\\\n", " ")
    return [shlex.split(line)[3:] for line in text.splitlines() if line.strip()]


def test_every_example_is_there() -> None:
    assert set(FILES) == {"my_objective", "my_reward", "my_tokenizer", "my_teacher"}


def test_the_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "runs/mine/tokenizer")
    tokens = torch.arange(16).expand(2, -1)
    assert torch.equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)
    one_hot = torch.nn.functional.one_hot(tokens, 27).float()
    torch.testing.assert_close(tokenizer.embed_soft(one_hot), tokenizer.codebook[tokens])


def test_the_teacher(folder: Path) -> None:
    model = load_model(folder / "runs/mine/teacher/model")
    assert type(model).__name__ == "Mixer"
    tokens = torch.randint(27, (3, 16))
    one_hot = torch.nn.functional.one_hot(tokens, 27).float()
    mask = torch.rand(3, 16) < 0.5
    embedded = model.embed(tokens.masked_fill(mask, model.mask_id))
    torch.testing.assert_close(model.embed_soft(one_hot, mask), embedded)
    asked = model.encode(torch.tensor([1, 2, 3]))
    assert not torch.equal(model(embedded, asked), model(embedded, asked.drop()))
    sample(["--model=runs/mine/teacher/model", "--n=4", "--out=samples", "--device=cpu", "--guidance=2"])
    assert (folder / "samples" / "grid.png").is_file()


def test_distillation_with_an_objective_and_a_reward_of_its_own(folder: Path) -> None:
    _, words = _commands()
    blunt, reward = (yaml.safe_load(body)["objectives"] for language, body in BLOCKS if language == "yaml")
    given = yaml.safe_dump([*blunt, reward[1]], default_flow_style=True, width=10_000)
    fit([*words, f"--model.init_args.objectives={given}", *SHORT])
    student = load_generator(folder / "runs/mine/dimo/model")
    assert type(student.model).__name__ == "Mixer"


def test_the_reward(folder: Path) -> None:
    check_reward(importlib.import_module("my_reward").Brightness(), conditions=["a cat", "a dog"])
