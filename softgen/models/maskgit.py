"""MaskGIT for ImageNet in PyTorch (arXiv 2310.14400, its first version).

Shape legend: B batch, N image tokens, V image codes, C classes, d width.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softgen.categorical import check_token_range
from softgen.checkpoints import build, read_checkpoint
from softgen.models.base import MaskedDiffusionModel, ModelOutput
from softgen.models.conditions import ClassCondition, Condition
from softgen.relaxation import expected_embedding

_DOWNSCALE = 16  # of its tokenizer, VQGAN f16
_LAYER = "transformer.layers.{}.0.norm.weight"


class _Attention(nn.Module):
    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, *, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class _PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fn(self.norm(x))
        return out


class _Encoder(nn.Module):
    def __init__(self, width: int, *, depth: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _PreNorm(width, _Attention(width, heads=heads, dropout=dropout)),
                    _PreNorm(width, _FeedForward(width, inner, dropout=dropout)),
                ]
            )
            for _ in range(depth)
        )


class MaskGIT(MaskedDiffusionModel):
    """Bidirectional transformer over one table of image codes, mask, classes and the null class; the class comes last.

    The output layer is tied to that table. The published model gives the mask a column of its own in the softmax;
    here logits are over the V image codes alone, and `published_logits` has that column.

    The defaults are those of the published checkpoints but for dropout, 0.1 when the teacher was trained.

    Args:
        img_size: Pixels a side; N = (img_size / 16)^2.
        hidden_dim: d.
        codebook_size: V.
        depth: Number of blocks.
        heads: Attention heads; divides `hidden_dim`.
        mlp_dim: Inner width of the feed-forward.
        dropout: In [0, 1).
        nclass: C.
        checkpoint_activations: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If the heads do not divide the width, or the image size is no multiple of 16.
    """

    def __init__(
        self,
        *,
        img_size: int = 256,
        hidden_dim: int = 768,
        codebook_size: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_dim: int = 3072,
        dropout: float = 0.0,
        nclass: int = 1000,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or hidden_dim % heads:
            raise ValueError(f"model.heads: expected a divisor of the width {hidden_dim}, got {heads}")
        if img_size < _DOWNSCALE or img_size % _DOWNSCALE:
            raise ValueError(f"model.img_size: expected a multiple of {_DOWNSCALE}, got {img_size}")
        self.config = {
            "img_size": img_size,
            "hidden_dim": hidden_dim,
            "codebook_size": codebook_size,
            "depth": depth,
            "heads": heads,
            "mlp_dim": mlp_dim,
            "dropout": dropout,
            "nclass": nclass,
            "checkpoint_activations": checkpoint_activations,
        }
        self.num_codes = self.mask_id = codebook_size
        self.num_sites = self.num_tokens = (img_size // _DOWNSCALE) ** 2
        self.num_classes, self.num_layers, self.embedding_dim = nclass, depth, hidden_dim
        self.has_null_condition = True
        self.checkpoint_activations = checkpoint_activations

        rows = codebook_size + 1 + nclass + 1
        self.tok_emb = nn.Embedding(rows, hidden_dim)
        self.pos_emb = nn.Parameter(torch.empty(1, self.num_sites + 1, hidden_dim))
        self.bias = nn.Parameter(torch.zeros(self.num_sites + 1, rows))
        self.first_layer = nn.Sequential(
            nn.LayerNorm(hidden_dim, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
        )
        self.transformer = _Encoder(hidden_dim, depth=depth, heads=heads, inner=mlp_dim, dropout=dropout)
        self.last_layer = nn.Sequential(
            nn.LayerNorm(hidden_dim, eps=1e-12),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.LayerNorm(hidden_dim, eps=1e-12),
        )
        for weight in (self.tok_emb.weight, self.pos_emb):
            nn.init.trunc_normal_(weight, std=0.02)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "model",
        img_size: int | None = None,
        heads: int = 16,
        nclass: int = 1000,
        dropout: float = 0.0,
        checkpoint_activations: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "MaskGIT":
        """Open a published checkpoint, or a student of Di[M]O's authors, which has the same layout.

        Args:
            source: `MaskGIT_ImageNet_256.pth`, `pytorch_model.bin`, or a folder or hub id that holds the latter.
            key: The config key that named it, for error messages.
            img_size: Checked against the checkpoint, which fixes it.
            heads: Shapes do not tell it: 16 in the published ones.
            nclass: C; the rest of the table are the image codes.
            dropout: While it is trained.
            checkpoint_activations: As of the class.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family, or the options contradict it.
        """
        state = read_checkpoint(source, key=key, names=("pytorch_model.bin", "model.safetensors"))
        arguments = _sizes(state, nclass=nclass, key=key)
        if img_size is not None and arguments.get("img_size", img_size) != img_size:
            raise ValueError(f"{key}.img_size: expected {arguments['img_size']} as the checkpoint, got {img_size}")
        options = {"heads": heads, "dropout": dropout, "checkpoint_activations": checkpoint_activations}
        return build(cls, {**arguments, **options}, state, key=key, dtype=dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class; an id above the mask would be a class."""
        check_token_range(tokens, self.mask_id)
        embedded: Tensor = self.tok_emb(tokens)
        return embedded

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the base class."""
        table = self.tok_emb.weight
        soft = expected_embedding(probs, table[: self.num_codes])
        return soft if mask is None else torch.where(mask.unsqueeze(-1), table[self.mask_id], soft)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """What Di[M]O's authors keep frozen: the table, with it the output layer, its bias, and the positions."""
        return [*self.tok_emb.parameters(), self.bias, self.pos_emb]

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """See the base class. Tapped hidden states are those of the image tokens."""
        logits, hidden = self._run(embeddings, condition, taps, columns=self.num_codes)
        return ModelOutput(logits=logits, hidden=hidden)

    def published_logits(self, embeddings: Tensor, condition: Condition) -> Tensor:
        """Logits (B, N, V + 1), the last one that of the mask, as the published softmax has them."""
        return self._run(embeddings, condition, (), columns=self.num_codes + 1)[0]

    def _run(
        self, embeddings: Tensor, condition: Condition, taps: Sequence[int], *, columns: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert isinstance(condition, ClassCondition)
        first = self.num_codes + 1
        labels = first + condition.labels.masked_fill(condition.dropped, self.num_classes)
        x = torch.cat([embeddings, self.tok_emb(labels).unsqueeze(1).to(embeddings.dtype)], dim=1) + self.pos_emb
        x = self.first_layer(x)
        hidden: dict[int, Tensor] = {}
        for layer, block in enumerate(self.transformer.layers):
            assert isinstance(block, nn.ModuleList)
            for part in block:
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(part, x, use_reentrant=False)
                else:
                    x = part(x)
            if layer in taps:
                hidden[layer] = x[:, : self.num_sites]
        x = self.last_layer(x[:, : self.num_sites])
        logits = nn.functional.linear(x, self.tok_emb.weight[:columns]) + self.bias[: self.num_sites, :columns]
        return logits, tuple(hidden[tap] for tap in taps)


def _sizes(state: dict[str, Tensor], *, nclass: int, key: str) -> dict[str, int]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    names = ("tok_emb.weight", "pos_emb", "transformer.layers.0.1.fn.net.0.weight")
    if not all(name in state for name in names):
        return {"nclass": nclass}
    table, positions, inner = (state[name] for name in names)
    codes = table.shape[0] - nclass - 2
    side = math.isqrt(positions.shape[1] - 1)
    if codes < 1 or side * side != positions.shape[1] - 1:
        raise ValueError(f"{key}.nclass: expected fewer than the {table.shape[0]} rows of the table, got {nclass}")
    return {
        "img_size": _DOWNSCALE * side,
        "hidden_dim": table.shape[1],
        "codebook_size": codes,
        "depth": next(depth for depth in range(len(state)) if _LAYER.format(depth) not in state),
        "mlp_dim": inner.shape[0],
        "nclass": nclass,
    }
