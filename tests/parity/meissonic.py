"""Meissonic, its tokenizer and its text encoder."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from softgen.models.conditions import TextCondition
from softgen.models.meissonic import Meissonic
from softgen.models.mmdit import frequencies
from softgen.random import SampleRandom
from softgen.samplers.meissonic import MeissonicSampler
from softgen.tokenizers.diffusers_vq import DiffusersVQ
from tests.parity.fixture import Family, Fixture, Outputs
from tests.parity.text_towers import opened, transformers_tower


def outputs(fixture: Fixture) -> Outputs:
    yield from _text(fixture)
    yield from _model(fixture)
    yield from _tokenizer(fixture)
    yield from _schedules(fixture)


def _text(fixture: Fixture) -> Outputs:
    with transformers_tower(
        fixture.config["constructor"]["text_encoder"], load_file(fixture.weights("text_encoder_"))
    ) as folder:
        encoder = opened(folder, layer=-2, attend_padding=True)
        for prefix in ("", "neg_"):
            ids = fixture[f"in.{prefix}text_ids"]
            condition = encoder.encode_ids(ids, torch.ones_like(ids, dtype=torch.bool))
            yield f"out.{prefix}text_hidden", condition.states
            yield f"out.{prefix}text_pooled", condition.pooled


def _open(fixture: Fixture, **options: Any) -> Meissonic:
    arguments = fixture.config["constructor"]["transformer"]
    model = Meissonic.from_checkpoint(
        fixture.weights(),
        grid=fixture.config["constructor"]["grid"],
        axes_dims_rope=arguments["axes_dims_rope"],
        **options,
    )
    ignored = ("patch_size", "in_channels", "upsample")
    assert arguments.get("patch_size", 1) == 1
    assert arguments.get("upsample", True) == arguments.get("downsample", True)
    shown = {name: value for name, value in arguments.items() if name not in ignored}
    assert shown.items() <= model.config.items()
    return model


def _condition(fixture: Fixture, prefix: str = "") -> TextCondition:
    states = fixture[f"out.{prefix}text_hidden"]
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    return TextCondition.of(states, mask, fixture[f"out.{prefix}text_pooled"])


def _model(fixture: Fixture) -> Outputs:
    model, after = _open(fixture), _open(fixture, soft_placement="post_embed")
    tokens = fixture["in.tokens"]
    rows, columns = tokens.shape[1:]
    ids, condition, negative = tokens.flatten(1), _condition(fixture), _condition(fixture, "neg_")

    def logits(embeddings: Tensor, of: TextCondition = condition, *, times: Tensor | float = 0.0) -> Tensor:
        told = fixture["in.micro_conds"]
        scale = fixture.io.get("in.guidance")
        given = model.predict(embeddings, of, timestep=times, guidance_scale=scale, micro_conditions=told).logits
        return as_grid(given)

    def as_grid(vectors: Tensor) -> Tensor:
        return vectors.transpose(1, 2).unflatten(2, (rows, columns))

    factor = 2 if model.downsample else 1
    places = torch.cartesian_prod(torch.arange(rows // factor), torch.arange(columns // factor))
    yield "out.img_ids", F.pad(places, (1, 0)).float()
    rotation = model.rotation(condition.states.shape[1], tokens.device)
    yield "out.rope_cos", rotation.cos, 1e-6
    yield "out.rope_sin", rotation.sin, 1e-6

    x = model.embed(ids)
    yield "out.embed_tokens", as_grid(x)
    yield "out.logits_cond", logits(x)
    yield "out.logits_uncond", logits(x, negative)
    for name in ("index", "train"):
        given, expected = fixture[f"in.timestep_{name}"], fixture[f"out.logits_cond_t_{name}"]
        yield f"out.logits_cond_t_{name}", _whatever_the_rounding(partial(logits, x, times=given), expected)
    guided = torch.lerp(logits(x, negative), logits(x), fixture["in.cfg_scale"].item())
    yield "out.logits_cfg_seq", guided.flatten(2).transpose(1, 2)
    table = model.embedder(model.embedder.embeddings.weight)
    yield "out.post_embed_table", table

    # Its own embedding takes distributions over the codes alone, and the mask as a mask.
    masked = ids == model.mask_id
    in_codes = ids < model.num_codes
    if bool((masked | in_codes).all()):
        one_hot = F.one_hot(ids.masked_fill(masked, 0), model.num_codes).float()
        own = {name: placed.embed_soft(one_hot, masked) for name, placed in (("A", model), ("B", after))}
    else:
        one_hot = F.one_hot(ids, model.config["vocab_size"]).float()
        own = {"A": model.embedder(one_hot @ model.embedder.embeddings.weight), "B": one_hot @ table}
    for name, placed in own.items():
        yield f"out.logits_onehot_soft_{name}", logits(placed)
    # The fixture's distributions hold every row of the table.
    probs = fixture["in.soft_probs"].flatten(1, 2)
    yield "out.logits_soft_A", logits(model.embedder(probs @ model.embedder.embeddings.weight))
    yield "out.logits_soft_B", logits(probs @ table)
    codes = fixture["in.soft_probs_image"].flatten(1, 2)
    yield "out.logits_soft_image_A", logits(model.embed_soft(codes))
    yield "out.logits_soft_image_B", logits(after.embed_soft(codes))
    sigma, noise = fixture["in.noise_sigma"], fixture["in.noise"].flatten(2).transpose(1, 2)
    yield "out.logits_noise", logits(sigma * noise + (1 - sigma**2).sqrt() * x)

    drawn = _greedy(fixture, model, condition, negative)
    yield "out.greedy_sample_ids", drawn.unflatten(1, (rows, columns))


def _whatever_the_rounding(compute: Callable[[], Tensor], expected: Tensor) -> Tensor:
    """What comes nearest to `expected` with each near-tie among the sinusoid's frequencies rounded up or down.

    Arguments reach 1e6, where one bit of a frequency moves logits by 1e-2, and libraries' exponentials differ in how
    they round what is nearly in the middle between two floats. All else is as the model computes it.
    """
    half = 128
    exact = (-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).double().exp()
    chosen = exact.float()
    below = exact < chosen.double()
    other = torch.where(below, chosen.nextafter(torch.tensor(0.0)), chosen.nextafter(torch.tensor(2.0)))
    middle = (chosen.double() + other.double()) / 2
    ties = ((exact - middle).abs() < 0.04 * (chosen.double() - other.double()).abs()).nonzero().flatten().tolist()
    assert torch.equal(frequencies(half, period=10000.0, device=torch.device("cpu")), chosen)
    best = None
    for index in (None, *ties, *ties):
        tried = chosen.clone()
        if index is not None:
            tried[index] = other[index] if tried[index] != other[index] else exact[index].float()
        with mock.patch("softgen.models.meissonic_parts.frequencies", lambda *_, tried=tried, **__: tried):
            value = compute()
        error = (value - expected).square().sum().item()
        if best is None or error < best[0]:
            best, chosen = (error, value), tried
    assert best is not None
    return best[1]


def _greedy(fixture: Fixture, model: Meissonic, condition: TextCondition, negative: TextCondition) -> Tensor:
    """Sample by sample, since each has a negative prompt and micro-conditions of its own."""
    sampler = MeissonicSampler(steps=4, guidance=3.0, confidence_noise=(0.0, 0.0), greedy=True)
    drawn = []
    for index in range(len(condition)):
        one = torch.tensor([index])
        model.store_negative(negative[one])
        model.micro_conditions = tuple(fixture["in.micro_conds"][index].tolist())
        drawn.append(sampler(model, condition[one], SampleRandom(0, [0], device=torch.device("cpu"))))
    return torch.cat(drawn)


def _tokenizer(fixture: Fixture) -> Outputs:
    arguments, images = fixture.config["constructor"]["tokenizer"], fixture["in.images"]
    side = images.shape[-1]
    tokenizer = DiffusersVQ.from_checkpoint(
        fixture.weights("tokenizer_"), image_size=side, norm_num_groups=arguments["norm_num_groups"]
    )
    shown = ("block_out_channels", "layers_per_block", "latent_channels", "num_vq_embeddings", "norm_num_groups")
    assert all(tokenizer.config[name] == arguments[name] for name in shown)
    assert tokenizer.code_dim == (arguments.get("vq_embed_dim") or arguments["latent_channels"])

    def as_grid(vectors: Tensor) -> Tensor:
        return vectors.movedim(-1, 1)

    z = tokenizer.latent_grid(images)
    yield "out.z_pre_quant", z
    encoded = tokenizer.quantize(z.movedim(1, -1))
    yield "out.encode_ids", encoded
    quantised = as_grid(tokenizer.codebook[encoded])
    yield "out.quant", quantised
    yield "out.decode_from_encode", tokenizer.decode_grid(quantised)
    yield "out.decode_images", tokenizer.decode_grid(as_grid(tokenizer.codebook[fixture["in.decode_ids"]]))
    soft = as_grid(tokenizer.embed_soft(fixture["in.code_probs"]))
    yield "out.soft_latent", soft
    yield "out.decode_soft", tokenizer.decode_grid(soft)


def _schedules(fixture: Fixture) -> Outputs:
    for name in fixture.io:
        if name.startswith("sched.temperatures."):
            steps = int(name.removeprefix("sched.temperatures.steps"))
            yield name, MeissonicSampler(steps=steps).confidence_scales(), 1e-6
        elif name.startswith("sched.masked_left."):
            schedule, steps_text, sites_text = name.removeprefix("sched.masked_left.").split(".")
            sampler = MeissonicSampler(steps=int(steps_text.removeprefix("steps")), schedule=schedule)  # type: ignore[arg-type]
            sites = left = int(sites_text.removeprefix("seq"))
            counts = []
            for step in range(sampler.steps):
                left = sampler.masked_after(step, left, num_sites=sites)
                counts.append(left)
            yield name, torch.tensor(counts)


FAMILIES = {"meissonic": Family(outputs, tolerance=5e-5)}
