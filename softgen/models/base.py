"""The interface of masked diffusion models.

The generic code sees N categorical *sites* over K codes. For most families a site is a token; a family that splits
tokens into groups of bits has several sites a token, and only its own `embed` folds sites into L vectors.

Shape legend: B batch, N sites, K codes, L vectors of width d.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from softgen.categorical import check_token_range
from softgen.models.conditions import Asked, ClassCondition, Condition, TextCondition, check_labels, check_prompts
from softgen.pretrained import Pretrained

if TYPE_CHECKING:
    from softgen.models.text import TextEncoder


@dataclass(frozen=True)
class ModelOutput:
    """Logits (B, N, K), and the hidden states (B, L, `hidden_dim`) of the layers that were tapped."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


@runtime_checkable
class LinearHead(Protocol):
    """A model whose logits are `head(hidden(inputs, condition))`: losses over many codes then need no logits.

    Attributes:
        head: The output layer, d to K.
    """

    head: nn.Linear

    def hidden(self, inputs: Tensor, condition: Condition) -> Tensor:
        """What `head` turns into logits, (B, N, d); arguments as the model's `forward`."""
        ...


class ImageCodeModel(Pretrained, ABC):
    """A generative model of an image's codes, whatever the order in which it predicts them.

    Attributes:
        num_sites: N, categorical variables an image.
        num_codes: K, codes a site can take, the mask not counted.
        num_classes: Classes of a class-conditional model, else 0.
        has_null_condition: Whether dropping the condition is defined, as guidance needs. True unless a class says
            otherwise: one that has learned nothing for `condition.dropped` sets it to False.
    """

    num_sites: int
    num_codes: int
    num_classes: int = 0
    has_null_condition: bool = True

    @property
    def text_encoder(self) -> "TextEncoder | None":
        """What reads the prompts of a text-conditional model; None for a class-conditional one.

        A text-conditional class overrides this property; an attribute of that name would not be seen.
        """
        return None

    def encode(self, asked: Asked) -> Condition:
        """Make the condition from class labels, (B,) of any integer type, or from B prompts.

        Raises:
            ValueError: Prompts for a class-conditional model, labels for a text-conditional one, no prompt at all, a
                single text, labels of another shape or type, or no such class. On an accelerator, which would have to
                be waited for, the labels' values are not looked at.
        """
        if self.text_encoder is not None:
            if isinstance(asked, Tensor):
                raise ValueError("conditions: expected prompts, since this model is text-conditional, got class labels")
            check_prompts(asked, key="conditions")
            condition: Condition = self.text_encoder(asked)
            return condition
        if not isinstance(asked, Tensor):
            raise ValueError("conditions: expected class labels, since this model is class-conditional, got prompts")
        check_labels(asked, key="labels")
        check_token_range(asked, max(1, self.num_classes) - 1, key="labels")
        return ClassCondition.of(asked.long())

    def check(self, *, key: str) -> None:
        """Refuse a model that contradicts itself.

        Raises:
            ValueError: Naming `key`.
        """


class MaskedDiffusionModel(ImageCodeModel, ABC):
    """A network that predicts every masked site from the visible ones.

    Attributes:
        num_tokens: L, vectors that `embed` gives and `run` takes.
        mask_id: Token id that means "masked"; outside [0, K).
        embedding_dim: d, width of the vectors.
        num_layers: Layers that `taps` may name, 0 to num_layers - 1.
        checkpoint_activations: Recompute the blocks in the backward pass instead of keeping their activations. May be
            set at any time; a family that can do it sets it in its constructor.
    """

    num_tokens: int
    mask_id: int
    embedding_dim: int
    num_layers: int
    checkpoint_activations: bool = False

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Embed hard tokens.

        Args:
            tokens: (B, N) int64, codes or `mask_id`.

        Returns:
            (B, L, d).
        """

    @abstractmethod
    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Expected embedding under `probs`; equals `embed` exactly on one-hot probs.

        Args:
            probs: Distributions over the K codes, (B, N, K).
            mask: True where the site is masked, (B, N) bool: it gets the mask embedding whatever its probs.

        Returns:
            (B, L, d), differentiable in `probs`.
        """

    @abstractmethod
    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """The network itself; called through `forward` and `forward_with_taps`.

        Args:
            embeddings: (B, L, d), from `embed` or `embed_soft`.
            condition: B samples; where `condition.dropped` is True, the prediction is the unconditional one.
            taps: Layers whose output is wanted, none or some of 0 to num_layers - 1.

        Returns:
            Logits (B, N, K) of the image codes alone, and the tapped states (B, L, `hidden_dim`) as `taps` orders them.
        """

    @abstractmethod
    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the token embedding, which Di[M]O keeps frozen."""

    def forward(self, embeddings: Tensor, condition: Condition) -> Tensor:
        """Logits over the K image codes.

        Args:
            embeddings: (B, L, d), from `embed` or `embed_soft`.
            condition: B samples.

        Returns:
            (B, N, K).
        """
        return self.run(embeddings, condition, ()).logits

    def forward_with_taps(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """Logits, and the hidden states of the layers in `taps`, in their order.

        Raises:
            ValueError: If a tap is not a layer.
        """
        self.check_taps(taps)
        return self.run(embeddings, condition, taps)

    def compile_blocks(self) -> None:
        """Compile the repeated blocks, the members of the network's module lists, in place (`torch.compile`)."""
        for module in self.modules():
            if isinstance(module, nn.ModuleList):
                for block in module:
                    if not isinstance(block, nn.ModuleList):
                        block.compile()

    def check_taps(self, taps: Sequence[int], *, key: str = "taps") -> None:
        """Refuse taps that are no layers.

        Raises:
            ValueError: Naming the valid range.
        """
        for tap in taps:
            if not 0 <= tap < self.num_layers:
                raise ValueError(f"{key}: expected layers in 0..{self.num_layers - 1}, got {tap}")

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden states that taps give."""
        return self.embedding_dim

    @property
    def condition_dim(self) -> int:
        """c, width of the pooled condition."""
        return self.num_classes + 1 if self.text_encoder is None else self.text_encoder.pooled_width

    def pool(self, condition: Condition) -> Tensor:
        """The condition as one vector a sample, (B, c), for networks beside the model.

        One-hot classes, null last; or the pooled text, 0 where it is dropped.
        """
        if isinstance(condition, TextCondition):
            return condition.pooled.masked_fill(condition.dropped.unsqueeze(-1), 0)
        assert isinstance(condition, ClassCondition)
        labels = condition.labels.masked_fill(condition.dropped, self.num_classes)
        return F.one_hot(labels, self.condition_dim).float()

    def check(self, *, key: str) -> None:
        """Refuse a model whose mask is one of its image codes.

        Raises:
            ValueError: Naming `key`.
        """
        if self.mask_id < self.num_codes:
            raise ValueError(
                f"{key}.mask_id: expected an id outside the image codes 0..{self.num_codes - 1}, got {self.mask_id}"
            )
