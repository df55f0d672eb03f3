import re
from pathlib import Path

import pytest
import torch

from rewards import ClassifierReward, CompositeReward, Reward, available, build

PLUGIN = """
from rewards import Reward

class Contrast(Reward):
    name = "contrast"

    def __init__(self, *, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def forward(self, images, prompts):
        return self.gain * images.flatten(1).std(dim=1)

def make(gain):
    return Contrast(gain=gain)

def nothing():
    return 3

number = 3
"""


def install(root: Path, entries: str, *, package: str = "contrast-reward") -> None:
    """What pip leaves of a package: its module and its dist-info."""
    (root / "contrast_reward.py").write_text(PLUGIN)
    info = root / f"{package.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[softgen.rewards]\n{entries}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_built_in_rewards_are_listed() -> None:
    known = available()
    assert known["classifier"] == "built in, rewards.classifier:ClassifierReward"
    assert known["clip"] == "built in, rewards.clip:CLIPReward"


def test_an_installed_package_is_found_and_built(site: Path) -> None:
    install(site, "contrast = contrast_reward:Contrast\nmade = contrast_reward:make")
    assert available()["contrast"] == "package contrast-reward 1.2, contrast_reward:Contrast"
    images = torch.rand(2, 3, 4, 4)
    expected = 3 * images.flatten(1).std(dim=1)
    for name in ("contrast", "made", "contrast_reward.Contrast", "contrast_reward:Contrast"):
        reward = build(name, gain=3.0)
        assert isinstance(reward, Reward)
        torch.testing.assert_close(reward(images, ["a", "b"]), expected)


def test_a_built_in_reward_is_built_by_name() -> None:
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    assert isinstance(build("classifier", classifier=classifier), ClassifierReward)
    assert isinstance(
        build("rewards.CompositeReward", rewards=[build("classifier", classifier=classifier)]), CompositeReward
    )


def test_an_unknown_name_lists_the_known_ones(site: Path) -> None:
    install(site, "contrast = contrast_reward:Contrast")
    message = (
        "reward: expected one of aesthetic, classifier, clip, contrast, hpsv2, hpsv3, imagereward, pickscore, or the "
        "dotted path of a class, got 'clap'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build("clap")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "contrast",
            {"gian": 1},
            "expected its own arguments, got an error (got an unexpected keyword argument 'gian')",
        ),
        ("made", {}, "expected its own arguments, got an error (missing a required argument: 'gain')"),
        ("gone", {}, "expected to import nowhere:Reward, got an error (No module named 'nowhere')"),
        ("number", {}, "expected a class or a function, got a int"),
        ("nothing", {}, "expected a rewards.Reward, got a int"),
        ("contrast_reward.nothing", {}, "expected the path of a rewards.Reward class, got another object"),
        ("os.system", {"command": "exit 1"}, "expected the path of a rewards.Reward class, got another object"),
        (
            "contrast_reward.Colour",
            {},
            "expected to import contrast_reward:Colour, got an error "
            "(module 'contrast_reward' has no attribute 'Colour')",
        ),
    ],
)
def test_a_broken_plug_in_is_named(site: Path, name: str, options: dict[str, object], message: str) -> None:
    entries = ["contrast = contrast_reward:Contrast", "made = contrast_reward:make", "gone = nowhere:Reward"]
    install(site, "\n".join([*entries, "number = contrast_reward:number", "nothing = contrast_reward:nothing"]))
    with pytest.raises(ValueError, match=f"^{re.escape(f'reward {name}: {message}')}$"):
        build(name, **options)


def test_a_name_that_is_taken_is_left_out_with_a_warning(site: Path) -> None:
    install(site, "clip = contrast_reward:Contrast")
    message = "reward clip: ignoring that of package contrast-reward 1.2, the name is taken by one built in"
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        assert available()["clip"] == "built in, rewards.clip:CLIPReward"


def test_two_packages_with_one_name_are_told_apart_by_a_warning(site: Path) -> None:
    install(site, "contrast = contrast_reward:Contrast")
    install(site, "contrast = contrast_reward:make", package="copy-reward")
    with pytest.warns(
        UserWarning, match=r"^reward contrast: ignoring that of package \S+ 1.2, the name is taken by one of"
    ):
        assert "contrast" in available()
