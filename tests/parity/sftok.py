"""SFTok: quantiser, multi-step decoder, inputs and losses of its training."""

from collections.abc import Iterator

import torch
from torch import Tensor

from softgen.categorical import StoredNoise
from softgen.tokenizers.optvq import straight_through
from softgen.tokenizers.parts import nearest_code
from softgen.tokenizers.sftok import SFTok
from softgen.tokenizers.sftok_decoder import proxy_loss, self_forced_input
from tests.parity.fixture import Family, Fixture, Outputs


def outputs(fixture: Fixture) -> Outputs:
    tokenizer = _open(fixture)
    images, decoder = fixture["in.image"], tokenizer.decoder
    yield "out.z", tokenizer.raw_latents(images).transpose(1, 2).unsqueeze(2)
    yield "out.codebook", tokenizer.codebook
    latents = tokenizer.latents(images)
    encoded = tokenizer.encode(images)
    yield "out.encode_ids", encoded.unsqueeze(1)
    yield "out.encode_ids_each", torch.cat([tokenizer.encode(image) for image in images.split(1)]).unsqueeze(1)
    yield "out.encode_ids_nearest", nearest_code(latents, tokenizer.codebook).unsqueeze(1)
    assigned = straight_through(
        latents, tokenizer.codebook[encoded], commitment=fixture.config["args"]["model"]["vq_model"]["commitment_cost"]
    )
    yield "out.encode_zq", assigned.embeddings.transpose(1, 2).unsqueeze(2)
    yield "out.quantizer_loss", assigned.loss.view(1)

    codes = tokenizer.codebook[fixture["in.ids"]]
    yield "out.decode_z", codes.transpose(1, 2).unsqueeze(2)
    soft = tokenizer.embed_soft(fixture["in.soft_probs"])
    yield "out.soft_z", soft.transpose(1, 2).unsqueeze(2)
    masked, proxies, target = fixture["in.mask"], fixture["in.proxy_in"], fixture["in.proxy_target"]
    first = decoder.proxy_logits(torch.full_like(proxies, decoder.mask_id), codes)
    partial = decoder.proxy_logits(proxies, codes)
    yield "out.logits_allmask", first
    yield "out.logits_partial", partial
    yield "out.logits_soft_latent", decoder.proxy_logits(proxies, soft)
    yield "out.logits_soft_proxy", decoder(decoder.embed_soft(fixture["in.proxy_soft"], masked), codes)
    yield "out.loss_partial", proxy_loss(partial, target, masked).view(1)
    yield "out.loss_allmask", proxy_loss(first, target).view(1)
    yield from _self_forced(fixture, first.argmax(dim=-1))
    yield from _refined(fixture, tokenizer, codes)
    if tokenizer.config["pixel_decoder"] is not None:
        yield "out.image_one_step", tokenizer.pixels(first)
        yield "out.decode_tokens_image", tokenizer.decode_raw(codes)


def _open(fixture: Fixture) -> SFTok:
    model, table = fixture.config["args"]["model"], fixture.config["size_table"]
    vq, decoder, sampler = model["vq_model"], model["decoder"], model.get("generator") or model["decoder"]
    tokenizer = SFTok.from_checkpoint(
        fixture.weights(),
        use_l2_norm=vq["use_l2_norm"],
        is_legacy=vq.get("is_legacy", True),
        encoder_heads=table[vq["vit_enc_model_size"]]["heads"],
        decoder_heads=table[decoder["vit_dec_model_size"]]["heads"],
        eval="published",
        steps=sampler["num_steps"],
        temperature=sampler["randomize_temperature"],
    )
    for name in ("codebook_size", "token_size", "num_latent_tokens", "use_l2_norm"):
        assert tokenizer.config[name] == vq[name]
    assert tokenizer.decoder.num_proxies == decoder["num_proxy_codes"]
    assert tokenizer.config["proxy_codebook_size"] == decoder["codebook_size"]
    return tokenizer


def _self_forced(fixture: Fixture, guided: Tensor) -> Iterator[tuple[str, Tensor]]:
    args = fixture.config["args"]
    training, decoder = args["training"], args["model"]["decoder"]
    stages = {"mask2": decoder["replace_prob"], "mask2full": 1.0, "mask3": None}
    for name, replace_prob in stages.items():
        given = self_forced_input(
            guided,
            _stored(fixture, name),
            mask_id=decoder["codebook_size"],
            truth=None if replace_prob is None else fixture["in.proxy_target"],
            replace_prob=1.0 if replace_prob is None else replace_prob,
            schedule=training["mask_schedule"],
            power=training["mask_power"],
            min_ratio=training["min_mask_ratio"],
            max_ratio=training["max_mask_ratio"],
        )
        yield f"out.{name}_tokens", given.tokens
        yield f"out.{name}_masks", given.masked


def _refined(fixture: Fixture, tokenizer: SFTok, codes: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, options in fixture.config["generate"].items():
        refined = tokenizer.refine(
            codes,
            _stored(fixture, name) if f"in.{name}.noise.000" in fixture.io else None,
            steps=options["num_sample_steps"],
            temperature=options["randomize_temperature"],
            anneal=options.get("softmax_temperature_annealing", False),
        )
        yield f"out.{name}_ids", refined.tokens
        yield f"out.{name}_logits", refined.logits


def _stored(fixture: Fixture, name: str) -> StoredNoise:
    return StoredNoise([fixture[key] for key in sorted(fixture.io) if key.startswith(f"in.{name}.noise.")])


FAMILIES = {"sftok": Family(outputs)}
