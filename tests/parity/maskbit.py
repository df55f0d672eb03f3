"""MaskBit: the model, its tokenizer (and VQGAN+ with a table), its sampler."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from softgen.bits import combine_ids, split_ids
from softgen.models.conditions import ClassCondition
from softgen.models.maskbit import MaskBit
from softgen.random import SampleRandom
from softgen.samplers.maskbit import MaskBitSampler, remasked_share
from softgen.tokenizers.maskbit import MaskBitTokenizer
from softgen.tokenizers.vqgan_plus import VQGANPlusTokenizer
from tests.parity.fixture import Family, Fixture, Outputs

_TRAINING = ("codebook_size", "dropout")
_OF_TOKENIZER = (
    "hidden_channels",
    "channel_mult",
    "num_res_blocks",
    "num_res_blocks_decoder",
    "sample_with_conv",
)


def outputs(fixture: Fixture) -> Outputs:
    model = _open_model(fixture)
    tokenizer = _open_tokenizer(fixture, splits=model.config["codebook_splits"])
    yield from _model(fixture, model)
    yield from _ids(fixture, model)
    yield from _tokenizer(fixture, tokenizer)
    yield from _sampler(fixture, model, tokenizer)
    for name in fixture.io:
        if name.startswith("sched.mask_ratio."):
            schedule, steps = name.removeprefix("sched.mask_ratio.").split(".steps")
            progress = torch.arange(1, int(steps) + 1) / int(steps)
            yield name, remasked_share(schedule, progress)  # type: ignore[arg-type]


def _open_model(fixture: Fixture) -> MaskBit:
    arguments = fixture.config["constructor"]["generator"]
    wanted = {name: value for name, value in arguments.items() if name not in _TRAINING}
    wanted["bits"] = arguments["codebook_size"].bit_length() - 1
    model = MaskBit.from_checkpoint(fixture.weights(), **wanted)
    # All but these shows in the shapes.
    hidden = {name: wanted[name] for name in ("heads", "input_stride", "codebook_splits")}
    assert MaskBit.from_checkpoint(fixture.weights(), **hidden).config == model.config
    assert wanted.items() <= model.config.items()
    return model


def _open_tokenizer(fixture: Fixture, *, splits: int) -> MaskBitTokenizer | VQGANPlusTokenizer:
    arguments = fixture.config["constructor"]["tokenizer"]
    wanted: dict[str, Any] = {name: arguments[name] for name in _OF_TOKENIZER if arguments.get(name) is not None}
    wanted["image_size"] = fixture["in.images"].shape[-1]
    weights = fixture.weights("tokenizer_")
    if arguments["quantizer_type"] == "lookup":
        unit = any(bool(value) for name, value in arguments.items() if name.startswith("use_l2"))
        return VQGANPlusTokenizer.from_checkpoint(
            weights, token_size=arguments["token_size"], use_l2_normalisation=unit, **wanted
        )
    return MaskBitTokenizer.from_checkpoint(weights, bits=arguments["token_size"], codebook_splits=splits, **wanted)


def _model(fixture: Fixture, model: MaskBit) -> Outputs:
    groups = fixture["in.tokens"]
    tokens, condition = groups.flatten(1), ClassCondition.of(fixture["in.labels"])

    def logits(bits: Tensor, asked: ClassCondition = condition) -> Tensor:
        out: Tensor = model(bits, asked)
        return out.view(*groups.shape, model.num_codes)

    bits = model.embed(tokens)
    yield "out.input_bits", bits
    yield "out.logits_cond", logits(bits)
    yield "out.logits_uncond", logits(bits, condition.drop())
    yield "out.logits_mixed", logits(bits, condition.drop(fixture["in.drop_mixed"]))
    masked = tokens == model.mask_id
    one_hot = F.one_hot(tokens.masked_fill(masked, 0), model.num_codes).to(bits.dtype)
    yield "out.logits_onehot_soft", logits(model.embed_soft(one_hot, masked))
    # The fixture's distributions hold the mask too, whose bits are 0.
    soft = model.embed_soft(fixture["in.soft_probs"].flatten(1, 2)[..., : model.num_codes])
    yield "out.soft_bits", soft
    yield "out.logits_soft", logits(soft)


def _ids(fixture: Fixture, model: MaskBit) -> Outputs:
    bits, groups = model.config["bits"], model.config["codebook_splits"]
    split = split_ids(fixture["in.flat_ids"], bits=bits, groups=groups)
    yield "out.split_ids", split
    yield "out.combined_ids", combine_ids(split, bits=bits)


def _tokenizer(fixture: Fixture, tokenizer: MaskBitTokenizer | VQGANPlusTokenizer) -> Outputs:
    side, batch = tokenizer.grid, len(fixture["in.images"])

    def as_grid(vectors: Tensor) -> Tensor:
        return vectors.reshape(len(vectors), side**2, -1).transpose(1, 2).unflatten(2, (side, side))

    def split(ids: Tensor) -> Tensor:
        return tokenizer.split(ids) if isinstance(tokenizer, MaskBitTokenizer) else ids

    latents = tokenizer.latents(fixture["in.images"])
    tokens = tokenizer.quantize(latents)
    assert torch.equal(tokenizer.encode(fixture["in.images"]), tokens)
    ids = tokenizer.combine(tokens) if isinstance(tokenizer, MaskBitTokenizer) else tokens
    yield "out.z_pre_quant", as_grid(tokenizer.encode_raw(fixture["in.images"]))
    yield "out.quant", as_grid(tokenizer.codebook[tokens])
    yield "out.encode_ids", ids.view(batch, side, side)
    yield "out.decode_from_encode", tokenizer.decode_raw(tokenizer.codebook[split(ids)])
    yield "out.decode_images", tokenizer.decode_raw(tokenizer.codebook[split(fixture["in.flat_ids"])])
    probs = fixture["in.code_probs"]
    soft = tokenizer.embed_soft(probs.reshape(len(probs), -1, tokenizer.num_codes))
    yield "out.soft_latent", as_grid(soft)
    yield "out.decode_soft", tokenizer.decode_raw(soft)
    yield "out.decode_latents", tokenizer.decode_raw(fixture["in.latents"].flatten(2).transpose(1, 2))


def _sampler(fixture: Fixture, model: MaskBit, tokenizer: MaskBitTokenizer | VQGANPlusTokenizer) -> Outputs:
    labels = fixture["in.labels"]
    sampler = MaskBitSampler(steps=5, guidance=1.5, guidance_power=3.0, confidence_noise=0.0, greedy=True)
    noise = SampleRandom(0, range(len(labels)), device=labels.device)
    tokens = sampler(model, model.encode(labels), noise)
    yield "out.greedy_sample_ids", tokens.view(fixture["in.tokens"].shape)
    if isinstance(tokenizer, MaskBitTokenizer):
        yield "out.greedy_sample_images", tokenizer.decode_raw(tokenizer.codebook[tokens])


FAMILIES = {"maskbit": Family(outputs, tolerance=2e-5)}
