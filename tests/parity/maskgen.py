"""MaskGen-VQ, and the tokenizer TA-TiTok."""

from typing import Any

import torch
from torch.nn import functional as F

from softgen.categorical import StoredNoise
from softgen.models.conditions import TextCondition
from softgen.models.maskgen import MaskGen
from softgen.samplers.maskgen import MaskGenSampler
from softgen.tokenizers.tatitok import TATiTok
from tests.parity.fixture import Family, Fixture, Outputs


def maskgen(fixture: Fixture) -> Outputs:
    settings, vq = (fixture.config["args"]["model"][name] for name in ("maskgen", "vq_model"))
    model = MaskGen.from_checkpoint(
        fixture.weights(),
        decoder_num_heads=settings.get("decoder_num_heads", 16),
        condition_num_classes=settings.get("condition_num_classes", 1000),
        aesthetic_score=settings.get("sample_aesthetic_score", 6.0),
    )
    names = ["decoder_embed_dim", "decoder_depth", "micro_condition", "weight_tying"]
    names += ["micro_condition_embed_dim"] if model.micro_condition else []
    assert all(settings.get(name, model.config[name]) == model.config[name] for name in names)
    assert all(model.config[name] == vq[name] for name in ("codebook_size", "num_latent_tokens", "text_embed_dim"))

    condition, negative = (_condition(fixture, prefix) for prefix in ("cond", "uncond"))
    model.store_negative(negative)
    ids, scores = fixture["in.ids"], fixture.io.get("in.aes")
    x = model.embed(ids)
    logits = model.predict(x, condition, aesthetic_score=scores).logits
    yield "out.logits_cond", logits
    yield "out.logits_uncond", model.predict(x, condition.drop(), aesthetic_score=scores).logits
    soft = model.embed_soft(fixture["in.soft_probs"])
    yield "out.logits_soft", model.predict(soft, condition, aesthetic_score=scores).logits
    yield "out.mlm_loss", _loss(logits, fixture["in.target"], fixture["in.mask"]).view(1)
    for name, options in fixture.config["generate"].items():
        noise = [fixture[key] for key in sorted(fixture.io) if key.startswith(f"in.{name}.")]
        yield f"out.{name}", _sampler(options)(model, condition, StoredNoise(noise))


def _condition(fixture: Fixture, name: str) -> TextCondition:
    states = fixture[f"in.{name}"]
    pooled = fixture["in.pooled" if name == "cond" else "in.uncond_pooled"]
    return TextCondition.of(states, torch.ones(states.shape[:2], dtype=torch.bool), pooled.squeeze(1))


def _loss(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The generators' training loss, section 0.5 of their description."""
    losses = F.cross_entropy(logits.transpose(1, 2), target, label_smoothing=0.1, reduction="none")
    weights = torch.where(mask, 1.0, 0.1)
    return (losses * weights).sum() / (weights.sum() + 1e-8)


def _sampler(options: dict[str, Any]) -> MaskGenSampler:
    return MaskGenSampler(
        steps=options["num_sample_steps"],
        guidance=options["guidance_scale"],
        guidance_decay=options["guidance_decay"],
        guidance_power=options.get("guidance_decay_scale_pow", 1.0),
        randomize_temperature=options["randomize_temperature"],
        anneal=options.get("softmax_temperature_annealing", True),
        prob_sorting=options.get("prob_sorting", True),
        aesthetic_score=None,  # the published argument is a flag: the score is the config's
    )


def tatitok(fixture: Fixture) -> Outputs:
    vq, table = fixture.config["args"]["model"]["vq_model"], fixture.config["size_table"]
    heads = {part: table[vq[f"vit_{part}_model_size"]]["heads"] for part in ("enc", "dec")}
    tokenizer = TATiTok.from_checkpoint(
        fixture.weights(), use_l2_norm=vq["use_l2_norm"], encoder_heads=heads["enc"], decoder_heads=heads["dec"]
    )
    shown = ("codebook_size", "token_size", "num_latent_tokens", "use_l2_norm", "text_context_length", "text_embed_dim")
    assert all(vq.get(name, tokenizer.config[name]) == tokenizer.config[name] for name in shown)
    assert tokenizer.image_size == fixture.config["args"]["dataset"]["preprocessing"]["crop_size"]

    images = fixture["in.image"]
    yield "out.z", tokenizer.raw_latents(images).transpose(1, 2).unsqueeze(2)
    encoded = tokenizer.encode(images)
    yield "out.encode_ids", encoded.unsqueeze(1)
    yield "out.encode_zq", tokenizer.codebook[encoded].transpose(1, 2).unsqueeze(2)
    told = tokenizer.under_states(fixture["in.text_guidance"])
    yield "out.decode_image", told.decode_raw(tokenizer.codebook[fixture["in.ids"]])
    soft = tokenizer.embed_soft(fixture["in.soft_probs"])
    yield "out.soft_z", soft.transpose(1, 2).unsqueeze(2)
    yield "out.soft_image", told.decode_raw(soft)


FAMILIES = {"maskgen_vq": Family(maskgen), "tatitok": Family(tatitok)}
