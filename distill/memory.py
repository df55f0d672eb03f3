"""What `SoftDiMO` does to fit large models: frozen parts in half precision, blocks recomputed, casts not kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_warn

from softgen.models.base import MaskedDiffusionModel
from softgen.models.text import TextEncoder
from softgen.relaxation import widen
from softgen.tokenizers.base import ImageTokenizer


def widen_weights(model: MaskedDiffusionModel) -> MaskedDiffusionModel:
    """The model, its weights in float32 at least, in place: of narrower ones most small updates round to nothing."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = widen(tensor.data)
    return model


def halve_around_codebook(tokenizer: ImageTokenizer) -> None:
    """All weights to bfloat16 but those of the codebook, which nearest codes and expectations are taken of."""
    codes = tokenizer.codebook_weight().untyped_storage()
    for tensor in (*tokenizer.parameters(), *tokenizer.buffers()):
        # By identity: on the meta device all storages have the same address.
        if tensor.is_floating_point() and tensor.untyped_storage() is not codes:
            tensor.data = tensor.data.to(torch.bfloat16)
    for module in tokenizer.modules():
        if isinstance(module, TextEncoder):  # whose tower is no parameter of it
            module.to(torch.bfloat16)


@contextmanager
def kept_casts(*, wanted: bool) -> Iterator[None]:
    """Whether autocast keeps the copies of weights that it makes, half a model's size, to the end of a step."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(before and wanted)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def recompute(model: MaskedDiffusionModel) -> None:
    """Have a model recompute its blocks in the backward pass; one that cannot is warned of."""
    if "checkpoint_activations" not in vars(model):
        rank_zero_warn(f"model.checkpoint_activations: ignored by {type(model).__name__}, which keeps its activations")
    model.checkpoint_activations = True
