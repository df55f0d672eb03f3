"""Frozen text encoders of transformers and open_clip.

Shape legend: B batch, T text tokens, c width of a state, p width of the pooled vector.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from softgen.messages import reason_of
from softgen.models.conditions import TextCondition
from softgen.models.text import PromptProblems, TextEncoder

E = TypeVar("E", bound="PretrainedTextEncoder")
Library = Literal["transformers", "open_clip"]
_LENGTH = 77  # tokens of a model that has no context of its own


class PretrainedTextEncoder(TextEncoder):
    """A published text tower, frozen. Saved folders keep its source, not its weights.

    The states are those of one layer, the pooled vector is the projected one where the model has one (CLIP), else the
    mean state (T5). The tower is opened when it is first needed, and shared by all copies of the model.

    Args:
        source: A folder or hub id of transformers; for open_clip "local-dir:FOLDER" or "hf-hub:OWNER/NAME".
        subfolder: Of a diffusers folder: where the text tower is, with the tokenizer in `tokenizer` beside it.
        library: `transformers` or `open_clip`.
        layer: The states taken: -1 those after the last layer and its norm, -2 those before the last layer, and so on.
        length: T; by default the model's own context, or 77 where it has none.
        width: c, and
        pooled_width: p; by default read from the source's config.
        attend_padding: Whether tokens look at the padding too, as towers do that models without a mask were trained
            with; towers of open_clip always do, as far as the order of the tokens lets them.
        pad_id: Token id of the padding; by default the tokenizer's. open_clip pads with 0.
        force_quick_gelu: Take the activation that OpenAI's CLIP weights were trained with, whatever the source says. Of
            open_clip's sources that are called after OpenAI it is always taken.

    Raises:
        ImportError: The library is not installed; the message has the command.
        ValueError: The source cannot be opened, or a setting is out of range.
    """

    def __init__(
        self,
        source: str,
        *,
        library: Library = "transformers",
        subfolder: str = "",
        layer: int = -1,
        length: int | None = None,
        width: int | None = None,
        pooled_width: int | None = None,
        attend_padding: bool = False,
        pad_id: int | None = None,
        force_quick_gelu: bool = False,
    ) -> None:
        super().__init__()
        if library not in get_args(Library):
            raise ValueError(f"text_encoder.library: expected transformers or open_clip, got {library!r}")
        if layer >= 0:
            raise ValueError(f"text_encoder.layer: expected a number below 0, counted from the end, got {layer}")
        self._shelf: dict[str, _Tower] = {}  # one for all copies, whichever opens the tower
        self._placed: list[Callable[[Tensor], Tensor]] = []
        if subfolder and library != "transformers":
            raise ValueError(f"text_encoder.subfolder: expected none with {library}, got {subfolder!r}")
        self._source, self._library, self._layer = source, library, layer
        self._subfolder, self._attend_padding, self._pad_id = subfolder, attend_padding, pad_id
        self._force_quick_gelu, self._length = force_quick_gelu, length
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
            "subfolder": subfolder,
            "layer": layer,
            "length": length,
            "width": width,
            "pooled_width": pooled_width,
            "attend_padding": attend_padding,
            "pad_id": pad_id,
            "force_quick_gelu": force_quick_gelu,
        }

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> TextCondition:
        """Encode B prompts; without gradients."""
        self.warn_of_problems(prompts)
        ids, mask = self._open().tokenise(list(prompts), length=self.length)
        if self._pad_id is not None:
            ids = ids.masked_fill(~mask, self._pad_id)
        return self.encode_ids(ids, mask)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> TextCondition:
        """Encode token ids (B, T), of which the mask (B, T) says where there is no padding; without gradients."""
        tower = self._open()
        device = next(tower.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        seen = torch.ones_like(mask) if self._attend_padding else mask
        states, pooled = tower.encode(ids, mask, seen=seen, layer=self._layer)
        return TextCondition.of(states, mask, pooled)

    def tower(self) -> nn.Module:
        """See the base class; copies of a model have the same."""
        return self._open().model

    def problems(self, prompts: Sequence[str]) -> PromptProblems:
        """See the base class; subwords leave no word unknown."""
        # A token is a byte at least, and two mark the ends: most prompts are short without being tokenised again.
        maybe = [prompt for prompt in prompts if len(prompt.encode()) + 2 > self.length]
        return PromptProblems(truncated=self._open().count_long(maybe, length=self.length) if maybe else 0)

    def _open(self) -> "_Tower":
        if "tower" not in self._shelf:
            quick = self._force_quick_gelu
            with torch.device("cpu"):  # also while a model is being built without memory
                if self._library == "transformers":
                    opened: _Tower = _open_transformers(self._source, self._subfolder, quick_gelu=quick)
                else:
                    opened = _open_open_clip(self._source, quick_gelu=quick)
            opened.check(length=self._length, layer=self._layer)
            self._shelf["tower"] = opened
            self._shelf["tower"].model.requires_grad_(requires_grad=False).eval()
            for move in self._placed:
                self._shelf["tower"].model._apply(move)  # type: ignore[no-untyped-call]
        return self._shelf["tower"]

    def _apply(self: E, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> E:  # noqa: FBT001, FBT002
        """The tower moves along, though it is not part of the state dict."""
        if "tower" in self._shelf:
            self._shelf["tower"].model._apply(fn)  # type: ignore[no-untyped-call]
        else:
            self._placed.append(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __deepcopy__(self: E, memo: dict[int, Any]) -> E:
        copied = type(self)(**self.config)
        copied._shelf, copied._placed = self._shelf, list(self._placed)
        memo[id(self)] = copied
        return copied


def openai_clip_text(source: str, *, layer: int, **sizes: Any) -> PretrainedTextEncoder:
    """A text tower with OpenAI's CLIP weights as MaskGen and TA-TiTok read it: padded with 0, and padding is seen.

    Args:
        source: As of `PretrainedTextEncoder`; open_clip's by its prefix.
        layer: As of `PretrainedTextEncoder`.
        sizes: `length`, `width` and `pooled_width`, with which the source is opened when it is first needed.
    """
    library: Library = "open_clip" if source.startswith(("local-dir:", "hf-hub:")) else "transformers"
    return PretrainedTextEncoder(
        source, library=library, layer=layer, attend_padding=True, pad_id=0, force_quick_gelu=True, **sizes
    )


class _Tower:
    """An opened text model: its sizes (T, c, p), how many layers can be asked for, and how it encodes."""

    def __init__(self, model: nn.Module, sizes: tuple[int, int, int], *, depth: int) -> None:
        self.model, self.sizes, self.depth = model, sizes, depth

    def check(self, *, length: int | None, layer: int) -> None:
        """Refuse settings that the model cannot serve.

        Raises:
            ValueError: Naming them.
        """
        if -layer > self.depth:
            raise ValueError(f"text_encoder.layer: expected -{self.depth} to -1 of this model, got {layer}")

    def tokenise(self, prompts: list[str], *, length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, T), and the mask (B, T) that is False at the padding."""
        raise NotImplementedError

    def encode(self, ids: Tensor, mask: Tensor, *, seen: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """States (B, T, c) and pooled (B, p) of ids (B, T); tokens look where `seen` (B, T) is True."""
        raise NotImplementedError

    def count_long(self, prompts: list[str], *, length: int) -> int:
        """How many prompts have more than `length` tokens."""
        raise NotImplementedError


class _TransformersTower(_Tower):
    def __init__(
        self, model: nn.Module, sizes: tuple[int, int, int], tokenizer: Any, *, depth: int, positions: int | None
    ) -> None:
        super().__init__(model, sizes, depth=depth)
        self._tokenizer, self._positions = tokenizer, positions

    def check(self, *, length: int | None, layer: int) -> None:
        super().check(length=length, layer=layer)
        if length is not None and self._positions is not None and length > self._positions:
            raise ValueError(f"text_encoder.length: expected at most {self._positions} of this model, got {length}")

    def tokenise(self, prompts: list[str], *, length: int) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def encode(self, ids: Tensor, mask: Tensor, *, seen: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        output = self.model(input_ids=ids, attention_mask=seen.long(), output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        pooled = getattr(output, "text_embeds", None)
        if pooled is None:
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return states, pooled

    def count_long(self, prompts: list[str], *, length: int) -> int:
        # It has a warning of its own, without a count.
        return sum(len(ids) > length for ids in self._tokenizer(prompts, verbose=False)["input_ids"])


class _OpenCLIPTower(_Tower):
    def __init__(self, model: nn.Module, sizes: tuple[int, int, int], tokenizer: Any, *, depth: int) -> None:
        super().__init__(model, sizes, depth=depth)
        self._tokenizer = tokenizer

    def check(self, *, length: int | None, layer: int) -> None:
        super().check(length=length, layer=layer)
        if length not in (None, self.sizes[0]):  # its positions are added whole
            raise ValueError(f"text_encoder.length: expected {self.sizes[0]} of this model of open_clip, got {length}")

    def tokenise(self, prompts: list[str], *, length: int) -> tuple[Tensor, Tensor]:
        ids = self._tokenizer(prompts, context_length=length)
        return ids, ids != 0

    def encode(self, ids: Tensor, mask: Tensor, *, seen: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        output = model.forward_intermediates(
            text=ids, text_indices=-layer, normalize=False, normalize_intermediates=layer == -1
        )
        return output["text_intermediates"][layer], output["text_features"]

    def count_long(self, prompts: list[str], *, length: int) -> int:
        longer = self._tokenizer(prompts, context_length=4 * length)
        return int((longer[:, length:] != 0).any(dim=1).sum())


def _open_transformers(source: str, subfolder: str, *, quick_gelu: bool) -> _Tower:
    transformers = _import("transformers", source, package="transformers")
    try:
        folder = Path(source, subfolder)
        if (Path(source).is_absolute() or Path(source).is_dir()) and not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")  # the library takes it for a hub id
        config = transformers.AutoConfig.from_pretrained(source, subfolder=subfolder)
        is_clip, text = config.model_type in ("clip", "clip_text_model"), getattr(config, "text_config", config)
        family: Any = transformers.AutoModel
        if is_clip:
            family, text.projection_dim = transformers.CLIPTextModelWithProjection, config.projection_dim
            if quick_gelu:
                text.hidden_act = "quick_gelu"
        elif config.model_type == "t5":
            family = transformers.T5EncoderModel
        with _quiet(transformers):  # of the image tower, which is not wanted
            model, found = family.from_pretrained(
                source, subfolder=subfolder, config=text, weights_only=True, output_loading_info=True
            )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"no weights for {missing[0]!r}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, subfolder="tokenizer" if subfolder else "")
    except Exception as error:  # transformers, torch and the hub each have errors of their own
        raise _cannot_open(source, error) from error
    width = text.hidden_size
    pooled = text.projection_dim if is_clip else width
    positions = getattr(text, "max_position_embeddings", None)  # T5 has none: its positions are relative
    sizes = (positions or _LENGTH, width, pooled)
    return _TransformersTower(model, sizes, tokenizer, depth=text.num_hidden_layers + 1, positions=positions)


def _open_open_clip(source: str, *, quick_gelu: bool) -> _Tower:
    open_clip = _import("open_clip", source, package="open_clip_torch")
    if not source.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(f"text_encoder.source: expected local-dir:FOLDER or hf-hub:OWNER/NAME, got {source!r}")
    try:
        openais = source.lower().endswith("openai")
        model = open_clip.create_model(source, weights_only=True, force_quick_gelu=quick_gelu or openais)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip, torch and the hub each have errors of their own
        raise _cannot_open(source, error) from error
    if lacking := [name for name in ("ln_final", "text_projection", "context_length") if not hasattr(model, name)]:
        raise ValueError(
            f"text_encoder.source: expected a CLIP with a text tower of open_clip's own, got one without {lacking[0]} "
            f"in {source!r}"
        )
    width = model.ln_final.normalized_shape[0]
    sizes = (model.context_length, width, model.text_projection.shape[1])
    return _OpenCLIPTower(model, sizes, tokenizer, depth=len(model.transformer.resblocks))


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
    return ValueError(f"text_encoder.source: expected a text model in {source!r}, got an error ({reason_of(error)})")
