"""A reward in a process of its own, under another interpreter: packages that exclude each other, side by side.

The image and its gradient pass through a memory map of an unlinked file, so that nothing is left behind however either
process ends. The worker computes the score and d score / d image at once; the backward pass only multiplies.
"""

import contextlib
import json
import mmap
import os
import select
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import Reward
from rewards.conditions import Conditions
from rewards.errors import one_line
from rewards.first_order import score_with_gradient

_WORKER = Path(__file__).parent / "isolated_worker.py"
_SHARED = Path("/dev/shm")
_HEADER = struct.Struct("<q")


class WorkerError(ValueError):
    """The worker could not do what was asked: it answered with an error, died, or took too long."""


class Isolated(Reward):
    """Any reward class, run by another Python interpreter.

    Gradients are first-order only. A worker that dies is started once more; it ends with this process, whatever way
    this one ends.

    Args:
        reward: A name of `rewards.available()` there, or the dotted path of a class, which the other environment can
            import.
        python: Its interpreter, such as `/envs/hpsv3/bin/python`; by default this one.
        options: Arguments of the reward, JSON values.
        takes: What the reward takes.
        timeout: Seconds that starting, and every call, may take.
        device: Where the worker computes, such as "cuda:1".
        class_names: Prompts that stand for class labels.
        name: Name in logs and errors; by default the reward's.

    Raises:
        ValueError: The interpreter or the class is missing, or an option does not fit.
    """

    def __init__(
        self,
        reward: str,
        *,
        python: str | Path = sys.executable,
        options: Mapping[str, Any] | None = None,
        takes: Literal["prompts", "labels", "any"] = "prompts",
        timeout: float = 300.0,
        device: str = "cpu",
        class_names: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name or reward.rpartition(".")[2], class_names=class_names)
        if not timeout > 0:
            raise ValueError(f"timeout: expected a number of seconds above 0, got {timeout}")
        if not Path(python).is_file():
            raise ValueError(f"python: expected an interpreter, got '{python}'")
        self.takes = takes
        self._worker = _Worker(
            Path(python), {"reward": reward, "options": dict(options or {}), "device": device}, timeout, self.name
        )
        self._worker.start()

    def forward(self, images: Tensor, conditions: Conditions) -> Tensor:
        """Scores (B,), float32, on the images' device; see the reward for the rest."""
        given = conditions.tolist() if isinstance(conditions, Tensor) else list(conditions)
        return score_with_gradient(images, lambda pixels, wanted: self._worker.score(pixels, given, gradient=wanted))

    def close(self) -> None:
        """End the worker; the next call starts another."""
        self._worker.stop()


class _Worker:
    """The other process, and the memory shared with it."""

    def __init__(self, python: Path, build: Mapping[str, Any], timeout: float, name: str) -> None:
        self._python, self._build, self._timeout, self._name = python, dict(build), timeout, name
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: _SharedMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_memory": None}

    def __deepcopy__(self, memo: Any) -> "_Worker":
        return _Worker(self._python, self._build, self._timeout, self._name)

    def start(self) -> None:
        """Start the process and build the reward in it."""
        self.stop()
        self._memory = _SharedMemory()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        try:
            self._process = subprocess.Popen(
                [str(self._python), str(_WORKER), str(self._memory.descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._memory.descriptor],
                env=environment,
            )
        except OSError as error:
            raise ValueError(f"python: expected an interpreter, got '{self._python}' ({one_line(error)})") from error
        weakref.finalize(self, _end, self._process)
        try:
            self._ask({"command": "build", **self._build})
        except WorkerError:  # a process without a reward is of no use
            self.stop()
            raise

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            _end(self._process)
        self._process = None
        if self._memory is not None:
            self._memory.close()
        self._memory = None

    def score(self, images: Tensor, conditions: list[Any], *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Scores (B,) and, if asked for, d score_i / d image_i (B, 3, H, W), both float32 on the CPU."""
        pixels = images.to("cpu", torch.float32).contiguous()
        request = {"command": "score", "shape": list(pixels.shape), "conditions": conditions, "gradient": gradient}
        try:
            return self._exchange(pixels, request)
        except _DiedError:
            # Once: what kills it twice would kill it for ever.
            self.start()
        try:
            return self._exchange(pixels, request)
        except _DiedError as error:
            self.stop()
            raise WorkerError(f"reward {self._name}: expected a worker that lives, got one that died twice") from error

    def _exchange(self, pixels: Tensor, request: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        if self._process is None or self._memory is None:
            self.start()
        assert self._memory is not None
        size = 2 * pixels.numel() * 4
        try:
            self._memory.fit(size)
        except OSError as error:
            raise WorkerError(
                f"reward {self._name}: expected {size / 2**20:.0f} MiB of shared memory for {len(pixels)} images, got "
                f"an error ({one_line(error)}; fewer at a time take less)"
            ) from error
        self._memory.tensor(pixels.shape, offset=0).copy_(pixels)
        answer = self._ask({**request, "bytes": self._memory.size})
        gradient = self._memory.tensor(pixels.shape, offset=4 * pixels.numel()).clone() if request["gradient"] else None
        return torch.tensor(answer["scores"], dtype=torch.float32), gradient

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        body = json.dumps(request).encode()
        try:
            self._process.stdin.write(_HEADER.pack(len(body)) + body)
            self._process.stdin.flush()
            (length,) = _HEADER.unpack(self._read(_HEADER.size))
            answer: dict[str, Any] = json.loads(self._read(length))
        except (BrokenPipeError, EOFError) as error:
            self.stop()
            if request["command"] == "build":
                raise WorkerError(
                    f"reward {self._name}: expected {self._python} to run the worker, got one that died at the start"
                ) from error
            raise _DiedError from error
        if "error" in answer:
            raise WorkerError(f"reward {self._name}: {answer['error']}")
        return answer

    def _read(self, count: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, parts = self._process.stdout.fileno(), bytearray()
        while len(parts) < count:
            ready, _, _ = select.select([descriptor], [], [], self._timeout)
            if not ready:
                self.stop()
                raise WorkerError(
                    f"reward {self._name}: expected an answer within {self._timeout:g} s, got none (see timeout)"
                )
            chunk = os.read(descriptor, count - len(parts))
            if not chunk:
                raise EOFError
            parts += chunk
        return bytes(parts)


class _DiedError(Exception):
    """The worker ended before it answered."""


class _SharedMemory:
    """Memory behind a file that has no name: it is gone when the last process that holds it is."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(  # noqa: SIM115 - closed by close()
            dir=_SHARED if _SHARED.is_dir() else None
        )
        self.descriptor = self._file.fileno()
        self.size = 0
        self._map: mmap.mmap | None = None

    def fit(self, size: int) -> None:
        """Make room for so many bytes.

        Raises:
            OSError: There is not so much memory.
        """
        if size <= self.size:
            return
        if hasattr(os, "posix_fallocate"):
            # What is promised and not there would end the process that writes to it.
            os.posix_fallocate(self.descriptor, 0, size)
        else:
            os.ftruncate(self.descriptor, size)
        self._map, self.size = mmap.mmap(self.descriptor, size), size

    def tensor(self, shape: Sequence[int], *, offset: int) -> Tensor:
        """A float32 tensor over the bytes from `offset` on."""
        assert self._map is not None
        count = int(torch.tensor(list(shape)).prod())
        return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=offset).view(*shape)

    def close(self) -> None:
        """Let go of it."""
        self._map = None
        self._file.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    if process.poll() is None:
        process.kill()
    process.wait()
