"""ImageBert and UViTBert, TiTok's generators."""

from typing import Any

import torch
from torch.nn import functional as F

from softgen.categorical import StoredNoise
from softgen.models.conditions import ClassCondition
from softgen.models.titok_generators import ImageBert, UViTBert
from softgen.samplers.titok import TiTokSampler
from tests.parity.fixture import Family, Fixture, Outputs


def outputs(fixture: Fixture) -> Outputs:
    arguments = fixture.config["args"]["model"]
    settings = arguments["generator"]
    cls = {"ViT": ImageBert, "UViT": UViTBert}[settings["model_type"]]
    model = cls.from_checkpoint(fixture.weights(), num_attention_heads=settings["num_attention_heads"])
    shown = ("hidden_size", "num_hidden_layers", "intermediate_size", "image_seq_len", "condition_num_classes")
    assert all(model.config[name] == settings[name] for name in shown)
    assert model.num_codes == arguments["vq_model"]["codebook_size"]

    ids, condition = fixture["in.ids"], ClassCondition.of(fixture["in.label"])
    logits = model(model.embed(ids), condition)
    yield "out.logits_cond", logits
    yield "out.logits_uncond", model(model.embed(ids), condition.drop())
    yield "out.logits_soft", model(model.embed_soft(fixture["in.soft_probs"]), condition)
    yield "out.mlm_loss", _loss(logits, fixture["in.target"], fixture["in.mask"]).view(1)
    for name, options in fixture.config["generate"].items():
        noise = [fixture[key] for key in sorted(fixture.io) if key.startswith(f"in.{name}.")]
        yield f"out.{name}", _sampler(options)(model, condition, StoredNoise(noise))


def _loss(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The generators' training loss, section 0.5 of their description."""
    losses = F.cross_entropy(logits.transpose(1, 2), target, label_smoothing=0.1, reduction="none")
    weights = torch.where(mask, 1.0, 0.1)
    return (losses * weights).sum() / (weights.sum() + 1e-8)


def _sampler(options: dict[str, Any]) -> TiTokSampler:
    return TiTokSampler(
        steps=options["num_sample_steps"],
        guidance=options["guidance_scale"],
        guidance_decay=options["guidance_decay"],
        guidance_power=options.get("guidance_scale_pow", 3.0),
        randomize_temperature=options["randomize_temperature"],
        anneal=options.get("softmax_temperature_annealing", False),
    )


FAMILIES = {"imagebert": Family(outputs), "uvitbert": Family(outputs)}
