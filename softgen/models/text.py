"""Text encoders: prompts to the states and the pooled vector that a text-conditional model looks at.

Shape legend: B batch, T text tokens, c width of a state, p width of the pooled vector.
"""

import json
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softgen.models.base import ImageCodeModel
from softgen.models.conditions import TextCondition
from softgen.pretrained import Pretrained
from softgen.relaxation import widen

_WORD = re.compile(r"[^\W_]+")
_PADDING, _UNKNOWN, _FIRST_WORD = 0, 1, 2


@dataclass(frozen=True)
class PromptProblems:
    """What an encoder cannot read of some prompts.

    Attributes:
        truncated: Prompts that are longer than the context.
        unknown: Words, each time they occur, that are not in the vocabulary.
    """

    truncated: int = 0
    unknown: int = 0


class TextEncoder(Pretrained, ABC):
    """Maps prompts to a condition.

    Attributes:
        width: c, of the states.
        pooled_width: p, of the pooled vector.
        length: T, the context; longer prompts are cut.
    """

    width: int
    pooled_width: int
    length: int

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts; see `TextCondition` for the shapes."""

    @abstractmethod
    def problems(self, prompts: Sequence[str]) -> PromptProblems:
        """What of these prompts is lost."""

    def tower(self) -> nn.Module | None:
        """What it reads with and does not hold as its own, such as a published tower, which is opened for it; or None.

        Raises:
            ValueError: The tower cannot be opened.
        """
        return None

    def warn_of_problems(self, prompts: Sequence[str]) -> None:
        """Say once, with the count, that prompts are cut, and once that words are unknown."""
        found = self.problems(prompts)
        self._warn("truncated", found.truncated, f"of {len(prompts)} prompts are cut to {self.length} tokens")
        self._warn("unknown", found.unknown, f"words of {len(prompts)} prompts are not in the vocabulary")

    def _warn(self, kind: str, count: int, what: str) -> None:
        if count and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"text encoder: {count} {what}", stacklevel=3)


def read_alike(encoder: TextEncoder, other: TextEncoder) -> bool:
    """Whether two encoders give the same conditions, as far as settings and weights tell, up to half precision.

    Where a published one came from does not count.
    """
    settings = [{**one.config, "source": None} for one in (encoder, other)]
    states, others = encoder.state_dict(), other.state_dict()
    return (
        type(encoder) is type(other)
        and json.dumps(settings[0], sort_keys=True) == json.dumps(settings[1], sort_keys=True)
        and states.keys() == others.keys()
        and all(
            torch.allclose(widen(value), widen(others[name]).to(value.device), rtol=1e-2, atol=1e-4)
            for name, value in states.items()
        )
    )


class WordTextEncoder(TextEncoder):
    """A small transformer over whole words, trained along with the model; its vocabulary is saved with it.

    Args:
        vocabulary: Lower-case words. A teacher's training fills an empty one from the captions of its data.
        num_words: Rows of the word table, which bounds the vocabulary.
        width: c, of the states.
        depth: Transformer layers.
        heads: Attention heads; divides `width`.
        length: T; longer prompts are cut.

    Raises:
        ValueError: A size is out of range, or the vocabulary does not fit.
    """

    def __init__(
        self,
        *,
        vocabulary: Sequence[str] = (),
        num_words: int = 4096,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        length: int = 24,
    ) -> None:
        super().__init__()
        for name, value in (("num_words", num_words), ("depth", depth), ("heads", heads), ("length", length)):
            if value < 1:
                raise ValueError(f"text_encoder.{name}: expected at least 1, got {value}")
        if width < 1 or width % heads:
            raise ValueError(f"text_encoder.width: expected a multiple of heads ({heads}), got {width}")
        self.config = {
            "vocabulary": [],
            "num_words": num_words,
            "width": width,
            "depth": depth,
            "heads": heads,
            "length": length,
        }
        self.width, self.pooled_width, self.length, self.num_words = width, width, length, num_words
        self.word_embedding = nn.Embedding(num_words + _FIRST_WORD, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.5)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self._ids: dict[str, int] = {}
        self._set_vocabulary(vocabulary)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that it knows."""
        return tuple(self._ids)

    def learn_words(self, captions: Iterable[str]) -> None:
        """Take the most frequent words of the captions as the vocabulary; of equals, the first in the alphabet."""
        counts = Counter(word for caption in captions for word in _words(caption))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self._set_vocabulary(ranked[: self.num_words])

    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts; the pooled vector is the mean state.

        Raises:
            ValueError: There is no vocabulary yet.
        """
        if not self._ids:
            raise ValueError("text_encoder.vocabulary: expected words, got none: train a teacher with it first")
        self.warn_of_problems(prompts)
        ids = self._tokenise(prompts).to(self.position.device)
        mask = ids != _PADDING
        # A prompt without a word still has one state to look at.
        mask[:, 0] = True
        states = self.layers(self.word_embedding(ids) + self.position, src_key_padding_mask=~mask)
        weights = mask.unsqueeze(-1).to(states.dtype)
        return TextCondition.of(states, mask, (states * weights).sum(dim=1) / weights.sum(dim=1))

    def problems(self, prompts: Sequence[str]) -> PromptProblems:
        """See the base class."""
        words = [_words(prompt) for prompt in prompts]
        return PromptProblems(
            truncated=sum(len(some) > self.length for some in words),
            unknown=sum(word not in self._ids for some in words for word in some),
        )

    def _set_vocabulary(self, vocabulary: Sequence[str]) -> None:
        if len(vocabulary) > self.num_words:
            raise ValueError(f"text_encoder.vocabulary: expected at most {self.num_words} words, got {len(vocabulary)}")
        wrong = [word for word in vocabulary if _words(word) != [word]]
        if wrong or len(set(vocabulary)) < len(vocabulary):
            got = repr(wrong[0]) if wrong else "one of them twice"
            raise ValueError(f"text_encoder.vocabulary: expected unique lower-case words, got {got}")
        self._ids = {word: index for index, word in enumerate(vocabulary, start=_FIRST_WORD)}
        self.config["vocabulary"] = list(vocabulary)

    def _tokenise(self, prompts: Sequence[str]) -> Tensor:
        ids = torch.full((len(prompts), self.length), _PADDING)
        for row, prompt in zip(ids, prompts, strict=True):
            known = [self._ids.get(word, _UNKNOWN) for word in _words(prompt)[: self.length]]
            row[: len(known)] = torch.tensor(known, dtype=torch.long)
        return ids


def freeze_text_encoder(model: ImageCodeModel) -> None:
    """Stop the training of a model's text encoder, if it has one; whoever encodes the prompts owns it."""
    if model.text_encoder is not None:
        model.text_encoder.requires_grad_(requires_grad=False).eval()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
