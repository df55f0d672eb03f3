"""Which sampler a published model gets, and the command that uses it."""

from pathlib import Path

import pytest
import torch

from softgen.models import ImageBert, MaskBit, MaskedTransformer, MaskGIT, UViTBert
from softgen.sample import main as sample
from softgen.samplers import MaskBitSampler, PublishedMaskGITSampler, TiTokSampler, published_sampler
from softgen.tokenizers import TamingVQGAN

SMALL = {"hidden_dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "nclass": 3}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def test_every_family_has_its_published_settings() -> None:
    with torch.device("meta"):
        maskgit = [MaskGIT(img_size=size, **SMALL) for size in (256, 512)]  # type: ignore[arg-type]
        maskbit = [MaskBit(bits=bits, **SMALL) for bits in (10, 14)]  # type: ignore[arg-type]
        bert = [ImageBert(image_seq_len=sites, **BERT) for sites in (32, 64)]  # type: ignore[arg-type]
        sftok = ImageBert(image_seq_len=64, codebook_size=8192, **BERT)  # type: ignore[arg-type]
        uvit = UViTBert(**BERT)  # type: ignore[arg-type]
        native = MaskedTransformer(num_codes=4, num_sites=4, num_classes=3, width=8, depth=1, heads=2)
    assert [published_sampler(model) for model in maskgit] == [
        PublishedMaskGITSampler(steps=8, guidance=3.0, confidence_noise=4.5),
        PublishedMaskGITSampler(steps=15, guidance=2.8, confidence_noise=7.0),
    ]
    assert [published_sampler(model) for model in maskbit] == [
        MaskBitSampler(steps=64, guidance=6.4, guidance_power=2.5, confidence_noise=10.5),
        MaskBitSampler(steps=64, guidance=7.1, guidance_power=3.0, confidence_noise=7.8),
    ]
    linear = [
        TiTokSampler(steps=8, guidance=g, guidance_decay="linear", randomize_temperature=t)
        for g, t in ((4.5, 9.5), (3.0, 11.0))
    ]
    assert [published_sampler(model) for model in bert] == linear
    assert published_sampler(sftok) == TiTokSampler(
        steps=8, guidance=4.5, guidance_decay="constant", randomize_temperature=1.0
    )
    assert published_sampler(uvit) == TiTokSampler(
        steps=64, guidance=6.9, guidance_decay="power-cosine", guidance_power=3.0, randomize_temperature=2.8
    )
    with pytest.raises(ValueError, match=r"^sampler: expected maskgit or halton, since .* a MaskedTransformer$"):
        published_sampler(native)


def test_the_command_samples_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MaskGIT(img_size=64, codebook_size=5, **SMALL)  # type: ignore[arg-type]
    tokenizer = TamingVQGAN(
        image_size=64, n_embed=5, embed_dim=4, ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=1, z_channels=4
    )
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    sample([f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--n=3", "--sampler=published"])
    assert (tmp_path / "out" / "grid.png").is_file()
    for option in ("--steps=3", "--schedule=root", "--guidance=2", "--temperature=0.5"):
        with pytest.raises(SystemExit):
            sample([f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'other'}", "--sampler=published", option])
        name = option.removeprefix("--").partition("=")[0]
        assert f"{name}: expected none with sampler published, which has settings" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
