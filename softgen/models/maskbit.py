"""MaskBit: a masked diffusion model over groups of bits (arXiv 2409.16211).

Shape legend: B batch, L tokens, G groups a token, N = L G sites, K bits a token, C = 2^(K / G) codes a site, D width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softgen.bits import check_groups, code_bits
from softgen.categorical import check_token_range
from softgen.checkpoints import build, read_checkpoint
from softgen.models.base import MaskedDiffusionModel, ModelOutput
from softgen.models.conditions import ClassCondition, Condition
from softgen.relaxation import expected_embedding

Embedding = Literal["bits", "projection"]
_EPS = 1e-12
_WIDTHS = (10, 12, 14, 16, 18)
_FILES = ("model.safetensors", "pytorch_model.bin", *(f"maskbit_generator_{bits}bit.bin" for bits in _WIDTHS))


class _Residual(nn.Module):
    """A sublayer with a shortcut, normalised after the sum, or before the sublayer."""

    def __init__(self, width: int, *, dropout: float, prenorm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.prenorm = prenorm

    def sublayer(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.dropout(self.sublayer(self.norm(x) if self.prenorm else x))
        return added if self.prenorm else self.norm(added)


class _Attention(_Residual):
    def __init__(self, width: int, *, heads: int, dropout: float, prenorm: bool) -> None:
        super().__init__(width, dropout=dropout, prenorm=prenorm)
        self.mha = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def sublayer(self, x: Tensor) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return out


class _FeedForward(_Residual):
    def __init__(self, width: int, inner: int, *, dropout: float, prenorm: bool) -> None:
        super().__init__(width, dropout=dropout, prenorm=prenorm)
        self.net = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def sublayer(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class _Encoder(nn.Module):
    def __init__(self, width: int, *, depth: int, heads: int, inner: int, dropout: float, prenorm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Attention(width, heads=heads, dropout=dropout, prenorm=prenorm),
                    _FeedForward(width, inner, dropout=dropout, prenorm=prenorm),
                ]
            )
            for _ in range(depth)
        )


class MaskBit(MaskedDiffusionModel):
    """BERT over bits: a token is K numbers of -1 and 1, in G groups that are masked and predicted on their own.

    A site is a group: N = L G, token by token, and the codes of a site are the C values of its bits. A masked group is
    zeros, so that expected bits, the family's soft embedding, shrink towards "masked" as they grow uncertain.

    By default the embedding that the outside sees is the K bits (d = K), and the projection to D is the network's first
    layer. Nothing is lost: the projection is affine, so that the expectation is the same on either side of it. And
    much is gained: bits are of unit scale, as Di[M]O's variance-preserving noise presumes and a learned projection is
    not, and they are what the tokenizer decodes, so that the two soft paths share them. With
    `embedding="projection"` noise and test-time optimisation act after the projection (d = D), as in the families
    whose embedding is a table.

    The defaults are those of the published 14-bit checkpoint but for dropout, 0.1 when the teacher was trained.

    Args:
        img_size: Pixels a side; L = (img_size / input_stride)^2.
        input_stride: Pixels a side of a token.
        bits: K.
        codebook_splits: G, a divisor of K.
        hidden_dim: D.
        depth: Number of blocks.
        heads: Attention heads, a divisor of D.
        mlp_dim: Inner width of the feed-forward.
        dropout: In [0, 1).
        nclass: Classes; 0 for an unconditional model.
        use_prenorm: Normalise before each sublayer and once at the end, instead of after each sublayer.
        embedding: `bits` or `projection`: what `embed` gives.
        checkpoint_activations: Recompute each sublayer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If a size does not divide another.
    """

    codes: Tensor

    def __init__(
        self,
        *,
        img_size: int = 256,
        input_stride: int = 16,
        bits: int = 14,
        codebook_splits: int = 2,
        hidden_dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_dim: int = 4096,
        dropout: float = 0.0,
        nclass: int = 1000,
        use_prenorm: bool = False,
        embedding: Embedding = "bits",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or hidden_dim % heads:
            raise ValueError(f"model.heads: expected a divisor of the width {hidden_dim}, got {heads}")
        if input_stride < 1 or img_size < input_stride or img_size % input_stride:
            raise ValueError(f"model.img_size: expected a multiple of the stride {input_stride}, got {img_size}")
        if embedding not in get_args(Embedding):
            raise ValueError(f"model.embedding: expected bits or projection, got {embedding!r}")
        self.config = {
            "img_size": img_size,
            "input_stride": input_stride,
            "bits": bits,
            "codebook_splits": codebook_splits,
            "hidden_dim": hidden_dim,
            "depth": depth,
            "heads": heads,
            "mlp_dim": mlp_dim,
            "dropout": dropout,
            "nclass": nclass,
            "use_prenorm": use_prenorm,
            "embedding": embedding,
            "checkpoint_activations": checkpoint_activations,
        }
        group_bits = check_groups(bits, codebook_splits, key="model")
        self.num_codes = self.mask_id = 2**group_bits
        self.num_tokens = (img_size // input_stride) ** 2
        self.num_sites = self.num_tokens * codebook_splits
        self.num_classes, self.num_layers = nclass, depth
        self.has_null_condition = nclass > 0
        self.projects_inside = embedding == "bits"
        self.embedding_dim = bits if self.projects_inside else hidden_dim
        self.checkpoint_activations = checkpoint_activations

        self.register_buffer("codes", _site_bits(group_bits), persistent=False)
        self.input_proj = nn.Linear(bits, hidden_dim)
        self.class_emb = nn.Embedding(nclass + 1, hidden_dim)
        self.pos_emb = nn.Parameter(torch.empty(1, self.num_tokens + 1, hidden_dim))
        self.first_layer = nn.Sequential(nn.LayerNorm(hidden_dim, eps=_EPS), nn.Dropout(dropout))
        self.transformer = _Encoder(
            hidden_dim, depth=depth, heads=heads, inner=mlp_dim, dropout=dropout, prenorm=use_prenorm
        )
        if use_prenorm:
            self.norm_after_transformer = nn.LayerNorm(hidden_dim, eps=_EPS)
        self.last_layer = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim, eps=_EPS)
        )
        self.prediction_layer = nn.Linear(hidden_dim, codebook_splits * self.num_codes)
        self._reset()

    def _reset(self) -> None:
        """BERT's fresh weights (arXiv 1810.04805)."""
        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, *, key: str = "model", dtype: torch.dtype | None = None, **options: Any
    ) -> "MaskBit":
        """Open a published checkpoint; its sizes are read from it.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`, `pytorch_model.bin` or
                `maskbit_generator_10bit.bin` (or 12 to 18).
            key: The config key that named it, for error messages.
            dtype: Of the weights; None keeps the checkpoint's.
            **options: Arguments of the class. `heads` (16) and `input_stride` (16) show in no shape; those that do are
                checked against the checkpoint.

        Raises:
            ValueError: If the file is missing or of another family, or the options contradict it.
        """
        state = {_renamed(name): value for name, value in read_checkpoint(source, key=key, names=_FILES).items()}
        arguments = _sizes(state, options, key=key)
        for name, value in options.items():
            if arguments.get(name, value) != value:
                raise ValueError(f"{key}.{name}: expected {arguments[name]} as the checkpoint has, got {value}")
        return build(cls, {**arguments, **options}, state, key=key, dropped=("bits_to_indices",), dtype=dtype)

    def restore_buffers(self) -> None:
        """The bits of the codes."""
        size = self.config["bits"] // self.config["codebook_splits"]
        self.codes = _site_bits(size).to(self.input_proj.weight)

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class: the bits of every token, zeros where a group is masked."""
        check_token_range(tokens, self.mask_id)
        return self._fold(self.codes[tokens])

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the base class: expected bits; probabilities that sum to less than 1 leave the rest to the mask."""
        soft = expected_embedding(probs, self.codes[: self.num_codes])
        return self._fold(soft if mask is None else soft.masked_fill(mask.unsqueeze(-1), 0))

    def _fold(self, site_bits: Tensor) -> Tensor:
        """Bits of sites (B, N, K / G) to embeddings (B, L, d)."""
        bits = site_bits.reshape(len(site_bits), self.num_tokens, -1)
        return bits if self.projects_inside else self.input_proj(bits)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """The projection of the bits and the positions, wherever the projection is."""
        return [*self.input_proj.parameters(), self.pos_emb]

    @property
    def hidden_dim(self) -> int:
        """D."""
        return int(self.config["hidden_dim"])

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """See the base class. Tapped hidden states are those of the image tokens."""
        assert isinstance(condition, ClassCondition)
        x = self.input_proj(embeddings) if self.projects_inside else embeddings
        label = self.class_emb(condition.labels.masked_fill(condition.dropped, self.num_classes))
        x = self.first_layer(torch.cat([x, label.unsqueeze(1).to(x.dtype)], dim=1) + self.pos_emb)
        hidden: dict[int, Tensor] = {}
        for layer, block in enumerate(self.transformer.layers):
            assert isinstance(block, nn.ModuleList)
            for sublayer in block:
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(sublayer, x, use_reentrant=False)
                else:
                    x = sublayer(x)
            if layer in taps:
                hidden[layer] = x[:, : self.num_tokens]
        x = x[:, : self.num_tokens]
        if self.config["use_prenorm"]:
            x = self.norm_after_transformer(x)
        logits = self.prediction_layer(self.last_layer(x)).reshape(len(x), self.num_sites, self.num_codes)
        return ModelOutput(logits=logits, hidden=tuple(hidden[tap] for tap in taps))


