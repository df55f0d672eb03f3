"""The native masked diffusion model: a bidirectional transformer over image tokens."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softgen.models.base import MaskedDiffusionModel, ModelOutput
from softgen.models.blocks import (
    Activation,
    Modulation,
    TransformerBlock,
    check_transformer,
    modulate,
    reset_transformer,
)
from softgen.models.conditions import ClassCondition, Condition, TextCondition
from softgen.models.text import TextEncoder
from softgen.relaxation import expected_embedding


class MaskedTransformer(MaskedDiffusionModel):
    """Masked transformer under classes or prompts; about 12 depth width^2 parameters, half as many for the condition.

    Prompts enter by cross-attention in every block, and by their pooled vector, which modulates the blocks as a class
    does.

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
        text_encoder: Of a text-conditional model, which has no classes. Trained along, unless it is frozen.
        local_mixing: Whether every block mixes neighbouring sites of a square grid by a 3x3 depthwise convolution.
            Small models learn images much faster with it.
    """

    def __init__(
        self,
        *,
        num_codes: int,
        num_sites: int,
        num_classes: int = 0,
        width: int = 384,
        depth: int = 8,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        activation: Activation = "gelu",
        null_condition: bool = True,
        checkpoint_activations: bool = False,
        text_encoder: TextEncoder | None = None,
        local_mixing: bool = False,
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
        if local_mixing and math.isqrt(num_sites) ** 2 != num_sites:
            raise ValueError(f"model.num_sites: expected a square for local_mixing, got {num_sites}")
        if text_encoder is not None and num_classes:
            raise ValueError(f"model.num_classes: expected 0 beside a text encoder, got {num_classes}")
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
            "text_encoder": text_encoder,
            "local_mixing": local_mixing,
        }
        self.num_codes, self.num_sites, self.num_tokens = num_codes, num_sites, num_sites
        self.num_classes, self.num_layers, self.embedding_dim = num_classes, depth, width
        self.mask_id = num_codes
        self.has_null_condition = null_condition and (num_classes > 0 or text_encoder is not None)
        self.checkpoint_activations = checkpoint_activations

        # Unit scale: Di[M]O's embedding noise is a standard normal, mixed in with a variance-preserving weight.
        self.token_embedding = nn.Embedding(num_codes + 1, width)
        self.position = nn.Parameter(torch.randn(num_sites, width) * 0.5)
        self.text = text_encoder
        context_width = 0
        if text_encoder is None:
            self.class_embedding = nn.Embedding(num_classes + 1, width)
        else:
            context_width = text_encoder.width
            self.pooled_projection = nn.Linear(text_encoder.pooled_width, width)
            self.null_state = nn.Parameter(torch.randn(context_width))
            self.null_pooled = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                heads=heads,
                mlp_ratio=mlp_ratio,
                activation=activation,
                context_width=context_width,
                mixing_grid=math.isqrt(num_sites) if local_mixing else 0,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = Modulation(width, chunks=2)
        self.head = nn.Linear(width, num_codes)
        reset_transformer(self.blocks, self.head)

    @property
    def text_encoder(self) -> TextEncoder | None:
        """See the base class."""
        return self.text

    def embed(self, tokens: Tensor) -> Tensor:
        """See the base class."""
        embedded: Tensor = self.token_embedding(tokens)
        return embedded

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the base class."""
        table = self.token_embedding.weight
        soft = expected_embedding(probs, table[: self.num_codes])
        return soft if mask is None else torch.where(mask.unsqueeze(-1), table[self.mask_id], soft)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """The table of token embeddings."""
        return self.token_embedding.parameters()

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """See the base class."""
        last, hidden = self._trunk(embeddings, condition, taps)
        return ModelOutput(logits=self.head(last), hidden=hidden)

    def hidden(self, embeddings: Tensor, condition: Condition) -> Tensor:
        """What the output layer `head` turns into logits, (B, N, d); arguments as `forward`."""
        return self._trunk(embeddings, condition, ())[0]

    def _trunk(
        self, embeddings: Tensor, condition: Condition, taps: Sequence[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        pooled, context = self._read(condition)
        x = embeddings + self.position
        hidden: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, pooled, None, context, use_reentrant=False)
            else:
                x = block(x, pooled, None, context)
            if layer in taps:
                hidden[layer] = x
        shift, scale = self.modulation(pooled)
        return modulate(self.norm(x), shift=shift, scale=scale), tuple(hidden[tap] for tap in taps)

    def _read(self, condition: Condition) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What modulates the blocks, (B, d), and for prompts the text states and their mask."""
        if self.text is None:
            assert isinstance(condition, ClassCondition)
            labels = condition.labels.masked_fill(condition.dropped, self.num_classes)
            return self.class_embedding(labels), None
        assert isinstance(condition, TextCondition)
        dropped = condition.dropped.unsqueeze(-1)
        pooled = torch.where(dropped, self.null_pooled, self.pooled_projection(condition.pooled))
        states = torch.where(dropped.unsqueeze(-1), self.null_state, condition.states)
        return pooled, (states, condition.mask | dropped)
