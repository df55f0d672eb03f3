"""What a text-conditional model reads, and when it asks its text encoder."""

import pytest
import torch

from softgen.models import MaskGen
from softgen.models.conditions import TextCondition
from softgen.models.pretrained_text import openai_clip_text
from tests.models.text_towers import LENGTH
from tests.test_convert_text import MASKGEN

WIDTH = 16


def conditions(length: int = LENGTH) -> TextCondition:
    return TextCondition.of(
        torch.randn(2, length, WIDTH), torch.ones(2, length, dtype=torch.bool), torch.randn(2, WIDTH)
    )


def test_a_tower_is_opened_for_what_may_be_dropped_alone() -> None:
    absent = openai_clip_text("/no/such/folder", layer=-2, length=LENGTH, width=WIDTH, pooled_width=WIDTH)
    model, given = MaskGen(**MASKGEN, text_encoder=absent), conditions()
    states, pooled = model.read(given)
    assert torch.equal(states, given.states)
    assert torch.equal(pooled, given.pooled)
    with pytest.raises(ValueError, match=r"^text_encoder.source: expected a text model in '/no/such/folder', got an"):
        model.read(given.drop(torch.tensor([False, True])))


def test_with_a_stored_negative_prompt_lengths_are_compared_though_nothing_is_dropped() -> None:
    model = MaskGen(**MASKGEN)
    model.store_negative(conditions()[:1])
    model.read(conditions())
    with pytest.raises(ValueError, match=r"^conditions: expected 7 text tokens as the negative prompt has, got 5$"):
        model.read(conditions(5))
