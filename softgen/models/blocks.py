"""Transformer blocks with SDPA attention and adaptive normalisation (DiT, arXiv 2212.09748)."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "relu", "silu"]
_FLAT = 1e-6  # of the largest variance; a direction of less is none
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name.

    Raises:
        ValueError: If it is unknown.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {name!r}")
    return _ACTIVATIONS[name]


class KeyValueCache:
    """Keys and values of the positions that one attention layer has seen, for sampling one position at a time.

    Args:
        capacity: Positions that there is room for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, heads, l, d / heads); returns all so far, (B, heads, length, d / heads)."""
        if self._keys is None or self._values is None:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        end = self.length + key.shape[2]
        assert end <= self.capacity
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class SelfAttention(nn.Module):
    """Multi-head attention.

    Args:
        width: Model width d, a multiple of `heads`.
        heads: Attention heads.
        causal: Whether a position sees itself and those before it alone.
    """

    def __init__(self, width: int, *, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Map (B, L, d) to (B, L, d); with a cache, x is the next position alone (L = 1) and sees those before it."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            assert length == 1
            key, value = cache.append(key, value)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal and cache is None)
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return mixed


class CrossAttention(nn.Module):
    """Multi-head attention over another sequence.

    Args:
        width: Model width d, a multiple of `heads`.
        heads: Attention heads.
        context_width: c, of the vectors looked at.
    """

    def __init__(self, width: int, *, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d), looking at context (B, T, c) where the mask (B, T) is True."""
        batch, _, width = x.shape
        query = self.query(x).view(batch, -1, self.heads, width // self.heads).transpose(1, 2)
        pairs = self.key_value(context).view(batch, -1, 2, self.heads, width // self.heads)
        key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(batch, -1, width))
        return mixed


class FeedForward(nn.Module):
    """Linear, activation, linear.

    Args:
        width: Model width d.
        hidden: Inner width.
        activation: Name of the activation.
    """

    def __init__(self, width: int, *, hidden: int, activation: str) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.project = nn.Linear(hidden, width)
        self.activation = activation_function(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, d) to (B, L, d)."""
        fed: Tensor = self.project(self.activation(self.expand(x)))
        return fed


class LocalMixing(nn.Module):
    """Each site takes from its eight neighbours on the grid: a 3x3 depthwise convolution, added to the input.

    What lies beside what is then given from the first step, where attention has to learn it from positions.

    Args:
        width: Model width d.
        grid: Sites a side.
    """

    def __init__(self, width: int, *, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width)
        nn.init.normal_(self.convolution.weight, std=0.1)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, grid^2, d), row-major, to (B, grid^2, d)."""
        batch, _, width = x.shape
        mixed: Tensor = self.convolution(x.transpose(1, 2).reshape(batch, width, self.grid, self.grid))
        return x + mixed.flatten(2).transpose(1, 2)


class Modulation(nn.Module):
    """Shifts, scales and gates from the condition; starts as the identity (scale 1, gate 1, shift 0).

    Args:
        width: Model width d.
        chunks: How many vectors of width d to produce.
    """

    def __init__(self, width: int, *, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map (B, d) to `chunks` tensors of shape (B, 1, d)."""
        modulations: Tensor = self.linear(F.silu(condition)).unsqueeze(1)
        return modulations.chunk(self.chunks, dim=-1)


def modulate(x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """X (1 + scale) + shift, with x of shape (B, L, d) and the others (B, 1, d)."""
    return torch.addcmul(shift, x, 1 + scale)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each modulated by the condition.

    Args:
        width: Model width d.
        heads: Attention heads.
        mlp_ratio: Inner width of the feed-forward as a multiple of d.
        activation: Name of the feed-forward's activation.
        causal: Whether a position sees itself and those before it alone.
        context_width: c, of the text states that the block looks at between the two; 0 for a block without.
        mixing_grid: Sites a side of the grid on which `LocalMixing` precedes the feed-forward; 0 for a block without.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        mlp_ratio: float,
        activation: str,
        causal: bool = False,
        context_width: int = 0,
        mixing_grid: int = 0,
    ) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, heads=heads, causal=causal)
        if context_width:
            self.norm_context = nn.LayerNorm(width, eps=1e-6)
            self.context_attention = CrossAttention(width, heads=heads, context_width=context_width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mixing = LocalMixing(width, grid=mixing_grid) if mixing_grid else nn.Identity()
        self.mlp = FeedForward(width, hidden=int(width * mlp_ratio), activation=activation)
        self.modulation = Modulation(width, chunks=6)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        cache: KeyValueCache | None = None,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map x (B, L, d) under the condition (B, d) to (B, L, d).

        Args:
            x: (B, L, d).
            condition: What modulates the block, (B, d).
            cache: See `SelfAttention`.
            context: Of a block with `context_width`: text states (B, T, c) and their mask (B, T).
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition)
        attended = self.attention(modulate(self.norm_attention(x), shift=shift_a, scale=scale_a), cache)
        x = torch.addcmul(x, 1 + gate_a, attended)
        if context is not None:
            x = x + self.context_attention(self.norm_context(x), *context)
        fed = self.mlp(self.mixing(modulate(self.norm_mlp(x), shift=shift_m, scale=scale_m)))
        return torch.addcmul(x, 1 + gate_m, fed)


def check_transformer(
    *, num_codes: int, num_sites: int, num_classes: int, width: int, depth: int, heads: int, activation: str
) -> None:
    """Refuse impossible sizes.

    Raises:
        ValueError: Naming the argument, what was expected and what was got.
    """
    for name, value in (("num_codes", num_codes), ("num_sites", num_sites), ("depth", depth), ("heads", heads)):
        if value < 1:
            raise ValueError(f"model.{name}: expected at least 1, got {value}")
    if num_classes < 0:
        raise ValueError(f"model.num_classes: expected at least 0, got {num_classes}")
    if width < 1 or width % heads:
        raise ValueError(f"model.width: expected a multiple of heads ({heads}), got {width}")
    activation_function(activation)


def reset_transformer(blocks: nn.ModuleList, head: nn.Linear) -> None:
    """Fresh weights of the blocks' linear layers and of the output layer; modulations keep their identity start."""
    for block in blocks:
        assert isinstance(block, TransformerBlock)
        for linear in block.modules():
            if isinstance(linear, nn.Linear) and linear is not block.modulation.linear:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)


def whiten(vectors: Tensor) -> Tensor:
    """The vectors with mean 0 and uncorrelated dimensions of variance 1, turned as little as possible (ZCA).

    What few vectors differ in then counts as much as what most of them do. Directions that hardly any vector takes, of
    less than a millionth of the largest variance, are left out rather than blown up.

    Args:
        vectors: (K, D), K at least 2; computed in float64 on the CPU.
    """
    centred = vectors.cpu().double()
    centred = centred - centred.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.mT @ centred / len(centred))
    scales = torch.where(variances > _FLAT * variances[-1], variances, torch.inf).rsqrt()
    whitened: Tensor = centred @ (directions * scales) @ directions.mT
    return whitened.to(vectors)


@torch.no_grad()
def start_from_codebook(
    rows: Tensor, codebook: Tensor, *, whitened: bool, scale: float, generator: torch.Generator
) -> None:
    """Start one vector a code, in place, as a random projection of the code vectors.

    Near codes then look alike from the first step. With random rows a model must learn each code by itself, and of many
    codes it sees each too seldom.

    Args:
        rows: (at least K, d), of the token embeddings or of the output layer; the first K are replaced.
        codebook: (K, D).
        whitened: Project what `whiten` makes of the code vectors.
        scale: Standard deviation of the values; their mean over the codes is 0.
        generator: Of the projection, on the CPU.
    """
    vectors = codebook.float()
    vectors = whiten(vectors) if whitened else vectors - vectors.mean(dim=0)
    projection = torch.randn(vectors.shape[1], rows.shape[1], generator=generator)
    projected = vectors @ projection.to(vectors.device)
    rows[: len(projected)] = (scale / projected.std() * projected).to(rows)
