"""Toy models with known answers, for tests and for trying out an idea in seconds.

    >>> model = ToyMaskedModel.random(num_classes=2, num_sites=4, num_codes=2)
    >>> tokens = MaskGITSampler(steps=4)(model, model.encode(labels), noise)
    >>> tokenizer = ToyTokenizer(num_codes=2)
    >>> images = tokenizer.decode(tokens)

Shape legend: B batch, N sites, K codes, S = K^N states of an image, C classes.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softgen.models.base import MaskedDiffusionModel, ModelOutput
from softgen.models.conditions import ClassCondition, Condition
from softgen.relaxation import expected_embedding
from softgen.tokenizers.base import ImageTokenizer

_MAX_STATES = 4096


class ToyTokenizer(ImageTokenizer):
    """Images of constant grey patches; code k is the grey level k / (K - 1). Exactly invertible on its codes.

    Args:
        num_codes: K, at least 2.
        grid: Patches a side; N = grid^2.
        patch: Pixels a side of a patch.
    """

    levels: Tensor

    def __init__(self, *, num_codes: int = 3, grid: int = 2, patch: int = 4) -> None:
        super().__init__()
        for name, value, least in (("num_codes", num_codes, 2), ("grid", grid, 1), ("patch", patch, 1)):
            if value < least:
                raise ValueError(f"tokenizer.{name}: expected at least {least}, got {value}")
        self.config = {"num_codes": num_codes, "grid": grid, "patch": patch}
        self.num_codes, self.num_sites, self.code_dim = num_codes, grid**2, 1
        self.image_size, self.grid, self.patch = grid * patch, grid, patch
        self.distance = "l2"
        self.register_buffer("levels", torch.linspace(0, 1, num_codes).unsqueeze(-1))

    @property
    def codebook(self) -> Tensor:
        """Grey levels (K, 1)."""
        return self.levels

    def latents(self, images: Tensor) -> Tensor:
        """Mean of each patch over pixels and channels, (B, N, 1), row-major."""
        self.check_images(images)
        return F.avg_pool2d(images.mean(dim=1, keepdim=True), self.patch).flatten(2).transpose(1, 2)

    def quantize(self, latents: Tensor) -> Tensor:
        """Codes (B, N) of the nearest levels."""
        return (latents - self.codebook.flatten()).abs().argmin(dim=-1)

    def decode_embeddings(self, embeddings: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the grey levels (B, N, 1), clamped to [0, 1]."""
        cells = embeddings.clamp(0, 1).view(-1, 1, self.grid, self.grid)
        pixels = cells.repeat_interleave(self.patch, dim=2).repeat_interleave(self.patch, dim=3)
        return pixels.repeat(1, 3, 1, 1)


