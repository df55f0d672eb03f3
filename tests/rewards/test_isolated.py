"""A reward in a process of its own: the same values, and nothing left behind however either side ends."""

import errno
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import Reward, probe_reward
from rewards.isolated import Isolated, WorkerError

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
SHARED = Path("/dev/shm")
PACKAGE = """
import os, time
import torch
from rewards.base import Reward

class Curved(Reward):
    def __init__(self, *, power=2.0, name="curved"):
        super().__init__(name=name)
        self.power = power
        print("a library talks on stdout")
    def forward(self, images, prompts):
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts], device=images.device)
        return (images ** self.power).mean(dim=(1, 2, 3)) * lengths

class Labelled(Reward):
    takes = "labels"
    def forward(self, images, labels):
        return images.mean(dim=(1, 2, 3)) * labels

class Dying(Reward):
    def forward(self, images, prompts):
        os._exit(3)

class Slow(Reward):
    def forward(self, images, prompts):
        time.sleep(60)

class Wrong(Reward):
    def forward(self, images, prompts):
        raise RuntimeError("out of\\nmemory")
"""


class Curved(Reward):
    """What the other environment's reward computes."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images**2.0).mean(dim=(1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another interpreter, whose packages alone have the reward; it borrows torch from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "their_rewards.py").write_text(PACKAGE)
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin" / "python"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = _shared()
    yield
    assert _shared() <= before


def _shared() -> set[Path]:
    """Shared memory with a name; semaphores of other processes come and go."""
    return {path for path in SHARED.iterdir() if not path.name.startswith("sem.")} if SHARED.is_dir() else set()


def worker_id(reward: Isolated) -> int:
    process = reward._worker._process
    assert process is not None
    return process.pid


def gone(process: int, *, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = Path(f"/proc/{process}/status")
        if not status.is_file() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False


def test_the_package_is_not_ours() -> None:
    with pytest.raises(ImportError):
        __import__("their_rewards")


def test_scores_and_gradients_are_those_of_the_reward(python: Path) -> None:
    reward = Isolated("their_rewards.Curved", python=python)
    assert reward.name == "Curved"
    for shape in ((2, 3, 5, 4), (1, 3, 2, 2), (3, 3, 16, 16)):
        images, prompts = torch.rand(shape), ["a", "abc", "ab"][: shape[0]]
        weights, gradients, scores = torch.randn(shape[0]), [], []
        for each in (reward, Curved()):
            leaf = images.clone().requires_grad_()
            score = each(leaf, prompts)
            (score * weights).sum().backward()
            scores.append(score.detach())
            gradients.append(leaf.grad)
        torch.testing.assert_close(scores[0], scores[1])
        torch.testing.assert_close(gradients[0], gradients[1])
    with torch.no_grad():
        assert not reward(images, prompts).requires_grad
    probe_reward(reward, image_size=8, conditions=["a", "ab"])
    reward.close()


def test_options_and_labels_get_there(python: Path) -> None:
    cubed = Isolated("their_rewards.Curved", python=python, options={"power": 3.0}, name="cubed")
    images = torch.full((1, 3, 2, 2), 0.5)
    assert cubed(images, ["ab"]).item() == pytest.approx(2 * 0.125)
    labelled = Isolated("their_rewards.Labelled", python=python, takes="labels")
    assert labelled(images, torch.tensor([3])).item() == pytest.approx(1.5)
    for reward in (cubed, labelled):
        reward.close()


def test_second_derivatives_are_refused(python: Path) -> None:
    reward = Isolated("their_rewards.Curved", python=python)
    images = torch.rand(1, 3, 2, 2, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    (gradient,) = torch.autograd.grad((weight * reward(images, ["a"])).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    reward.close()


def assert_shared_memory_has_no_name(process: int) -> None:
    """Then it is gone with the last process that holds it, however that ends. Said by /proc, where there is one."""
    folder = Path(f"/proc/{process}/fd")
    if not folder.is_dir() or not Path("/dev/shm").is_dir():
        pytest.skip("needs /proc and /dev/shm")
    shared = [name for name in map(os.readlink, folder.iterdir()) if name.startswith("/dev/shm/")]
    assert shared
    assert all(name.endswith(" (deleted)") for name in shared)


def test_a_killed_worker_is_started_once_more(python: Path) -> None:
    reward = Isolated("their_rewards.Curved", python=python)
    images, first = torch.rand(1, 3, 2, 2), worker_id(reward)
    before = reward(images, ["a"])
    assert_shared_memory_has_no_name(first)
    os.kill(first, signal.SIGKILL)
    assert torch.equal(reward(images, ["a"]), before)
    assert worker_id(reward) != first
    reward.close()
    assert torch.equal(reward(images, ["a"]), before)
    reward.close()


def test_a_worker_that_dies_again_is_one_line(python: Path) -> None:
    reward = Isolated("their_rewards.Dying", python=python)
    with pytest.raises(WorkerError, match=r"^reward Dying: expected a worker that lives, got one that died twice$"):
        reward(torch.rand(1, 3, 2, 2), ["a"])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate: memory is not taken ahead")
def test_images_that_do_not_fit_into_shared_memory_are_one_line(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Isolated("their_rewards.Curved", python=python)

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            WorkerError,
            match=r"^reward Curved: expected 6 MiB of shared memory for 4 images, got an error \(.*No space left",
        ):
            reward(torch.rand(4, 3, 256, 256), ["a"] * 4)
    assert reward(torch.rand(1, 3, 2, 2), ["a"]).isfinite()


def test_a_slow_worker_is_one_line_and_ended(python: Path) -> None:
    reward = Isolated("their_rewards.Slow", python=python)
    reward._worker._timeout = 0.5
    process = worker_id(reward)
    with pytest.raises(WorkerError, match=r"^reward Slow: expected an answer within 0.5 s, got none"):
        reward(torch.rand(1, 3, 2, 2), ["a"])
    assert gone(process)


def test_a_worker_whose_reward_is_gone_at_the_second_start_is_ended(python: Path) -> None:
    reward = Isolated("their_rewards.Curved", python=python)
    os.kill(worker_id(reward), signal.SIGKILL)
    reward._worker._build["reward"] = "their_rewards.Nothing"
    with pytest.raises(WorkerError, match=r"^reward Curved: ValueError: reward their_rewards.Nothing: expected"):
        reward(torch.rand(1, 3, 2, 2), ["a"])
    assert reward._worker._process is None


def test_errors_there_are_one_line_here(python: Path) -> None:
    reward = Isolated("their_rewards.Wrong", python=python)
    with pytest.raises(WorkerError, match=r"^reward Wrong: RuntimeError: out of memory$"):
        reward(torch.rand(1, 3, 2, 2), ["a"])
    reward.close()
    with pytest.raises(
        WorkerError, match=r"^reward Nothing: ValueError: reward their_rewards.Nothing: expected to import"
    ):
        Isolated("their_rewards.Nothing", python=python)
    with pytest.raises(ValueError, match=r"^python: expected an interpreter, got '/no/python'$"):
        Isolated("their_rewards.Curved", python="/no/python")
    with pytest.raises(ValueError, match=r"^timeout: expected a number of seconds above 0, got 0$"):
        Isolated("their_rewards.Curved", python=python, timeout=0)
    with pytest.raises(WorkerError, match=r"expected .* to run the worker, got one that died at the start"):
        Isolated("their_rewards.Curved", python="/bin/false")


def test_the_worker_ends_with_a_killed_parent(python: Path) -> None:
    code = (
        "import time; from rewards.isolated import Isolated; "
        f"r = Isolated('their_rewards.Curved', python={str(python)!r}); "
        "print(r._worker._process.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        for one in (process, parent.pid):
            assert_shared_memory_has_no_name(one)
        parent.kill()
    assert gone(process)


def test_a_dropped_reward_takes_its_worker_along(python: Path) -> None:
    reward = Isolated("their_rewards.Curved", python=python)
    process = worker_id(reward)
    del reward
    assert gone(process)
