"""The other side of `rewards.isolated`: run as a script by an interpreter that need not have this package installed.

It finds the package `rewards` beside itself and nothing else there, so that its environment's packages stay its own.
Messages are a length in 8 bytes and JSON, on stdin and stdout; what libraries print goes to stderr.
"""

import importlib.util
import json
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<q")


def _find_package() -> None:
    """Make `import rewards` find the folder of this file."""
    folder = Path(__file__).resolve().parent
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        "rewards", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rewards"] = module
    spec.loader.exec_module(module)


def _die_with_parent(parent: int) -> None:
    """End this process when its parent is gone, in the middle of a computation too."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Served:
    """The reward, and the memory that images come in."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._size = 0
        self._reward: Any = None
        self._device = "cpu"

    def build(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build the reward."""
        from rewards.registry import build

        self._device = request["device"]
        self._reward = build(request["reward"], **request["options"]).to(self._device)
        return {}

    def score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Score a batch; the gradient is left behind the images."""
        import torch

        assert self._reward is not None
        if request["bytes"] != self._size:
            self._map, self._size = mmap.mmap(self._descriptor, request["bytes"]), request["bytes"]
        shape, count = request["shape"], 1
        for side in shape:
            count *= side
        if 8 * count > self._size:
            raise ValueError(f"shape: expected images of at most {self._size // 8} numbers, got {shape}")
        pixels = torch.frombuffer(self._map, dtype=torch.float32, count=count).view(*shape)
        images = pixels.clone().to(self._device).requires_grad_(request["gradient"])
        conditions = request["conditions"]
        if conditions and isinstance(conditions[0], int):
            conditions = torch.tensor(conditions, device=self._device)
        with torch.set_grad_enabled(request["gradient"]):
            scores = self._reward(images, conditions)
        if request["gradient"]:
            (gradient,) = torch.autograd.grad(scores.sum(), images)
            torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=4 * count).copy_(gradient.flatten())
        return {"scores": scores.detach().float().tolist()}


def main() -> None:
    """Answer until stdin ends."""
    _die_with_parent(os.getppid())
    incoming, outgoing = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the messages
    _find_package()
    served = _Served(int(sys.argv[1]))
    while header := incoming.read(_HEADER.size):
        request = json.loads(incoming.read(_HEADER.unpack(header)[0]))
        try:
            answer = served.build(request) if request["command"] == "build" else served.score(request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        body = json.dumps(answer).encode()
        outgoing.write(_HEADER.pack(len(body)) + body)
        outgoing.flush()


if __name__ == "__main__":
    main()
