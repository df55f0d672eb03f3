"""MaskGIT (first PyTorch version) and the Taming VQGAN."""

import torch
from torch.nn import functional as F

from softgen.guidance import guided_logits
from softgen.models.conditions import ClassCondition
from softgen.models.maskgit import MaskGIT
from softgen.random import SampleRandom
from softgen.samplers.maskgit import PublishedMaskGITSampler, published_reveal_counts
from softgen.tokenizers.taming_vqgan import TamingVQGAN
from tests.parity.fixture import Family, Fixture, Outputs

_IMAGES, _LATENTS = 2e-5, 2e-5


def outputs(fixture: Fixture) -> Outputs:
    yield from _model(fixture)
    yield from _tokenizer(fixture)
    yield from _counts(fixture)


def _model(fixture: Fixture) -> Outputs:
    arguments = fixture.config["constructor"]["transformer"]
    model = MaskGIT.from_checkpoint(
        fixture.weights(), img_size=arguments["img_size"], heads=arguments["heads"], nclass=arguments["nclass"]
    )
    assert {name: value for name, value in arguments.items() if name != "dropout"}.items() <= model.config.items()
    tokens, labels = fixture["in.tokens"].flatten(1), fixture["in.labels"]
    condition = ClassCondition.of(labels)
    x = model.embed(tokens)
    yield "out.logits_cond", model.published_logits(x, condition)
    yield "out.logits_uncond", model.published_logits(x, condition.drop())
    yield "out.logits_mixed", model.published_logits(x, condition.drop(fixture["in.drop_mixed"]))
    scale = fixture["in.cfg_scale"].item()
    conditional, unconditional = (model.published_logits(x, c) for c in (condition, condition.drop()))
    yield "out.logits_cfg", torch.lerp(unconditional, conditional, scale)
    guided = guided_logits(model, x, condition, scale=scale)
    torch.testing.assert_close(guided, fixture["out.logits_cfg"][..., : model.num_codes], rtol=0, atol=1e-4)

    # Its own embedding takes distributions over the codes alone, and the mask as a mask.
    masked = tokens == model.mask_id
    one_hot = F.one_hot(tokens.masked_fill(masked, 0), model.num_codes).to(x.dtype)
    yield "out.logits_onehot_soft", model.published_logits(model.embed_soft(one_hot, masked), condition)
    # The fixture's distributions hold the mask too.
    probs = fixture["in.soft_probs"]
    on_mask = probs[..., -1:]
    codes = probs[..., :-1] / (1 - on_mask)
    soft = torch.lerp(model.embed_soft(codes), model.embed(torch.full_like(tokens, model.mask_id)), on_mask)
    yield "out.soft_embeddings", soft
    yield "out.logits_soft", model.published_logits(soft, condition)
    sigma = fixture["in.noise_sigma"]
    noisy = sigma * fixture["in.noise"] + (1 - sigma**2).sqrt() * x
    yield "out.logits_noise", model.published_logits(noisy, condition)

    sampler = PublishedMaskGITSampler(steps=4, guidance=1.5, temperature=0.1, confidence_noise=0.0, greedy=True)
    drawn = sampler(model, condition, SampleRandom(0, range(len(labels)), device=tokens.device))
    yield "out.greedy_sample_ids", drawn.view(fixture["in.tokens"].shape)


def _tokenizer(fixture: Fixture) -> Outputs:
    arguments = fixture.config["constructor"]["tokenizer"]
    images, ids = fixture["in.images"], fixture["in.decode_ids"]
    tokenizer = TamingVQGAN.from_checkpoint(fixture.weights("tokenizer_"), image_size=images.shape[-1])
    shown = ("ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels", "out_ch")
    assert all(tokenizer.config[name] == arguments["ddconfig"][name] for name in shown)
    side, dim = tokenizer.grid, tokenizer.code_dim
    latents = tokenizer.latents((images + 1) / 2)

    def as_grid(vectors: torch.Tensor) -> torch.Tensor:
        return vectors.transpose(1, 2).reshape(len(vectors), dim, side, side)

    yield "out.z_pre_quant", as_grid(latents), _LATENTS
    encoded = tokenizer.quantize(latents)
    yield "out.encode_ids", encoded.view(-1, side, side)
    yield "out.quant", as_grid(tokenizer.codebook[encoded]), _LATENTS
    yield "out.decode_from_encode", tokenizer.decode_raw(tokenizer.codebook[encoded]), _IMAGES
    yield "out.decode_images", tokenizer.decode_raw(tokenizer.codebook[ids.flatten(1)]), _IMAGES
    soft = tokenizer.embed_soft(fixture["in.code_probs"].flatten(1, 2))
    yield "out.soft_latent", as_grid(soft), _LATENTS
    yield "out.decode_soft", tokenizer.decode_raw(soft), _IMAGES


def _counts(fixture: Fixture) -> Outputs:
    for name in fixture.io:
        if name.startswith("sched.unmask_counts."):
            schedule, steps, patch = name.removeprefix("sched.unmask_counts.").split(".")
            sites = int(patch.removeprefix("patch")) ** 2
            counts = published_reveal_counts(
                schedule,  # type: ignore[arg-type]
                num_sites=sites,
                steps=int(steps.removeprefix("steps")),
            )
            yield name, torch.tensor(counts)


FAMILIES = {"maskgit": Family(outputs)}