def _site_bits(bits: int) -> Tensor:
    """The bits of a site's codes and, in the last row, those of the mask."""
    return torch.cat([code_bits(bits), torch.zeros(1, bits)])


def _renamed(name: str) -> str:
    """Older checkpoints call the projection a token embedding."""
    return f"input_proj{name.removeprefix('token_emb')}" if name.startswith("token_emb") else name


def _sizes(state: Mapping[str, Tensor], options: Mapping[str, Any], *, key: str) -> dict[str, Any]:
    """The constructor's arguments that the checkpoint tells, as far as it is of this family."""

    def shape(name: str, ndim: int = 2) -> tuple[int, ...] | None:
        return tuple(state[name].shape) if name in state and state[name].ndim == ndim else None

    sizes: dict[str, Any] = {"use_prenorm": "norm_after_transformer.weight" in state}
    if (projection := shape("input_proj.weight")) is not None:
        sizes["hidden_dim"], sizes["bits"] = projection
        if (prediction := shape("prediction_layer.weight")) is not None:
            sizes["codebook_splits"] = _splits(state, options, bits=projection[1], outputs=prediction[0], key=key)
    if (classes := shape("class_emb.weight")) is not None:
        sizes["nclass"] = classes[0] - 1
    if (inner := shape("transformer.layers.0.1.net.0.weight")) is not None:
        sizes["mlp_dim"] = inner[0]
    if (positions := shape("pos_emb", 3)) is not None:
        side = math.isqrt(positions[1] - 1)
        if side * side != positions[1] - 1:
            raise ValueError(f"{key}: expected positions of a square of tokens and a class, got {positions[1]}")
        sizes["img_size"] = side * options.get("input_stride", 16)
    layers = {int(part) for name in state if (part := _layer(name)).isdigit()}
    return {**sizes, "depth": len(layers)} if layers else sizes


def _layer(name: str) -> str:
    """The number of the block that a tensor belongs to, else an empty string."""
    return name.removeprefix("transformer.layers.").split(".")[0] if name.startswith("transformer.layers.") else ""


def _splits(state: Mapping[str, Tensor], options: Mapping[str, Any], *, bits: int, outputs: int, key: str) -> int:
    """G, from the size of the output layer, G 2^(K / G); groups of 1 and of 2 bits are told apart by a buffer."""
    fitting = [
        groups for groups in range(1, bits + 1) if bits % groups == 0 and groups * 2 ** (bits // groups) == outputs
    ]
    if not fitting:
        raise ValueError(f"{key}: expected m 2^({bits} / m) outputs for m groups of {bits} bits, got {outputs}")
    places = state.get("bits_to_indices")
    if places is not None:
        expected = [2**place for place in range(places.numel())]
        if places.tolist() != expected or bits // max(1, places.numel()) not in fitting:
            raise ValueError(
                f"{key}.bits_to_indices: expected the powers of 2 of a group's bits, got {places.tolist()}"
            )
        return bits // places.numel()
    asked = options.get("codebook_splits")
    return int(asked) if asked in fitting else fitting[0]
