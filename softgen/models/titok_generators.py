"""The class-conditional masked diffusion models of TiTok (arXiv 2406.07550): ImageBert and UViTBert.

Both see [class, codes] and give no logits for the class. One table holds the codes, the mask, the classes and the null
class.

Shape legend: B batch, N tokens, K codes, C classes, d width.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softgen.categorical import check_token_range
from softgen.checkpoints import build, find_checkpoint, published_settings, read_checkpoint
from softgen.models.base import MaskedDiffusionModel, ModelOutput
from softgen.models.conditions import ClassCondition, Condition
from softgen.relaxation import expected_embedding

_PUBLISHED_HEADS = 16


class _TiTokGenerator(MaskedDiffusionModel):
    """What the two share: the table, the class in front, the output layer."""

    def __init__(
        self,
        *,
        codebook_size: int,
        image_seq_len: int,
        condition_num_classes: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        dropout: float,
        attn_drop: float,
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads: expected a divisor of the width {hidden_size}, got {num_attention_heads}"
            )
        self.config = {
            "codebook_size": codebook_size,
            "image_seq_len": image_seq_len,
            "condition_num_classes": condition_num_classes,
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "intermediate_size": intermediate_size,
            "dropout": dropout,
            "attn_drop": attn_drop,
            "checkpoint_activations": checkpoint_activations,
        }
        self.num_codes = self.mask_id = codebook_size
        self.num_sites = self.num_tokens = image_seq_len
        self.num_classes, self.embedding_dim = condition_num_classes, hidden_size
        self.has_null_condition = True
        self.checkpoint_activations = checkpoint_activations

    @property
    def table(self) -> nn.Embedding:
        """K codes, the mask, C classes, the null class."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """The output layer, d to K."""
        raise NotImplementedError

    def _trunk(self, x: Tensor, taps: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Last and tapped hidden states (B, 1 + N, d) of embedded sequences (B, 1 + N, d)."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class; an id above the mask would be a class."""
        check_token_range(tokens, self.mask_id)
        embedded: Tensor = self.table(tokens)
        return embedded

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the base class."""
        rows = self.table.weight
        soft = expected_embedding(probs, rows[: self.num_codes])
        return soft if mask is None else torch.where(mask.unsqueeze(-1), rows[self.mask_id], soft)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """The table."""
        return self.table.parameters()

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """See the base class. Tapped hidden states are those of the image tokens."""
        last, hidden = self._trunk(self._sequence(embeddings, condition), taps)
        return ModelOutput(logits=self.head(last[:, 1:]), hidden=tuple(hidden[tap][:, 1:] for tap in taps))

    def hidden(self, inputs: Tensor, condition: Condition) -> Tensor:
        """What `head` turns into logits, (B, N, d); arguments as `forward`."""
        return self._trunk(self._sequence(inputs, condition), ())[0][:, 1:]

    def _sequence(self, embeddings: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, ClassCondition)
        labels = self.num_codes + 1 + condition.labels.masked_fill(condition.dropped, self.num_classes)
        return torch.cat([self.table(labels).unsqueeze(1).to(embeddings.dtype), embeddings], dim=1)

    def _step(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        else:
            out = block(*inputs)
        return out


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-12)


class _SelfAttention(nn.Module):
    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return mixed.transpose(1, 2).flatten(2)


class _AddAndNorm(nn.Module):
    """BERT's output: LayerNorm(x + W y)."""

    def __init__(self, inner: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = _norm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(x + self.drop(self.dense(y)))
        return out


class _BertLayer(nn.Module):
    """Attention and feed-forward, a norm after each sum."""

    def __init__(self, width: int, *, heads: int, inner: int, dropout: float, attn_drop: float) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {
                "self": _SelfAttention(width, heads=heads, dropout=attn_drop),
                "output": _AddAndNorm(width, width, dropout=dropout),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _AddAndNorm(inner, width, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x), x)
        x = self.output(F.gelu(self.intermediate["dense"](x)), x)
        return x


class _BertEmbeddings(nn.Module):
    """Positions and the one token type are added to word embeddings."""

    def __init__(self, rows: int, positions: int, width: int, *, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(rows, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = _norm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(
            self.LayerNorm(x + self.position_embeddings.weight + self.token_type_embeddings.weight[0])
        )
        return out


class _Bert(nn.Module):
    def __init__(self, embeddings: _BertEmbeddings, layers: nn.ModuleList, head: nn.Linear) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": layers})
        self.lm_head = head


class ImageBert(_TiTokGenerator):
    """BERT over the class and the codes. The defaults are those of the generators for TiTok L-32, but for dropout.

    Args:
        codebook_size: K.
        image_seq_len: N.
        condition_num_classes: C.
        hidden_size: d.
        num_hidden_layers: Number of layers.
        num_attention_heads: Attention heads; divides d.
        intermediate_size: Inner width of the feed-forward.
        dropout: In [0, 1); 0.1 when the published models were trained.
        attn_drop: Of the attention, in [0, 1).
        checkpoint_activations: Recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        image_seq_len: int = 32,
        condition_num_classes: int = 1000,
        hidden_size: int = 768,
        num_hidden_layers: int = 24,
        num_attention_heads: int = _PUBLISHED_HEADS,
        intermediate_size: int = 3072,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            image_seq_len=image_seq_len,
            condition_num_classes=condition_num_classes,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            dropout=dropout,
            attn_drop=attn_drop,
            checkpoint_activations=checkpoint_activations,
        )
        self.num_layers = num_hidden_layers
        layers = nn.ModuleList(
            _BertLayer(
                hidden_size,
                heads=num_attention_heads,
                inner=intermediate_size,
                dropout=dropout,
                attn_drop=attn_drop,
            )
            for _ in range(num_hidden_layers)
        )
        rows = codebook_size + condition_num_classes + 2
        self.model = _Bert(
            _BertEmbeddings(rows, image_seq_len + 1, hidden_size, dropout=dropout),
            layers,
            nn.Linear(hidden_size, codebook_size),
        )

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "model",
        num_attention_heads: int | None = None,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        checkpoint_activations: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "ImageBert":
        """Open a published checkpoint of any size.

        Args:
            source: A file, or a folder or hub id that holds `model.safetensors`.
            key: The config key that named it, for error messages.
            num_attention_heads: Shapes do not tell it; by default what config.json beside the checkpoint says, else the
                published 16.
            dropout: While it is trained.
            attn_drop: While it is trained.
            checkpoint_activations: As of the class.
            dtype: Of the weights; None keeps the checkpoint's.

        Raises:
            ValueError: If the file is missing or of another family.
        """
        path = find_checkpoint(source, key=key)
        state = read_checkpoint(path, key=key)
        options = {
            "num_attention_heads": _published_heads(path) if num_attention_heads is None else num_attention_heads,
            "dropout": dropout,
            "attn_drop": attn_drop,
            "checkpoint_activations": checkpoint_activations,
        }
        arguments = {**_bert_sizes(state), **options}
        return build(cls, arguments, state, key=key, dropped=("model.embeddings.position_ids",), dtype=dtype)

    @property
    def table(self) -> nn.Embedding:
        """K codes, the mask, C classes, the null class."""
        return self.model.embeddings.word_embeddings

    @property
    def head(self) -> nn.Linear:
        """The output layer, d to K."""
        return self.model.lm_head

    def _trunk(self, x: Tensor, taps: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        x = self.model.embeddings(x)
        hidden: dict[int, Tensor] = {}
        layers = self.model.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(layers):
            x = self._step(layer, x)
            if index in taps:
                hidden[index] = x
        return x, hidden


class _UViTAttention(nn.Module):
    def __init__(self, width: int, *, heads: int, attn_drop: float) -> None:
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # In float32, as the published models compute it.
        mixed = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), dropout_p=self.attn_drop if self.training else 0.0
        )
        out: Tensor = self.proj(mixed.to(x.dtype).transpose(1, 2).flatten(2))
        return out


class _UViTBlock(nn.Module):
    """A pre-norm block; with a skip, the two are joined and projected first."""

    def __init__(self, width: int, *, heads: int, inner: int, dropout: float, attn_drop: float, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _UViTAttention(width, heads=heads, attn_drop=attn_drop)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.drop = nn.Dropout(dropout)
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.drop(self.attn(self.norm1(x)))
        inner = self.drop(F.gelu(self.mlp["fc1"](self.norm2(x))))
        x = x + self.drop(self.mlp["fc2"](inner))
        return x


class UViTBert(_TiTokGenerator):
    """A U-shaped ViT over the class and the codes. The defaults are those of the generator for TiTok S-128.

    Args:
        codebook_size: K.
        image_seq_len: N.
        condition_num_classes: C.
        hidden_size: d.
        num_hidden_layers: Even: half of them before the middle block, half after it, which makes one more.
        num_attention_heads: Attention heads; divides d.
        intermediate_size: Inner width of the feed-forward.
        dropout: In [0, 1); 0.1 when the published model was trained.
        attn_drop: Of the attention, in [0, 1).
        checkpoint_activations: Recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If the number of layers is odd, or the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        image_seq_len: int = 128,
        condition_num_classes: int = 1000,
        hidden_size: int = 1024,
        num_hidden_layers: int = 20,
        num_attention_heads: int = _PUBLISHED_HEADS,
        intermediate_size: int = 4096,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            codebook_size=codebook_size,
            image_seq_len=image_seq_len,
            condition_num_classes=condition_num_classes,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            dropout=dropout,
            attn_drop=attn_drop,
            checkpoint_activations=checkpoint_activations,
        )
        if num_hidden_layers % 2:
            raise ValueError(f"model.num_hidden_layers: expected an even number, got {num_hidden_layers}")
        self.num_layers = num_hidden_layers + 1

        def block(*, skip: bool) -> _UViTBlock:
            return _UViTBlock(
                hidden_size,
                heads=num_attention_heads,
                inner=intermediate_size,
                dropout=dropout,
                attn_drop=attn_drop,
                skip=skip,
            )

        self.embeddings = nn.Embedding(codebook_size + condition_num_classes + 2, hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(1, image_seq_len + 1, hidden_size) * 0.02)
        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(num_hidden_layers // 2))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(num_hidden_layers // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, codebook_size)

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path,
        *,
        key: str = "model",
        num_attention_heads: int | None = None,
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        checkpoint_activations: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "UViTBert":
        """Open a published checkpoint of any size. Arguments and errors as `ImageBert.from_checkpoint`."""
        path = find_checkpoint(source, key=key)
        state = read_checkpoint(path, key=key)
        options = {
            "num_attention_heads": _published_heads(path) if num_attention_heads is None else num_attention_heads,
            "dropout": dropout,
            "attn_drop": attn_drop,
            "checkpoint_activations": checkpoint_activations,
        }
        return build(cls, {**_uvit_sizes(state), **options}, state, key=key, dtype=dtype)

    @property
    def table(self) -> nn.Embedding:
        """K codes, the mask, C classes, the null class."""
        return self.embeddings

    @property
    def head(self) -> nn.Linear:
        """The output layer, d to K."""
        return self.lm_head

    def _trunk(self, x: Tensor, taps: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        x = x + self.pos_embed
        states, skips = [], []
        for block in self.in_blocks:
            x = self._step(block, x)
            states.append(x)
            skips.append(x)
        x = self._step(self.mid_block, x)
        states.append(x)
        for block in self.out_blocks:
            x = self._step(block, x, skips.pop())
            states.append(x)
        return self.norm(x), {tap: states[tap] for tap in taps}


def _published_heads(path: Path) -> int:
    """As config.json beside the checkpoint has them, in TiTok's section or SFTok's."""
    heads: int = published_settings(path, "img_generator", "generator").get("num_attention_heads", _PUBLISHED_HEADS)
    return heads


def _bert_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments that shapes tell; the defaults where the checkpoint is another family's."""
    names = (
        "model.embeddings.word_embeddings.weight",
        "model.embeddings.position_embeddings.weight",
        "model.lm_head.weight",
        "model.encoder.layer.0.intermediate.dense.weight",
    )
    if not all(name in state for name in names):
        return {}
    table, positions, head, inner = (state[name] for name in names)
    depth = 0
    while f"model.encoder.layer.{depth}.intermediate.dense.weight" in state:
        depth += 1
    return {
        "codebook_size": head.shape[0],
        "image_seq_len": positions.shape[0] - 1,
        "condition_num_classes": table.shape[0] - head.shape[0] - 2,
        "hidden_size": table.shape[1],
        "num_hidden_layers": depth,
        "intermediate_size": inner.shape[0],
    }


def _uvit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """As `_bert_sizes`."""
    names = ("embeddings.weight", "pos_embed", "lm_head.weight", "mid_block.mlp.fc1.weight")
    if not all(name in state for name in names):
        return {}
    table, positions, head, inner = (state[name] for name in names)
    half = 0
    while f"in_blocks.{half}.norm1.weight" in state:
        half += 1
    return {
        "codebook_size": head.shape[0],
        "image_seq_len": positions.shape[1] - 1,
        "condition_num_classes": table.shape[0] - head.shape[0] - 2,
        "hidden_size": table.shape[1],
        "num_hidden_layers": 2 * half,
        "intermediate_size": inner.shape[0],
    }
