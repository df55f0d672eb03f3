"""Tokens that are numbers of several bits, read as groups of bits (MaskBit, arXiv 2409.16211).

Bit j of an id, the lowest first, stands for channel j of a latent: 1 for above 0, else -1. Group g of G holds the bits
g b to (g + 1) b - 1.

Shape legend: L tokens, G groups a token, b bits a group, N = L G sites, C = 2^b codes a site.
"""

import torch
from torch import Tensor


def code_bits(bits: int) -> Tensor:
    """The bits of the codes 0 to 2^bits - 1, one code a row: (2^bits, bits) of -1 and 1, float32."""
    return 2.0 * (_places(torch.arange(2**bits).unsqueeze(-1), bits) & 1) - 1.0


def ids_of_bits(latents: Tensor) -> Tensor:
    """The ids (...) int64 of latents (..., bits): a bit is set where the latent is above 0."""
    return combine_ids((latents > 0).long(), bits=latents.shape[-1])


def split_ids(ids: Tensor, *, bits: int, groups: int) -> Tensor:
    """The codes of the groups, (..., G) in [0, C), of ids (...) in [0, 2^bits)."""
    size = bits // groups
    return _places(ids.unsqueeze(-1), groups, step=size).bitwise_and(2**size - 1)


def combine_ids(codes: Tensor, *, bits: int) -> Tensor:
    """The ids (...) int64 in [0, 2^bits) of codes (..., G) in [0, C); the inverse of `split_ids`."""
    groups = codes.shape[-1]
    places = torch.arange(groups, device=codes.device) * (bits // groups)
    return (codes.long() << places).sum(dim=-1)


def check_groups(bits: int, groups: int, *, key: str) -> int:
    """The bits of a group.

    Raises:
        ValueError: If the groups do not divide the bits.
    """
    if bits < 1 or groups < 1 or bits % groups:
        raise ValueError(f"{key}.codebook_splits: expected a divisor of the {bits} bits, got {groups}")
    return bits // groups


def _places(ids: Tensor, count: int, *, step: int = 1) -> Tensor:
    """Ids (..., 1) shifted down to the places 0, step, 2 step, ...: (..., count)."""
    return ids >> torch.arange(0, count * step, step, device=ids.device)
