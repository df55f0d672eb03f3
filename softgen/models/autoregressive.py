"""The native autoregressive model: a decoder-only transformer over image tokens in raster order.

Shape legend: B batch, N sites, K codes, d width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softgen.models.base import ImageCodeModel
from softgen.models.blocks import (
    Activation,
    KeyValueCache,
    Modulation,
    TransformerBlock,
    check_transformer,
    modulate,
    reset_transformer,
)
from softgen.models.conditions import ClassCondition, Condition


class AutoregressiveTransformer(ImageCodeModel):
    """p(x | c) = prod_i p(x_i | x_<i, c), class-conditional, with the blocks of `MaskedTransformer` made causal.

    Args:
        num_codes: K, size of the tokenizer's codebook.
        num_sites: N, tokens an image.
        num_classes: Classes; 0 for an unconditional model.
        width: d, width of the vectors.
        depth: Number of blocks.
        heads: Attention heads; divides `width`.
        mlp_ratio: Inner width of the feed-forward as a multiple of `width`.
        activation: Of the feed-forward: gelu, relu (fastest on a CPU) or silu.
        null_condition: Whether the model learns an unconditional branch, as guidance needs.
        checkpoint_activations: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        num_sites: int,
        num_classes: int,
        width: int = 384,
        depth: int = 8,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        null_condition: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        check_transformer(
            num_codes=num_codes,
            num_sites=num_sites,
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            activation=activation,
        )
        self.config = {
            "num_codes": num_codes,
            "num_sites": num_sites,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "activation": activation,
            "null_condition": null_condition,
            "checkpoint_activations": checkpoint_activations,
        }
        self.num_codes, self.num_sites, self.num_classes = num_codes, num_sites, num_classes
        self.has_null_condition = null_condition and num_classes > 0
        self.checkpoint_activations = checkpoint_activations

        self.token_embedding = nn.Embedding(num_codes, width)
        self.start = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(torch.randn(num_sites, width) * 0.5)
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads=heads, mlp_ratio=mlp_ratio, activation=activation, causal=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(width, chunks=2)
        self.head = nn.Linear(width, num_codes)
        reset_transformer(self.blocks, self.head)

    def forward(self, tokens: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced logits: those of site i see the tokens before i alone.

        Args:
            tokens: (B, N) int64 in [0, K).
            condition: B samples.

        Returns:
            (B, N, K).
        """
        logits: Tensor = self.head(self.hidden(tokens, condition))
        return logits

    def hidden(self, tokens: Tensor, condition: Condition) -> Tensor:
        """What the output layer `head` turns into logits, (B, N, d); arguments as `forward`."""
        pooled = self._pool(condition)
        start = self.start.expand(len(tokens), 1, -1)
        x = torch.cat([start, self.token_embedding(tokens[:, :-1])], dim=1) + self.position
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, pooled, use_reentrant=False)
            else:
                x = block(x, pooled)
        return self._finish(x, pooled)

    def _pool(self, condition: Condition) -> Tensor:
        assert isinstance(condition, ClassCondition)
        pooled: Tensor = self.class_embedding(condition.labels.masked_fill(condition.dropped, self.num_classes))
        return pooled

    def _finish(self, x: Tensor, pooled: Tensor) -> Tensor:
        shift, scale = self.modulation(pooled)
        return modulate(self.norm(x), shift=shift, scale=scale)

    def new_caches(self) -> list[KeyValueCache]:
        """Empty caches for `next_logits`, one a block."""
        return [KeyValueCache(self.num_sites) for _ in self.blocks]

    def next_logits(self, previous: Tensor | None, condition: Condition, caches: Sequence[KeyValueCache]) -> Tensor:
        """Logits of the next site, (B, 1, K), at the cost of one position.

        Args:
            previous: Codes of the site before it, (B,) int64; None at the first site.
            condition: B samples.
            caches: From `new_caches`; they remember the sites so far.
        """
        pooled = self._pool(condition)
        start = self.start.expand(len(condition), -1)
        x = (start if previous is None else self.token_embedding(previous)) + self.position[caches[0].length]
        x = x.unsqueeze(1)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, pooled, cache)
        logits: Tensor = self.head(self._finish(x, pooled))
        return logits
