"""Frozen text encoders of transformers and open_clip.

Shape legend: B batch, T text tokens, c width of a state, p width of the pooled vector.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from softgen.models.conditions import TextCondition
from softgen.models.text import PromptProblems, TextEncoder

E = TypeVar("E", bound="PretrainedTextEncoder")
Library = Literal["transformers", "open_clip"]


class PretrainedTextEncoder(TextEncoder):
    """A published text tower, frozen. Saved folders keep its source, not its weights.

    The states are those of one layer, the pooled vector is the projected one where the model has one (CLIP), else the
    mean state (T5). The tower is opened when it is first needed, and shared by all copies of the model.

    Args:
        source: A folder or hub id of transformers; for open_clip "local-dir:FOLDER" or "hf-hub:OWNER/NAME".
        library: `transformers` or `open_clip`.
        layer: The states taken: -1 those after the last layer and its norm, -2 those before the last layer, and so on.
        length: T; by default the model's own context, or 77 where it has none.
        width: c, and
        pooled_width: p; by default read from the source's config.

    Raises:
        ImportError: The library is not installed; the message has the command.
        ValueError: The source cannot be opened, or a setting is out of range.
    """

    def __init__(
        self,
        source: str,
        *,
        library: Library = "transformers",
        layer: int = -1,
        length: int | None = None,
        width: int | None = None,
        pooled_width: int | None = None,
    ) -> None:
        super().__init__()
        if library not in get_args(Library):
            raise ValueError(f"text_encoder.library: expected transformers or open_clip, got {library!r}")
        if layer >= 0:
            raise ValueError(f"text_encoder.layer: expected a number below 0, counted from the end, got {layer}")
        self._tower: _Tower | None = None
        self._placed: list[Callable[[Tensor], Tensor]] = []
        self._source, self._library, self._layer = source, library, layer
        if length is None or width is None or pooled_width is None:
            sizes = self._open().sizes
            length, width, pooled_width = (
                given if given is not None else size
                for given, size in zip((length, width, pooled_width), sizes, strict=True)
            )
        self.length, self.width, self.pooled_width = length, width, pooled_width
        self.config = {
            "source": source,
            "library": library,
            "layer": layer,
            "length": length,
            "width": width,
            "pooled_width": pooled_width,
        }

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts; without gradients."""
        self.warn_of_problems(prompts)
        tower = self._open()
        states, mask, pooled = tower.encode(list(prompts), layer=self._layer, length=self.length)
        return TextCondition.of(states, mask, pooled)

    def problems(self, prompts: Sequence[str]) -> PromptProblems:
        """See the base class; subwords leave no word unknown."""
        return PromptProblems(truncated=self._open().count_long(list(prompts), length=self.length))

    def _open(self) -> "_Tower":
        if self._tower is None:
            opened = _open_transformers if self._library == "transformers" else _open_open_clip
            with torch.device("cpu"):  # also while a model is being built without memory
                self._tower = opened(self._source)
            self._tower.model.requires_grad_(requires_grad=False).eval()
            for move in self._placed:
                self._tower.model._apply(move)  # type: ignore[no-untyped-call]
        return self._tower

    def _apply(self: E, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> E:  # noqa: FBT001, FBT002
        """The tower moves along, though it is not part of the state dict."""
        if self._tower is not None:
            self._tower.model._apply(fn)  # type: ignore[no-untyped-call]
        else:
            self._placed.append(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __deepcopy__(self: E, memo: dict[int, Any]) -> E:
        copied = type(self)(**self.config)
        copied._tower, copied._placed = self._tower, list(self._placed)
        memo[id(self)] = copied
        return copied


class _Tower:
    """An opened text model: its sizes (T, c, p), and how it encodes."""

    def __init__(self, model: nn.Module, sizes: tuple[int, int, int]) -> None:
        self.model, self.sizes = model, sizes

    def encode(self, prompts: list[str], *, layer: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, T, c), mask (B, T), pooled (B, p)."""
        raise NotImplementedError

    def count_long(self, prompts: list[str], *, length: int) -> int:
        """How many prompts have more than `length` tokens."""
        raise NotImplementedError


class _TransformersTower(_Tower):
    def __init__(self, model: nn.Module, sizes: tuple[int, int, int], tokenizer: Any) -> None:
        super().__init__(model, sizes)
        self._tokenizer = tokenizer

    def encode(self, prompts: list[str], *, layer: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        device = next(self.model.parameters()).device
        encoded = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        pooled = getattr(output, "text_embeds", None)
        if pooled is None:
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return states, mask.bool(), pooled

    def count_long(self, prompts: list[str], *, length: int) -> int:
        return sum(len(ids) > length for ids in self._tokenizer(prompts)["input_ids"])


class _OpenCLIPTower(_Tower):
    def __init__(self, model: nn.Module, sizes: tuple[int, int, int], tokenizer: Any) -> None:
        super().__init__(model, sizes)
        self._tokenizer = tokenizer

    def encode(self, prompts: list[str], *, layer: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = self.model
        ids = self._tokenizer(prompts, context_length=length).to(next(model.parameters()).device)
        output = model.forward_intermediates(
            text=ids, text_indices=-layer, normalize=False, normalize_intermediates=layer == -1
        )
        states = output["text_intermediates"][layer]
        return states, ids != 0, output["text_features"]

    def count_long(self, prompts: list[str], *, length: int) -> int:
        longer = self._tokenizer(prompts, context_length=4 * length)
        return int((longer[:, length:] != 0).any(dim=1).sum())


def _open_transformers(source: str) -> _Tower:
    transformers = _import("transformers", source, package="transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        is_clip, text = config.model_type in ("clip", "clip_text_model"), getattr(config, "text_config", config)
        family: Any = transformers.AutoModel
        if is_clip:
            family, text.projection_dim = transformers.CLIPTextModelWithProjection, config.projection_dim
        elif config.model_type == "t5":
            family = transformers.T5EncoderModel
        with _quiet(transformers):  # of the image tower, which is not wanted
            model, found = family.from_pretrained(source, config=text, weights_only=True, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"no weights for {missing[0]!r}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers, torch and the hub each have errors of their own
        raise _cannot_open(source, error) from error
    width = text.hidden_size
    pooled = text.projection_dim if is_clip else width
    return _TransformersTower(model, (getattr(text, "max_position_embeddings", 77), width, pooled), tokenizer)


def _open_open_clip(source: str) -> _Tower:
    open_clip = _import("open_clip", source, package="open_clip_torch")
    if not source.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(f"text_encoder.source: expected local-dir:FOLDER or hf-hub:OWNER/NAME, got {source!r}")
    try:
        model = open_clip.create_model(source, weights_only=True)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip, torch and the hub each have errors of their own
        raise _cannot_open(source, error) from error
    width = model.ln_final.normalized_shape[0]
    return _OpenCLIPTower(model, (model.context_length, width, model.text_projection.shape[1]), tokenizer)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _import(name: str, source: str, *, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"text_encoder: expected {name}, which {source!r} needs: pip install {package}") from error


def _cannot_open(source: str, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(f"text_encoder.source: expected a text model in {source!r}, got an error ({reason})")
