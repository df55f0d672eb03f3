"""Random draws that depend on the seed and the sample, never on the process or on interruptions.

Every training sample has an *ordinal*: its number in the global order of samples that a run consumes. All noise
of a sample comes from a generator seeded by (seed, ordinal), so that a resumed run, and the same global batch on
another number of processes, see the same draws.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into one 63-bit seed; the same on every platform and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleRandom:
    """Independent random streams, one a sample of a batch.

    Args:
        seed: The run's seed.
        ordinals: One number a sample, its place in the run's global order of samples. Length B.
        device: Where the draws are made.

    Draws are consumed in the order of the calls: two objects made from the same arguments give the same tensors.
    """

    def __init__(self, seed: int, ordinals: Sequence[int], *, device: torch.device) -> None:
        self.device = device
        self._generators = [
            torch.Generator(device=device).manual_seed(derive_seed(seed, ordinal)) for ordinal in ordinals
        ]

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), shape (B, *shape), float32."""
        return self._draw(torch.Tensor.uniform_, shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws, shape (B, *shape), float32."""
        return self._draw(torch.Tensor.normal_, shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), shape (B, *shape), int64."""
        return (self.uniform(*shape) * high).long().clamp_(max=high - 1)

    def _draw(self, fill_: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(len(self), *shape, dtype=torch.float32, device=self.device)
        for row, generator in zip(out.unbind(0), self._generators, strict=True):
            fill_(row, generator=generator)
        return out
