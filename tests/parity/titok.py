"""MaskGIT's VQGAN, and TiTok of both kinds."""

from softgen.tokenizers.maskgit_vqgan import MaskGITVQGAN
from softgen.tokenizers.titok import TiTok
from tests.parity.fixture import Family, Fixture, Outputs


def vqgan(fixture: Fixture) -> Outputs:
    arguments = fixture.config["args"]
    tokenizer = MaskGITVQGAN.from_checkpoint(fixture.weights(), image_size=fixture["in.image"].shape[-1])
    shown = ("channel_mult", "hidden_channels", "num_channels", "num_res_blocks", "z_channels", "codebook_size")
    assert all(tokenizer.config[name] == arguments[name] for name in shown)
    latents = tokenizer.latents(fixture["in.image"])
    yield "out.z", latents.transpose(1, 2).unflatten(2, (tokenizer.grid, tokenizer.grid))
    yield "out.encode_ids", tokenizer.quantize(latents)
    yield "out.decode_image_clamped", tokenizer.decode(fixture["in.ids"])
    yield "out.decode_image", tokenizer.decode_raw(tokenizer.codebook[fixture["in.ids"]])
    yield "out.soft_image", tokenizer.decode_raw(tokenizer.embed_soft(fixture["in.soft_probs"]))


def titok(fixture: Fixture) -> Outputs:
    vq, table = fixture.config["args"]["model"]["vq_model"], fixture.config["size_table"]
    heads = {part: table[vq[f"vit_{part}_model_size"]]["heads"] for part in ("enc", "dec")}
    tokenizer = TiTok.from_checkpoint(
        fixture.weights(), use_l2_norm=vq["use_l2_norm"], encoder_heads=heads["enc"], decoder_heads=heads["dec"]
    )
    shown = ("codebook_size", "token_size", "num_latent_tokens", "use_l2_norm")
    assert all(tokenizer.config[name] == vq[name] for name in shown)
    assert tokenizer.config["is_legacy"] == vq.get("is_legacy", True)

    images, ids = fixture["in.image"], fixture["in.ids"]
    yield "out.z", tokenizer.raw_latents(images).transpose(1, 2).unsqueeze(2)
    encoded = tokenizer.encode(images)
    yield "out.encode_ids", encoded.unsqueeze(1)
    yield "out.encode_zq", tokenizer.codebook[encoded].transpose(1, 2).unsqueeze(2)
    codes = tokenizer.codebook[ids]
    yield "out.decode_z", codes.transpose(1, 2).unsqueeze(2)
    if tokenizer.config["is_legacy"]:
        yield "out.decode_logits", tokenizer.proxy_logits(codes)
    soft = tokenizer.embed_soft(fixture["in.soft_probs"])
    yield "out.soft_z", soft.transpose(1, 2).unsqueeze(2)
    if "out.decode_image" in fixture.io:  # a stage-1 checkpoint has no pixel decoder
        yield "out.decode_image", tokenizer.decode_raw(codes)
        yield "out.soft_image", tokenizer.decode_raw(soft)


FAMILIES = {"maskgit_vqgan": Family(vqgan), "titok": Family(titok), "titok_direct": Family(titok)}
