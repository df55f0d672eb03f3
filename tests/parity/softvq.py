"""SoftVQ-VAE: the quantiser in its released forms, and the whole model with the losses of its training."""

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from softgen.tokenizers.alignment import AlignmentHead, alignment_loss, imagenet_range
from softgen.tokenizers.soft_quantizer import SoftDistance, SoftQuantizer
from softgen.tokenizers.softvq import ScaledViT, SoftVQ
from tests.parity.fixture import Family, Fixture, Outputs


def quantizers(fixture: Fixture) -> Outputs:
    z, weights = fixture["in.z"], load_file(fixture.weights())
    for name, options in fixture.config["args"].items():
        quantizer = SoftQuantizer(
            num_codes=options["n_e"],
            code_dim=options["e_dim"],
            groups=options["num_codebooks"],
            distance=_distance(l2_norm=options["l2_norm"]),
            tau=options["tau"],
        )
        quantizer.load_state_dict({"embedding": weights[f"{name}.embedding"]})
        quantised = quantizer(z)
        torch.testing.assert_close(quantizer(z, impl="fused"), quantised, rtol=0, atol=1e-5)
        probs = _by_group(quantizer.posterior(z)[0], quantizer.groups)
        codes = probs.argmax(dim=-1)
        yield f"out.{name}_zq", quantised
        yield f"out.{name}_probs", probs
        yield f"out.{name}_argmax", codes
        yield f"out.{name}_indices_as_returned", codes.view(len(z), quantizer.groups, -1)
        yield f"out.{name}_max_probs", probs.amax(dim=-1).mean().view(1)
        yield f"out.{name}_cos", F.cosine_similarity(z, quantised, dim=-1).mean().view(1)
        yield f"out.{name}_entropy_loss", (options["entropy_loss_ratio"] * quantizer.kl(z)).view(1)


def _distance(*, l2_norm: bool) -> SoftDistance:
    return "cosine" if l2_norm else "dot"


def _by_group(probs: Tensor, groups: int) -> Tensor:
    """Probabilities (G, B L / G, K) from (B, L, K)."""
    batch, length, codes = probs.shape
    return probs.view(batch, groups, length // groups, codes).transpose(0, 1).flatten(1, 2)


def model(fixture: Fixture) -> Outputs:
    options, vit = fixture.config["args"], fixture.config["vit"]
    tokenizer = SoftVQ.from_checkpoint(
        fixture.weights(),
        encoder_heads=vit["encoder"]["num_heads"],
        decoder_heads=vit["decoder"]["num_heads"],
        distance=_distance(l2_norm=options["codebook_l2_norm"]),
        tau=options["tau"],
    )
    shown = {"image_size": "image_size", "num_latents": "num_latent_tokens", "codebook_size": "codebook_size"}
    shown |= {"latent_dim": "codebook_embed_dim", "groups": "num_codebooks"}
    assert all(tokenizer.config[ours] == options[theirs] for ours, theirs in shown.items())

    images = (fixture["in.image"] + 1) / 2
    yield "out.encoder_tokens", tokenizer.encoder(fixture["in.image"])
    z, latents = tokenizer.raw_latents(images), tokenizer.encode(images)
    yield "out.z", z
    yield "out.zq", latents
    yield "out.recon", 2 * tokenizer.decode_raw(latents) - 1
    yield "out.decode", 2 * tokenizer.decode_raw(fixture["in.latent"]) - 1
    yield "out.entropy_loss", (options["entropy_loss_ratio"] * tokenizer.quantizer.kl(z)).view(1)
    if options["repa"]:
        yield from _alignment(fixture, images, latents, options, vit["repa"])


def _alignment(
    fixture: Fixture, images: Tensor, latents: Tensor, options: dict[str, Any], sizes: dict[str, int]
) -> Outputs:
    weights = load_file(fixture.weights())
    teacher = ScaledViT(
        image_size=options["image_size"],
        patch_size=options["repa_patch_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
    )
    teacher.load_state_dict(_part(weights, "repa_model."))
    head = AlignmentHead(latent_dim=latents.shape[-1], hidden=options["repa_proj_dim"], feature_dim=sizes["embed_dim"])
    head.load_state_dict(_part(weights, "projection."))
    features = teacher.features(imagenet_range(images))
    yield "out.repa_features", features
    for how in ("repeat", "avg_1d", "global"):
        if f"out.align_{how}" not in fixture.io:
            continue  # not every number of patches can be shared out
        loss = options["repa_loss_weight"] * alignment_loss(latents, features, head, how=how)  # type: ignore[arg-type]
        yield f"out.align_{how}", loss.view(1)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


FAMILIES = {"softvq_quantizer": Family(quantizers), "softvq_model": Family(model)}
