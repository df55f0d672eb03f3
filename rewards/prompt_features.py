"""Features of prompts, encoded once each."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PromptFeatures:
    """Encodes prompts with a text tower and keeps the results of the latest ones.

    Moving the model, changing its precision or loading other weights makes it forget them.

    Args:
        model: Has `encode_text(tokens (B, L)) -> (B, D)` and a parameter `logit_scale`.
        tokenizer: `tokenizer(prompts, context_length=L)` gives token ids (B, L) int64, cut and padded to L; its
            attribute `context_length` is the model's L.
        name: Of the reward, for warnings and errors.
        capacity: Prompts kept, the latest used; D floats each.
    """

    def __init__(self, model: Any, *, tokenizer: Callable[..., Any], name: str, capacity: int = 4096) -> None:
        self.model = model
        self.tokenizer: Any = tokenizer
        self.name = name
        self.capacity = capacity
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._stamp: object = None

    def __call__(self, prompts: Sequence[str], *, device: torch.device) -> Tensor:
        """Unit vectors (B, D), in float32 or better, without a graph.

        A prompt that is longer than the context is cut, with a warning that says how many were.

        Raises:
            ValueError: A prompt is empty.
        """
        blank = sum(not prompt.strip() for prompt in prompts)
        if blank:
            raise ValueError(
                f"reward {self.name}: expected prompts that are not empty, got {blank} empty of {len(prompts)}"
            )
        self._forget_if_changed()
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._features]
        known = {prompt: self._features[prompt] for prompt in prompts if prompt in self._features}
        if fresh:
            known.update(zip(fresh, self._encode(fresh, device=device), strict=True))
        for prompt, feature in known.items():
            self._features[prompt] = feature
            self._features.move_to_end(prompt)
        while len(self._features) > self.capacity:
            self._features.popitem(last=False)
        return torch.stack([known[prompt] for prompt in prompts])

    def _forget_if_changed(self) -> None:
        # One parameter speaks for all: `.to()` and `load_state_dict` touch every one.
        scale = self.model.logit_scale
        stamp = (scale.device, scale.dtype, None if scale.is_inference() else scale._version)
        if stamp != self._stamp:
            self._features.clear()
            self._stamp = stamp

    def _encode(self, prompts: list[str], *, device: torch.device) -> Tensor:
        cut = int(self._is_cut(prompts).sum())
        if cut:
            length = self.tokenizer.context_length
            warnings.warn(f"reward {self.name}: cut {cut} of {len(prompts)} prompts to {length} tokens", stacklevel=4)
        # What is kept must serve later calls too: no inference tensors, and no autocast's precision.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            features = self.model.encode_text(self.tokenizer(prompts).to(device))
            return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def _is_cut(self, prompts: list[str]) -> Tensor:
        """(B,) bool: prompts whose tokens change when there is room for more.

        Some tokenizers put a token at the very end, which moves for every prompt: that place says nothing.
        """
        length = self.tokenizer.context_length

        def changes(texts: list[str]) -> Tensor:
            tokens: Tensor = self.tokenizer(texts)
            roomy: Tensor = self.tokenizer(texts, context_length=2 * length)
            return tokens != roomy[:, :length]

        return (changes(prompts) & ~changes(["a"])).any(dim=1)