class ToyMaskedModel(MaskedDiffusionModel):
    """The exact conditional distributions of a table: p(x_n = k | the other visible sites, class).

    A site's own token never enters its logits, so they are finite at visible sites too. Embeddings are one-hot
    vectors of K + 1 entries, the mask last. On soft embeddings the other sites are averaged over as if independent:
    the logits are differentiable in the embeddings, and the hard path is the special case of one-hot ones. The
    unconditional distribution is the even mixture of the classes.

    Beside the embedding, the model has one parameter: the table's log-probabilities, `log_joint` (C, S).

    Args:
        joint: Probabilities above 0, shape (C, K, ..., K) with one K a site, or nested lists of that shape; each
            class is normalised.
        null_condition: Whether the unconditional distribution may be used.
    """

    states: Tensor

    def __init__(self, *, joint: Tensor | Sequence[Any], null_condition: bool = True) -> None:
        super().__init__()
        table = torch.as_tensor(joint, dtype=torch.float32)
        num_codes = table.shape[-1]
        if table.ndim < 2 or set(table.shape[1:]) != {num_codes} or table[0].numel() > _MAX_STATES:
            raise ValueError(
                f"joint: expected shape (C, K, ..., K) of at most {_MAX_STATES} states, got {tuple(table.shape)}"
            )
        if not bool((table > 0).all()):
            raise ValueError(f"joint: expected probabilities above 0, got {table.min().item()}")
        self.config = {"joint": table.tolist(), "null_condition": null_condition}
        self.num_classes, self.num_sites, self.num_codes = table.shape[0], table.ndim - 1, num_codes
        self.num_tokens, self.num_layers = self.num_sites, 1
        self.mask_id, self.embedding_dim = num_codes, num_codes + 1
        self.has_null_condition = null_condition
        states = list(itertools.product(range(num_codes), repeat=self.num_sites))
        self.register_buffer("states", torch.tensor(states), persistent=False)
        self.token_embedding = nn.Embedding(num_codes + 1, num_codes + 1)
        nn.init.eye_(self.token_embedding.weight)
        self.log_joint = nn.Parameter(table.flatten(1).log().log_softmax(dim=-1))

    @classmethod
    def random(
        cls,
        *,
        num_classes: int,
        num_sites: int,
        num_codes: int,
        spread: float = 1.0,
        null_condition: bool = True,
        seed: int = 0,
    ) -> "ToyMaskedModel":
        """A table of random log-probabilities.

        Args:
            num_classes: C.
            num_sites: N.
            num_codes: K.
            spread: Standard deviation of the log-probabilities; 0 is the uniform distribution.
            null_condition: As in the constructor.
            seed: Of the table.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (num_classes, *[num_codes] * num_sites)
        joint = (spread * torch.randn(shape, generator=generator)).exp()
        return cls(joint=joint, null_condition=null_condition)

    def joint(self, condition: Condition) -> Tensor:
        """The known answer: probabilities (B, S) of the S states, numbered as `state_index` does."""
        assert isinstance(condition, ClassCondition)
        classes = self.log_joint.softmax(dim=-1)
        table = torch.cat([classes, classes.mean(dim=0, keepdim=True)])
        return table[condition.labels.masked_fill(condition.dropped, self.num_classes)]

    def state_index(self, tokens: Tensor) -> Tensor:
        """Numbers (B,) in [0, S) of images without masks, (B, N): their digits in base K, first site first."""
        places = self.num_codes ** torch.arange(self.num_sites - 1, -1, -1, device=tokens.device)
        return (tokens * places).sum(dim=-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """One-hot vectors (B, N, K + 1)."""
        embedded: Tensor = self.token_embedding(tokens)
        return embedded

    def embed_soft(self, probs: Tensor, mask: Tensor | None = None) -> Tensor:
        """The probabilities themselves, and one-hot vectors of the mask."""
        table = self.token_embedding.weight
        soft = expected_embedding(probs, table[: self.num_codes])
        return soft if mask is None else torch.where(mask.unsqueeze(-1), table[self.mask_id], soft)

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """The table of one-hot vectors."""
        return self.token_embedding.parameters()

    def run(self, embeddings: Tensor, condition: Condition, taps: Sequence[int]) -> ModelOutput:
        """Leave-one-out conditionals; the one layer's hidden states are the embeddings."""
        # How well code k fits what is seen at site n: 1 for its own token, and for every code where masked.
        fit_BNK = (embeddings[..., :-1] + embeddings[..., -1:]).clamp(min=0)
        fit_BNS = fit_BNK.gather(-1, self.states.T.expand(len(fit_BNK), -1, -1))
        itself = torch.eye(self.num_sites, dtype=torch.bool, device=fit_BNS.device).unsqueeze(-1)
        others_BNS = fit_BNS.unsqueeze(1).masked_fill(itself, 1.0).prod(dim=2)
        code_of_NSK = F.one_hot(self.states.T, self.num_codes).to(fit_BNS.dtype)
        weights_BNS = others_BNS * self.joint(condition).unsqueeze(1)
        scores = torch.einsum("bns,nsk->bnk", weights_BNS, code_of_NSK)
        logits = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        return ModelOutput(logits=logits, hidden=tuple(embeddings for _ in taps))


@dataclass
class CallCount:
    """What `count_calls` saw.

    Attributes:
        calls: Passes through the module.
        samples: Their batch sizes, in order.
    """

    calls: int
    samples: list[int]


@contextmanager
def count_calls(module: nn.Module) -> Iterator[CallCount]:
    """Count the passes through a module; of a masked diffusion model those with `taps` too.

    Args:
        module: Its first positional argument has the batch as first dimension.

    Yields:
        The count, which goes on to be updated until the context is left.
    """
    count = CallCount(calls=0, samples=[])
    name = "run" if isinstance(module, MaskedDiffusionModel) else "forward"
    original = getattr(module, name)

    def counted(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        count.calls += 1
        count.samples.append(len(first))
        return original(first, *args, **kwargs)

    setattr(module, name, counted)
    try:
        yield count
    finally:
        delattr(module, name)
