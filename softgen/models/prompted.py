"""What published text-to-image models share: a frozen text encoder, and a negative prompt as the null condition.

Shape legend: B batch, T text tokens, c width of a state, p width of the pooled vector.
"""

import torch
from torch import Tensor

from softgen.models.base import MaskedDiffusionModel
from softgen.models.conditions import Asked, Condition, TextCondition
from softgen.models.text import TextEncoder


class PromptedModel(MaskedDiffusionModel):
    """Reads encoded prompts; where the condition is dropped, the negative prompt in their place.

    The negative prompt is encoded once, by the model's own text encoder. A model without one can hold the result
    instead (`store_negative`); with neither it has no null condition.

    Args:
        text_encoder: What reads the prompts; None for a model that is given encoded ones alone.
        negative_prompt: The unconditional prompt, often empty.
        negative_length: T of a stored negative prompt; 0 for none.
        states_width: c that the model takes.
        pooled_width: p that the model takes.

    Raises:
        ValueError: If the text encoder gives other widths.
    """

    negative_states: Tensor
    negative_pooled: Tensor

    def __init__(
        self,
        *,
        text_encoder: TextEncoder | None,
        negative_prompt: str,
        negative_length: int,
        states_width: int,
        pooled_width: int,
    ) -> None:
        super().__init__()
        if text_encoder is not None:
            for name, expected in (("width", states_width), ("pooled_width", pooled_width)):
                if getattr(text_encoder, name) != expected:
                    got = getattr(text_encoder, name)
                    raise ValueError(f"model.text_encoder.{name}: expected {expected} as the model takes, got {got}")
        self.text = text_encoder
        self.negative_prompt = negative_prompt
        self.states_width, self.pooled_width = states_width, pooled_width
        self.has_null_condition = text_encoder is not None or negative_length > 0
        self._stored = negative_length > 0
        self._negative_cache: TextCondition | None = None
        if negative_length:
            self._hold_negative(torch.zeros(negative_length, states_width), torch.zeros(pooled_width))

    @property
    def text_encoder(self) -> TextEncoder | None:
        """See the base class."""
        return self.text

    @property
    def condition_dim(self) -> int:
        """See the base class."""
        return self.pooled_width

    def encode(self, asked: Asked) -> Condition:
        """See the base class.

        Raises:
            ValueError: Labels, or a model without a text encoder.
        """
        if self.text is None:
            raise ValueError("conditions: expected a model with a text encoder, got one that takes encoded prompts")
        return super().encode(asked)

    def store_negative(self, condition: TextCondition) -> None:
        """Keep an encoded negative prompt, a batch of one, with the weights, so that no text encoder is needed for it.

        Raises:
            ValueError: If its widths are not those that the model takes.
        """
        expected = (self.states_width, self.pooled_width)
        got = (condition.states.shape[-1], condition.pooled.shape[-1])
        if got != expected or len(condition) != 1:
            raise ValueError(f"negative: expected one prompt of widths {expected}, got {len(condition)} of {got}")
        self._hold_negative(condition.states[0].detach().clone(), condition.pooled[0].detach().clone())
        self.config["negative_length"] = condition.states.shape[1]
        self._stored = self.has_null_condition = True

    def _hold_negative(self, states: Tensor, pooled: Tensor) -> None:
        self.register_buffer("negative_states", states)
        self.register_buffer("negative_pooled", pooled)

    def read(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """States (B, T, c) and pooled (B, p), those of the negative prompt where the condition is dropped.

        Raises:
            ValueError: If something is dropped and there is no negative prompt, or its length is another.
        """
        assert isinstance(condition, TextCondition)
        states, pooled = condition.states, condition.pooled
        # A text tower is opened for what may be dropped: a student never asks for it.
        if not self._has_negative_at_hand(states) and condition.nothing_dropped:
            return states, pooled
        negative = self._negative(states)
        if negative[0].shape[0] != states.shape[1]:
            raise ValueError(
                f"conditions: expected {negative[0].shape[0]} text tokens as the negative prompt has, "
                f"got {states.shape[1]}"
            )
        dropped = condition.dropped.unsqueeze(-1)
        return torch.where(dropped.unsqueeze(-1), negative[0], states), torch.where(dropped, negative[1], pooled)

    def _has_negative_at_hand(self, like: Tensor) -> bool:
        kept = self._negative_cache
        return self._stored or (kept is not None and kept.states.device == like.device)

    def _negative(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self._stored:
            return self.negative_states.to(like), self.negative_pooled.to(like)
        if self.text is None:
            raise ValueError(
                "guidance: expected a text encoder or a stored negative prompt for the null condition, got neither"
            )
        kept = self._negative_cache
        if kept is None or not self._has_negative_at_hand(like):
            # Kept for training too, where tensors made in inference mode cannot enter.
            with torch.inference_mode(mode=False), torch.no_grad():
                kept = self.text([self.negative_prompt]).to(like.device)
            # An encoder with weights of its own in the model may still change.
            self._negative_cache = None if any(True for _ in self.text.parameters()) else kept
        return kept.states[0].to(like.dtype), kept.pooled[0].to(like.dtype)
