"""Parts that published tokenizers share.

Shape legend: B batch, V codes, D code dimension, h and w of a grid.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.relaxation import DENSE_LIMIT, full_precision, widen

NORM_GROUPS = 32
_TEXT = ("text_length", "text_width")  # of a decoder that looks at the text


def as_weights(values: Tensor, module: nn.Module) -> Tensor:
    """The values in the type of a module's weights: a checkpoint opened in half precision takes ordinary images too."""
    return values.to(next(module.parameters()).dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class OutputShortcutBlock(nn.Module):
    """A residual block whose published shortcut, where channels change, takes the block's own output.

    Args:
        before: Channels in.
        after: Channels out.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = group_norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        if before != after:
            self.nin_shortcut = nn.Conv2d(after, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, h, w) to (B, after, h, w)."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class CodeTable(nn.Module):
    """A table of code vectors under the name that published checkpoints give it.

    Args:
        codes: V.
        dim: D.
    """

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """Nearest rows of a codebook (V, D) to latents (..., D) by squared distance; (...) int64.

    Of equals the first, as far as float32's rounding leaves them equal: copies of a code may round apart.
    """
    with full_precision(latents):
        codes = widen(codebook)
        squares = codes.square().sum(dim=-1)
        return by_rows(lambda z: (squares - 2 * (z @ codes.T)).argmin(dim=-1), widen(latents), num_codes=len(codes))


def by_rows(nearest: Callable[[Tensor], Tensor], latents: Tensor, *, num_codes: int) -> Tensor:
    """The codes (...) of latents (..., D), of so few at a time that no large (latents x codes) matrix is made.

    Args:
        nearest: Codes (n,) of latents (n, D).
        latents: (..., D).
        num_codes: V.
    """
    parts = torch.split(latents.flatten(0, -2), max(1, DENSE_LIMIT // num_codes))
    return torch.cat([nearest(part) for part in parts]).reshape(latents.shape[:-1])


def without_clash(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint whose module `quantize` is called `quantizer`: to quantise is what a tokenizer does."""
    return {
        name.replace("quantize.", "quantizer.", 1) if name.startswith("quantize.") else name: value
        for name, value in state.items()
    }


def grid_factor(widths: Sequence[int], *, key: str, image_size: int, groups: int = NORM_GROUPS, **counts: int) -> int:
    """How many pixels a side a cell of a convolutional tokenizer's grid has: each level but the first halves the side.

    Args:
        widths: Channels of the levels.
        key: The argument that makes them, for error messages.
        image_size: Pixels a side.
        groups: Of the group norms.
        counts: What must be at least 1, such as the number of codes.

    Raises:
        ValueError: Naming the argument that does not fit.
    """
    if not widths:
        raise ValueError(f"tokenizer.{key}: expected at least one level, got none")
    factor: int = 2 ** (len(widths) - 1)
    if image_size < factor or image_size % factor:
        raise ValueError(f"tokenizer.image_size: expected a multiple of {factor}, got {image_size}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"tokenizer.{name}: expected at least 1, got {value}")
    for width in widths:
        if width < 1 or width % groups:
            raise ValueError(f"tokenizer.{key}: expected levels of a multiple of {groups} channels, got {width}")
    return factor


def check_vit_sizes(sizes: Mapping[str, Mapping[str, int]], *, image_size: int, **counts: int) -> None:
    """Refuse transformers, by their part of the tokenizer, whose `heads` or `patch_size` do not fit.

    Args:
        sizes: `width`, `depth`, `heads` and `patch_size` of each part.
        image_size: Pixels a side.
        counts: What else must be at least 1, such as the number of codes.

    Raises:
        ValueError: Naming the part, or the count.
    """
    names = ("width", "depth", "heads", "patch_size")
    for part, values in sizes.items():
        if unknown := next((name for name in values if name not in (*names, *_TEXT)), None):
            raise ValueError(f"tokenizer.{part}: expected {', '.join(names)}, got {unknown}")
    of_parts = {f"{part}.{name}": values[name] for part, values in sizes.items() for name in names}
    for name, value in {"image_size": image_size, **counts, **of_parts}.items():
        if value < 1:
            raise ValueError(f"tokenizer.{name}: expected at least 1, got {value}")
    for part, values in sizes.items():
        width, heads, patch = values["width"], values["heads"], values["patch_size"]
        if width % heads:
            raise ValueError(f"tokenizer.{part}.heads: expected a divisor of {width}, got {heads}")
        if image_size % patch:
            raise ValueError(
                f"tokenizer.image_size: expected a multiple of the {part}'s patch, {patch}, got {image_size}"
            )
